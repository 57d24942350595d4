"""Loads a gated model: base weights from safetensors (or seeded random ones), fixed RoPE, gates."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from trimkv_edge.errors import ConfigError, ModelError
from trimkv_edge.manifest import GateInfo, ModelInfo, RopeInfo
from trimkv_edge.models.gate_source import find_gates
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.gates import GateShape, load_gates, random_gates
from trimkv_edge.models.pictures import GatedVisionModel
from trimkv_edge.models.random_weights import ensure_random_weights
from trimkv_edge.models.rope import choose_rope, fix_rope
from trimkv_edge.models.skeleton import WeightFiles, Weights, fits, model_weights, skeleton, weights_of
from trimkv_edge.models.source import ModelSource
from trimkv_edge.policies.base import LOG_BETA, Policy
from trimkv_edge.retention import GATE_KINDS, NoGate


@dataclass(frozen=True)
class LoadedModel:
    """A gated model and what the manifest records about it.

    Attributes:
        model: hollow (see :mod:`trimkv_edge.models.skeleton`) if it was asked for.
        weights: values of its parameters by name, read when asked for.
    """

    model: GatedModel
    info: ModelInfo
    gates: GateInfo
    rope: RopeInfo
    weights: Weights


def load_model(
    source: ModelSource,
    gates: str | None = None,
    rope: str = "auto",
    seed: int = 0,
    *,
    stream_length: int | None = None,
    hollow: bool = False,
) -> LoadedModel:
    """Builds the gated model of ``source`` in float32.

    Args:
        source: see :func:`trimkv_edge.models.source.find_source`.
        gates: a hub id, folder or file (ours or published), a kind (``rg``, ``rg10``) of the model's own gates, or
            ``none``; None is its first kind. With random weights, kinds without a local file give random gates.
        rope: LongRoPE factor set, see :func:`trimkv_edge.models.rope.choose_rope`.
        seed: of random weights and gates.
        stream_length: most tokens of a stream, as far as it chooses LongRoPE factors.
        hollow: leave the base's weights in their files, where they are stored as the model names them.

    Raises:
        ModelError: weights or gates are missing, damaged or do not fit.
        ConfigError: a negative seed, or a choice of LongRoPE factors that cannot be honoured.
    """
    choose_rope(source.config, rope, stream_length)  # before gigabytes are read or written for nothing
    if source.random_weights:
        source = ensure_random_weights(source, seed)
    base, files = (_hollow_base(source) if hollow else None) or (load_base(source, seed), None)
    rope_info = fix_rope(base, rope, stream_length)
    shape = GateShape.of(source.config)
    digest = source.weights_sha256(seed)
    kind, path = _find_gates(source, gates)
    if kind == "none":
        heads, layers = source.text_config.num_key_value_heads, source.text_config.num_hidden_layers
        modules, gate_info = nn.ModuleList(NoGate(heads) for _ in range(layers)), GateInfo("none", "", "", 0)
    elif path is None:
        width = min(source.family.gate_intermediate_size, source.text_config.hidden_size)
        modules, gate_info = random_gates(kind, shape, width, seed), GateInfo(kind, f"random (seed {seed})", "", width)
    else:
        own = source.gates.get(kind, "") if gates is None or gates in GATE_KINDS else gates
        named = path.name if gates is None and Path(own).is_file() else own
        modules, gate_info = load_gates(path, shape, None if source.random_weights else digest, source=named)
    kind_of_model = GatedVisionModel if source.family.vision else GatedModel
    model = kind_of_model(base, modules).eval().requires_grad_(False)
    sizes = source.shape()
    info = ModelInfo(
        name=source.name,
        source=source.origin,
        family=source.family.name,
        weights_sha256=digest,
        random_weights=source.random_weights,
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_position_embeddings=source.text_config.max_position_embeddings,
    )
    weights = weights_of(files, modules) if files else model_weights(model)
    return LoadedModel(model, info, gate_info, rope_info, weights)


def _hollow_base(source: ModelSource) -> tuple[PreTrainedModel, WeightFiles] | None:
    """Nothing if transformers has to convert names or shapes while loading."""
    assert source.folder is not None  # random weights were written by now
    # A copy: the model writes into its configuration.
    files, base = WeightFiles(source.folder), skeleton(copy.deepcopy(source.config))
    return (base, files) if fits(base, files) else None


def gates_for(policy: Policy, source: ModelSource, gates: str | None) -> str | None:
    """The gates that a policy gets where the user does not say.

    Policies that read no log-betas do without where a model has none of its own; those whose heads share a budget get
    the kind whose scores are comparable between heads (``rg10``, the shared final scoring projection).
    """
    if LOG_BETA in policy.reads:
        if gates == "none":
            raise ConfigError(
                f"policy {policy.name} ranks by retention gates: leave out --gates none, or change --policy"
            )
        comparable = "rg10" in source.gates or source.random_weights
        return "rg10" if gates is None and policy.pooled and comparable else gates
    return gates or (None if source.gates else "none")


def choose_gates(source: ModelSource, gates: str | None) -> tuple[str, Path | None]:
    """The gate kind asked for and its file; no file means no gates (``none``), or random ones for random weights.

    A file is read and checked here, before any weights are loaded.
    """
    kind, path = _find_gates(source, gates)
    if path is None:
        return kind, None
    return load_gates(path, GateShape.of(source.config))[1].kind, path


def _find_gates(source: ModelSource, gates: str | None) -> tuple[str, Path | None]:
    if gates == "none":
        return "none", None
    if gates is not None and gates not in (*GATE_KINDS, *source.gates):
        return "rg", find_gates(gates)
    kind = gates or next(iter(source.gates), "rg")
    known = source.gates.get(kind)
    if known is not None and Path(known).is_file():
        return kind, Path(known)
    if source.random_weights:
        return kind, None
    if known is None:
        have = f"it has {', '.join(source.gates)}" if source.gates else "none are published for it"
        raise ModelError(f"{source.name} has no {kind!r} gates ({have}): give --gates HUB-ID|DIR|FILE")
    return kind, find_gates(known)


def load_base(source: ModelSource, seed: int) -> PreTrainedModel:
    """The plain model of ``source`` in float32; random weights are written first, unless they were before.

    Raises:
        ModelError: weights are missing or damaged.
        ConfigError: a negative seed.
        BudgetError: the disk has no room for random weights.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}, but must be >= 0")
    if source.random_weights:
        source = ensure_random_weights(source, seed)
    hf_logging.disable_progress_bar()
    try:
        base, report = source.family.auto.from_pretrained(
            source.folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"weights in {source.folder} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    if report["missing_keys"]:
        first = sorted(report["missing_keys"])[0]
        raise ModelError(f"weights in {source.folder} lack {len(report['missing_keys'])} tensors, {first} among them")
    return base.eval()
