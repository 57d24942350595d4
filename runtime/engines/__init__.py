"""Which engines there are, and how to open one for an artefact.

A new engine is one file with a subclass of :class:`~trimkv_edge.runtime.engines.base.ArtefactEngine` and one line in
``ENGINES``. Its constructor raises :class:`~trimkv_edge.errors.ArtefactError` for a file that it cannot read.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ArtefactError, ConfigError, TrimKVError
from trimkv_edge.manifest import Manifest, Target
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.engines.base import ArtefactEngine


class EngineEntry(NamedTuple):
    """``module:Class`` of an engine, and of its form for budgets that heads share, and the packages it needs; the extra
    that installs them has the engine's name."""

    path: str
    pooled_path: str
    packages: tuple[str, ...]


ENGINES = {
    "onnx": EngineEntry(
        "trimkv_edge.runtime.engines.onnx:OnnxEngine",
        "trimkv_edge.runtime.engines.onnx_pooled:OnnxPooledEngine",
        ("onnxruntime",),
    ),
    "executorch": EngineEntry(
        "trimkv_edge.runtime.engines.executorch:ExecuTorchEngine",
        "trimkv_edge.runtime.engines.executorch_pooled:ExecuTorchPooledEngine",
        ("executorch", "torch"),
    ),
    "tosa": EngineEntry(
        "trimkv_edge.runtime.engines.tosa:TosaEngine",
        "trimkv_edge.runtime.engines.tosa:TosaEngine",  # refuses them
        ("tosa_reference_model",),
    ),
    "host-evicted": EngineEntry(
        "trimkv_edge.runtime.engines.host_evicted:HostEvictedEngine",
        "trimkv_edge.runtime.engines.host_evicted:HostEvictedEngine",  # refuses them
        ("onnxruntime",),
    ),
    "litert": EngineEntry(
        "trimkv_edge.runtime.engines.litert:LiteRTEngine",
        "trimkv_edge.runtime.engines.litert:LiteRTEngine",  # refuses them
        ("ai_edge_litert",),
    ),
    "qnn-emulator": EngineEntry(
        "trimkv_edge.runtime.engines.qnn_emulator:QnnEmulatorEngine",
        "trimkv_edge.runtime.engines.qnn_emulator:QnnEmulatorEngine",  # refuses them
        ("onnxruntime", "onnxruntime_qnn"),
    ),
}


# Targets of engines that have another name.
RUNS = {"qnn-emulator": "npu:hexagon"}


def engine_of(name: str, target: Target) -> str:
    """Engine of an artefact's target: the one of the same name, else the one that the target names."""
    return name if name in ENGINES else target.engine


def engines_of(manifest: Manifest) -> dict[str, Target]:
    """An artefact's targets by engine, in order."""
    return {engine_of(name, target): target for name, target in manifest.targets.items()}


def missing_packages(name: str) -> list[str]:
    """Packages that engine ``name`` needs and that are not installed."""
    return [package for package in ENGINES[name].packages if find_spec(package) is None]


def choose_engine(artefact: Artefact, name: str | None = None) -> str:
    """``name`` if it can run the artefact; without a name, the artefact's first target whose engine is installed.

    Raises:
        ConfigError: unknown name.
        ArtefactError: the artefact has no target for it.
        TrimKVError: its package is not installed.
    """
    targets = list(artefact.manifest.targets)
    engines = list(engines_of(artefact.manifest))
    if name not in ENGINES and name in targets:
        if (engine := artefact.manifest.targets[name].engine) in ENGINES:
            raise ConfigError(f"{name} is a target, and its engine is {engine}: use --engine {engine}")
        raise ArtefactError(
            f"{name} in {artefact.folder} is compiled for its device, and nothing here runs it: see docs/npu.md, or "
            "export with --target host-evicted too"
        )
    if name is not None and name not in ENGINES:
        raise ConfigError(f"engine {name!r} is not known; use one of {', '.join(ENGINES)}")
    if name is not None and name not in engines:
        raise ArtefactError(
            f"{artefact.folder} has no {name} target, only {', '.join(targets) or 'none'}: "
            f"choose one of those or export again with --target {RUNS.get(name, name)}"
        )
    known = [engine for engine in engines if engine in ENGINES]
    if not known:
        raise ArtefactError(
            f"{artefact.folder} has targets {', '.join(targets) or 'none'}, "
            f"but this trimkv-edge runs {', '.join(ENGINES)}: export it again with one of these too (docs/npu.md says "
            "which targets are only compiled)"
        )
    wanted = known if name is None else [name]
    for candidate in wanted:
        if not missing_packages(candidate):
            return candidate
    lacking = "; ".join(f"{engine} needs {', '.join(missing_packages(engine))}" for engine in wanted)
    raise TrimKVError(
        f"no engine for {artefact.folder} is installed ({lacking}): pip install 'trimkv-edge[{wanted[0]}]'"
    )


def load_engine(
    artefact: Artefact, name: str | None = None, threads: int | None = None, *, profile: bool = False
) -> ArtefactEngine:
    """Opens an engine with an empty cache.

    Args:
        artefact: from :meth:`Artefact.load`.
        name: a key of ``ENGINES``; default: the first target whose engine is installed.
        threads: threads of the engine; default: its own choice.
        profile: note the time of every operator.

    Raises:
        BudgetError: the artefact needs more memory than is available; nothing was loaded.
        TrimKVError: as :func:`choose_engine`; also a model file that the engine cannot read.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}, but must be at least 1")
    chosen = choose_engine(artefact, name)
    artefact.check_fits()
    manifest = artefact.manifest
    kind = engine_class(chosen, manifest.cache)
    return kind(artefact.folder, manifest, engines_of(manifest)[chosen], threads, profile=profile)


def engine_class(name: str, config: CacheConfig) -> type[ArtefactEngine]:
    """The class of an engine in ``ENGINES`` that runs such a cache; its own libraries are imported when it is
    constructed."""
    entry = ENGINES[name]
    module, _, attribute = (entry.path if config.caps is None else entry.pooled_path).partition(":")
    found: type[ArtefactEngine] = getattr(import_module(module), attribute)
    return found
