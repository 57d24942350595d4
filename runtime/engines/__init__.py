"""Which engines there are, and how to open one for an artefact.

A new engine is one file with a subclass of :class:`~trimkv_edge.runtime.engines.base.ArtefactEngine` and one line in
``ENGINES``. Its constructor raises :class:`~trimkv_edge.errors.ArtefactError` for a file that it cannot read.
"""

from __future__ import annotations

import sys
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
    that installs them has the engine's name. ``vision_path`` and ``pooled_vision_path`` read pictures too; empty: the
    engine runs text models only."""

    path: str
    pooled_path: str
    packages: tuple[str, ...]
    vision_path: str = ""
    pooled_vision_path: str = ""


ENGINES = {
    "onnx": EngineEntry(
        "trimkv_edge.runtime.engines.onnx:OnnxEngine",
        "trimkv_edge.runtime.engines.onnx_pooled:OnnxPooledEngine",
        ("onnxruntime",),
        "trimkv_edge.runtime.engines.onnx_vision:OnnxVisionEngine",
        "trimkv_edge.runtime.engines.onnx_vision:OnnxPooledVisionEngine",
    ),
    "executorch": EngineEntry(
        "trimkv_edge.runtime.engines.executorch:ExecuTorchEngine",
        "trimkv_edge.runtime.engines.executorch_pooled:ExecuTorchPooledEngine",
        ("executorch", "torch"),
        "trimkv_edge.runtime.engines.executorch_vision:ExecuTorchVisionEngine",
        "trimkv_edge.runtime.engines.executorch_vision:ExecuTorchPooledVisionEngine",
    ),
    "torch": EngineEntry(
        "trimkv_edge.gpu.artefact:TorchArtefactEngine",
        "trimkv_edge.gpu.artefact:TorchPooledArtefactEngine",
        ("torch", "transformers", "safetensors"),
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


class Variant(NamedTuple):
    """An engine's target run in another way: the engine, and the extra that installs what it needs."""

    engine: str
    entry: EngineEntry
    extra: str


def _rounded(kind: str) -> EngineEntry:
    module = "trimkv_edge.gpu.rounded"
    packages = (*ENGINES["torch"].packages, "torchao")
    return EngineEntry(f"{module}:{kind}Engine", f"{module}:{kind}PooledEngine", packages)


_CUDA = EngineEntry(
    "trimkv_edge.runtime.engines.onnx_cuda:OnnxCudaEngine",
    "trimkv_edge.runtime.engines.onnx_cuda:OnnxCudaPooledEngine",
    ("onnxruntime",),
)
# Never chosen unless they are named. ``onnx:auto`` is ``onnx:cuda`` where that runs, else ``onnx``.
VARIANTS = {
    "onnx:cuda": Variant("onnx", _CUDA, "onnx-gpu"),
    "onnx:auto": Variant("onnx", _CUDA, "onnx-gpu"),
    "torch:int8": Variant("torch", _rounded("Int8"), "torch"),
    "torch:int4": Variant("torch", _rounded("Int4"), "torch"),
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
    return [package for package in _entry(name).packages if find_spec(package) is None]


def _entry(name: str) -> EngineEntry:
    return VARIANTS[name].entry if name in VARIANTS else ENGINES[name]


def choose_engine(artefact: Artefact, name: str | None = None) -> str:
    """``name`` if it can run the artefact; without a name, the artefact's first target whose engine is installed.
    Whether a device of ``VARIANTS`` works is known only when the engine is opened.

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
    base = VARIANTS[name].engine if name in VARIANTS else name
    if base is not None and base not in ENGINES:
        raise ConfigError(f"engine {name!r} is not known; use one of {', '.join((*ENGINES, *VARIANTS))}")
    if base is not None and base not in engines:
        raise ArtefactError(
            f"{artefact.folder} has no {base} target, only {', '.join(targets) or 'none'}: "
            f"choose one of those or export again with --target {RUNS.get(base, base)}"
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
    extra = VARIANTS[wanted[0]].extra if wanted[0] in VARIANTS else wanted[0]
    raise TrimKVError(f"no engine for {artefact.folder} is installed ({lacking}): pip install 'trimkv-edge[{extra}]'")


def load_engine(
    artefact: Artefact, name: str | None = None, threads: int | None = None, *, profile: bool = False
) -> ArtefactEngine:
    """Opens an engine with an empty cache.

    Args:
        artefact: from :meth:`Artefact.load`.
        name: a key of ``ENGINES`` or ``VARIANTS``; default: the first target whose engine is installed.
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
    if chosen != "onnx:auto":
        return _open(artefact, chosen, threads, profile)
    try:
        opened = _open(artefact, "onnx:cuda", threads, profile)
        said = "on CUDA"
    except TrimKVError as error:
        opened = _open(artefact, "onnx", threads, profile)
        said = f"on the CPU, because {error}"
    print(f"{chosen} runs {said}", file=sys.stderr, flush=True)
    return opened


def _open(artefact: Artefact, name: str, threads: int | None, profile: bool) -> ArtefactEngine:
    manifest = artefact.manifest
    target = engines_of(manifest)[VARIANTS[name].engine if name in VARIANTS else name]
    kind = engine_class(name, manifest.cache, vision=manifest.vision is not None)
    return kind(artefact.folder, manifest, target, threads, profile=profile)


def engine_class(name: str, config: CacheConfig, *, vision: bool = False) -> type[ArtefactEngine]:
    """The class of an engine in ``ENGINES`` or ``VARIANTS`` that runs such a cache; its own libraries are imported when
    it is constructed.

    Args:
        vision: of a model that reads pictures.

    Raises:
        ConfigError: the engine runs text models only.
    """
    entry = _entry(name)
    paths = (entry.vision_path, entry.pooled_vision_path) if vision else (entry.path, entry.pooled_path)
    path = paths[config.caps is not None]
    if not path:
        able = ", ".join(engine for engine in ENGINES if ENGINES[engine].vision_path)
        raise ConfigError(f"engine {name} runs text models only, and this model reads pictures: use one of {able}")
    module, _, attribute = path.partition(":")
    found: type[ArtefactEngine] = getattr(import_module(module), attribute)
    return found
