"""A kvpress recording (see record.py) and what this project keeps of the same tokens with the same weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from trimkv_edge.config import CacheConfig
from trimkv_edge.eviction import score_entries
from trimkv_edge.models.eager import EagerEngine
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.rope import fix_rope
from trimkv_edge.retention import NoGate

# Our policy -> the press it is compared with.
PAIRS = {"streaming": "streaming", "keydiff": "keydiff", "snapkv": "snapkv", "tova": "tova", "h2o": "observed"}
SINKS = {"streaming": 4}


@dataclass(frozen=True)
class Event:
    """One eviction event, by position.

    Attributes:
        positions: int64 ``[layers, kv_heads, slots]``; at the first event slots are in stream order.
        scores: float32 ``[layers, kv_heads, slots]``.
        mass: float32 ``[layers, kv_heads, slots]``, attention received; None unless the policy reads it.
        kept: int64 ``[layers, kv_heads, M]``, positions in order.
    """

    positions: Tensor
    scores: Tensor
    mass: Tensor | None
    kept: Tensor


@dataclass(frozen=True)
class Recording:
    """Tensors by their name in the file, and ``about``: settings, versions, the model's configuration."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Recording:
        """``path`` has no ending."""
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return cls(load_file(path.with_suffix(".safetensors")), about)

    def model(self) -> GatedModel:
        """The recorded weights, without gates."""
        settings = dict(self.about["model"])
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        weights = {
            name.removeprefix("weights/"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith("weights/")
        }
        missing, unexpected = base.load_state_dict(weights, strict=False)
        assert not unexpected
        assert missing in ([], ["lm_head.weight"])  # tied to the embedding
        fix_rope(base, "auto")
        gates = nn.ModuleList(NoGate(config.num_key_value_heads) for _ in range(config.num_hidden_layers))
        return GatedModel(base, gates).eval().requires_grad_(False)

    def prompt(self, model: GatedModel, policy: str) -> Event:
        """Reads T tokens; the only event is at their end. Chunks change nothing, because nothing leaves before."""
        settings = self.about["settings"]
        return self._events(model, policy, settings["tokens"] - settings["budget"], settings["tokens"])[0]

    def stream(self, model: GatedModel, policy: str) -> list[Event]:
        """An event each B tokens."""
        settings = self.about["settings"]
        buffer = settings["buffer"]
        return self._events(model, policy, buffer, settings["budget"] + buffer * settings["events"])

    def _events(self, model: GatedModel, policy: str, buffer: int, total: int) -> list[Event]:
        budget = self.about["settings"]["budget"]
        config = CacheConfig(budget, buffer, min(budget, buffer), policy, sinks=SINKS.get(policy, 0))
        engine = EagerEngine(model, config)
        pending = self.tensors["tokens"][:total].tolist()
        events = []
        while pending:
            size = min(engine.room, config.prefill_chunk, len(pending))
            engine.prefill(pending[:size])
            del pending[:size]
            if engine.room == 0:
                events.append(self._evict(engine))
        assert engine.room == buffer  # the last event was at the end
        return events

    @staticmethod
    def _evict(engine: EagerEngine) -> Event:
        cache = engine.cache
        scores = score_entries(cache.entries(), engine.config).view_as(cache.positions)[0]
        positions = cache.positions[0].clone()
        mass = None if cache.mass is None else cache.mass[0].clone()
        engine.evict()
        return Event(positions, scores.clone(), mass, torch.from_numpy(engine.survivors()).sort(-1).values)

    def keys(self, model: GatedModel) -> Tensor:
        """Our keys of the prompt, ``[layers, kv_heads, T, head_dim]``."""
        tokens = self.about["settings"]["tokens"]
        engine = EagerEngine(model, CacheConfig(tokens, tokens, tokens, "full"))
        engine.prefill(self.tensors["tokens"][:tokens].tolist())
        return torch.from_numpy(engine.state().key)


def same_heads(ours: Tensor, theirs: Tensor) -> int:
    """Heads whose sorted positions are all equal."""
    return int((ours == theirs).all(-1).sum())


def shared(ours: Tensor, theirs: Tensor) -> float:
    """Part of our entries that they kept too."""
    common = (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1)
    return round(float(common.float().mean()), 4)


def observed_scores(event: Event, group: int) -> Tensor:
    """kvpress's observed attention from our mass: divided by how many queries saw the entry, and by the query heads.

    Returns:
        float32 ``[layers, kv_heads, slots]``.
    """
    assert event.mass is not None
    seen = event.positions.amax() + 1
    return event.mass / (seen - event.positions) / group
