"""A session with its tokenizer: what a harness that speaks text needs of an artefact or of a model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimkv_edge.budget import parse_budget
from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, ConfigError, ModelError
from trimkv_edge.eviction import find_policy
from trimkv_edge.manifest import GateInfo, ModelInfo
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.tokenizer import TOKENIZER_FILE, TextTokenizer


@dataclass(frozen=True)
class TextModel:
    """A model over a bounded cache, and how it reads and writes text.

    Attributes:
        session: its only stream.
        text: tokenizer of the session.
        hub: the same tokenizer as transformers loads it, for the chat template and the added tokens.
        eos_ids: tokens that end a text.
        bos_id: token that begins one, if the model has it.
        model, gates: what answers.
    """

    session: Session
    text: TextTokenizer
    hub: Any
    eos_ids: tuple[int, ...]
    bos_id: int | None
    model: ModelInfo
    gates: GateInfo

    def __post_init__(self) -> None:
        if not self.eos_ids and self.bos_id is None:
            raise ModelError(f"{self.model.name} names neither a begin nor an end token: texts cannot be scored")

    @property
    def config(self) -> CacheConfig:
        return self.session.engine.config

    def record(self) -> dict[str, Any]:
        """What a results file should say about the model."""
        return {
            "engine": self.session.engine.name,
            "cache": asdict(self.config),
            "base_model": asdict(self.model),
            "gates": asdict(self.gates),
        }


def open_artefact(folder: str, *, engine: str | None = None, threads: int | None = None) -> TextModel:
    """An exported model.

    Args:
        folder: what ``trimkv-export`` made.
        engine: ``onnx`` or ``executorch``; default: the first target whose engine is installed.
        threads: of the engine.

    Raises:
        TrimKVError: see :meth:`Artefact.load` and :func:`~trimkv_edge.runtime.engines.load_engine`; also an artefact
            without a tokenizer.
    """
    artefact = Artefact.load(folder)
    info = artefact.manifest.tokenizer
    if artefact.tokenizer is None or info is None:
        raise ArtefactError(f"{folder} has no tokenizer (random weights have none): it cannot read tasks")
    return TextModel(
        Session.open(artefact, engine, threads),
        artefact.tokenizer,
        _hub_tokenizer(artefact.folder),
        tuple(info.eos_token_ids),
        info.bos_token_id,
        artefact.manifest.model,
        artefact.manifest.gates,
    )


def open_model(
    name: str,
    *,
    weights: str | None = None,
    gates: str | None = "auto",
    rope: str = "auto",
    policy: str = "trimkv",
    budget: int | str = 512,
    buffer: int = 128,
    prefill_chunk: int | None = None,
    sinks: int | None = None,
    recent: int = 0,
    lookahead: int = 1,
    min_per_head: int = 0,
    threshold: float = 0.0,
    threads: int | None = None,
) -> TextModel:
    """A model in the eager engine, with any policy.

    Args:
        name: a known name, a hub id or a folder.
        weights: folder that holds the weights of ``name``.
        gates: ``auto`` (the model's own), a kind, a hub id, a folder or a file; ``none`` or None for no gates.
        budget: entries per KV head, or bytes of the whole cache (``64MB``); the full cache needs the stream's length.
        sinks: first tokens that never leave; default 0, 4 with ``streaming``.
        min_per_head, threshold: of budgets that heads share, see :class:`~trimkv_edge.config.CacheConfig`.
        threads: of torch.

    Raises:
        TrimKVError: a setting is out of range, or weights, gates or tokenizer are missing or do not fit.
    """
    import torch

    from trimkv_edge.models.eager import eager_engine
    from trimkv_edge.models.loading import gates_for, load_model
    from trimkv_edge.models.source import find_source

    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads is {threads}, but must be at least 1")
        torch.set_num_threads(threads)
    rule = find_policy(policy)
    source = find_source(name, Path(str(weights)) if weights else None)
    if source.folder is None or not (source.folder / TOKENIZER_FILE).is_file():
        raise ModelError(f"{source.folder or name} holds no {TOKENIZER_FILE}: give weights=DIR, a folder that has one")
    chosen = gates_for(rule, source, None if gates == "auto" else gates or "none")
    config = CacheConfig(
        budget=parse_budget(str(budget), source.shape(), buffer, "float32"),
        buffer=buffer,
        prefill_chunk=min(128, buffer) if prefill_chunk is None else prefill_chunk,
        policy=policy,
        sinks=rule.sinks if sinks is None else sinks,
        recent=recent,
        lookahead=lookahead,
        min_per_head=min_per_head,
        threshold=float(threshold),
    )
    loaded = load_model(source, chosen, rope)
    engine = eager_engine(loaded.model, config, loaded.rope.position_limit)
    text = TextTokenizer(source.folder / TOKENIZER_FILE)
    bos = getattr(source.config, "bos_token_id", None)
    return TextModel(
        Session(engine, text, trained_positions=loaded.info.max_position_embeddings),
        text,
        _hub_tokenizer(source.folder),
        _eos_ids(source.folder, source.config.eos_token_id),
        bos if isinstance(bos, int) else None,
        loaded.info,
        loaded.gates,
    )


def _hub_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer in {folder} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _eos_ids(folder: Path, default: int | list[int] | None) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): repair or remove it") from error
    ids = stored.get("eos_token_id", default)
    return (ids,) if isinstance(ids, int) else tuple(ids or ())
