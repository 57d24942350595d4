"""``trimkv-run --model``: a gated model in the torch engine as it is, without an export."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trimkv_edge.errors import ConfigError

if TYPE_CHECKING:
    from trimkv_edge.config import CacheConfig
    from trimkv_edge.engine import Engine
    from trimkv_edge.manifest import ByteInfo
    from trimkv_edge.models.loading import LoadedModel
    from trimkv_edge.models.source import ModelSource
    from trimkv_edge.runtime.artefact import Artefact

_DTYPES = ("float32", "bfloat16", "float16")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that stand in for an artefact; each is for ``--model`` only."""
    add = parser.add_argument_group("a model instead of an artefact, in the torch engine (docs/gpu.md)").add_argument
    add("--model", metavar="NAME|ID|DIR", help="a known name, a hub id or a folder, as for trimkv-export")
    add("--weights", type=Path, metavar="DIR", help="folder with the weights of --model")
    add("--gates", metavar="KIND|ID|DIR|FILE", help="its gates, as for trimkv-export (default: its own)")
    add("--budget", metavar="M", help="entries that each KV head keeps, or bytes of the cache (default 512)")
    add("--buffer", type=int, metavar="B", help="new tokens between eviction events (default 128)")
    add("--prefill-chunk", type=int, metavar="T", help="tokens read at once (default: the buffer, at most the budget)")
    add("--policy", metavar="NAME", help="who stays (default trimkv)")
    add("--sinks", type=int, metavar="N", help="first positions that never leave (default: the policy's)")
    add("--recent", type=int, metavar="N", help="newest positions that never leave (default 0)")
    add("--min-per-head", type=int, metavar="N", help="entries that no head goes below, where heads share a budget")
    add("--threshold", type=float, metavar="A", help="retention below which entries leave, where heads share a budget")
    add("--rope", metavar="V", help="LongRoPE factors: auto (default), short or long")
    add("--dtype", choices=_DTYPES, help="what it computes in (default float32; gates: always)")
    add("--quant", metavar="Q", help="weights of the linear layers: none (default), int8 or int4")
    add("--device", metavar="D", help="cpu, cuda or cuda:N (default: cuda if torch can use it)")
    add("--no-compile", action="store_true", help="run step by step: starts at once, decodes more slowly")


_OPTIONS = (
    "weights",
    "gates",
    "budget",
    "buffer",
    "prefill_chunk",
    "policy",
    "sinks",
    "recent",
    "min_per_head",
    "threshold",
    "rope",
    "dtype",
    "quant",
    "device",
    "no_compile",
)


def check_model(args: argparse.Namespace) -> None:
    """Raises :class:`ConfigError` if what is run is said twice, not at all, or with options of the other kind."""
    if (args.model is None) == (args.artefact is None):
        raise ConfigError("give what to run once: an ARTEFACT folder, or --model NAME for the torch engine")
    if args.model is None:
        given = [name for name in _OPTIONS if getattr(args, name) not in (None, False)]
        if given:
            raise ConfigError(
                f"--{given[0].replace('_', '-')} is for --model; an artefact has its own settings: leave it out"
            )
    elif args.engine not in (None, "torch"):
        raise ConfigError(f"--model runs in the torch engine, not in {args.engine}: export an artefact for that one")
    elif args.profile:
        raise ConfigError("--profile is for artefacts: leave it out, or export with --target torch")


def open_model(args: argparse.Namespace) -> tuple[Artefact, Engine]:
    """The engine, and what an artefact of the same settings would say about it.

    Raises:
        TrimKVError: the model, its gates or a setting cannot be used.
    """
    import torch

    from trimkv_edge.budget import estimate_memory
    from trimkv_edge.eviction import find_policy
    from trimkv_edge.gpu.engine import CompiledEngine
    from trimkv_edge.gpu.placement import DTYPES, check_fits_on, find_device, moved
    from trimkv_edge.gpu.pooled_engine import CompiledPooledEngine
    from trimkv_edge.gpu.quantize import quantize
    from trimkv_edge.manifest import ByteInfo
    from trimkv_edge.models.loading import choose_gates, gates_for, load_model
    from trimkv_edge.models.source import find_source

    device, dtype, scheme = find_device(args.device), args.dtype or "float32", args.quant or "none"
    source = find_source(args.model, args.weights)
    gates = gates_for(find_policy(args.policy or "trimkv"), source, args.gates)
    choose_gates(source, gates)
    config = _config(args, source, dtype)
    memory = estimate_memory(source.shape(), config, dtype)
    check_fits_on(device, memory.peak, f"running {args.model} with a budget of {config.budget}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    loaded = load_model(source, gates, args.rope or "auto", hollow=True)
    model = quantize(moved(loaded.model, device, DTYPES[dtype], loaded.weights), scheme)
    kind = CompiledPooledEngine if find_policy(config.policy).pooled else CompiledEngine
    engine = kind(model, config, loaded.rope.position_limit, compiled=not args.no_compile)
    engine.warm_up()
    stored = ByteInfo(memory.cache, memory.weights, memory.peak)
    return _described(source, loaded, config, stored, dtype, scheme), engine


def _config(args: argparse.Namespace, source: ModelSource, dtype: str) -> CacheConfig:
    from trimkv_edge.budget import parse_budget
    from trimkv_edge.config import CacheConfig
    from trimkv_edge.eviction import find_policy, policy_of
    from trimkv_edge.gpu.cache import check_config

    policy = find_policy(args.policy or "trimkv")
    buffer = 128 if args.buffer is None else args.buffer
    budget = parse_budget(args.budget or "512", source.shape(), buffer, dtype)
    config = CacheConfig(
        budget=budget,
        buffer=buffer,
        prefill_chunk=min(buffer, budget) if args.prefill_chunk is None else args.prefill_chunk,
        policy=policy.name,
        sinks=policy.sinks if args.sinks is None else args.sinks,
        recent=args.recent or 0,
        min_per_head=args.min_per_head or 0,
        threshold=args.threshold or 0.0,
    )
    policy_of(config)
    if not policy.pooled:
        check_config(config)
    return config


def _described(
    source: ModelSource, loaded: LoadedModel, config: CacheConfig, stored: ByteInfo, dtype: str, scheme: str
) -> Artefact:
    from trimkv_edge.export.tokenizer import copy_tokenizer
    from trimkv_edge.manifest import SCHEMA_VERSION, Manifest
    from trimkv_edge.runtime.artefact import Artefact

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            model=loaded.info,
            gates=loaded.gates,
            cache=config,
            rope=loaded.rope,
            tokenizer=copy_tokenizer(source.folder, folder, source.config),
            dtype=dtype,
            quantization=scheme,
            bytes=stored,
            targets={},
            files={},
            tools={},
        )
        manifest.save(folder)
        found = Artefact.load(folder, verify=False)
    return replace(found, folder=source.folder or Path(source.name))
