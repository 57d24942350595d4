"""The torch engine of an artefact: its weights go to the device as they are read, its steps are compiled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.profiler import ProfilerActivity
from transformers import AutoConfig

from trimkv_edge.errors import ArtefactError, ModelError
from trimkv_edge.gpu.engine import DeviceEngine
from trimkv_edge.gpu.placement import DTYPES, check_fits_on, find_device, home, moved
from trimkv_edge.gpu.pooled_engine import DevicePooledEngine
from trimkv_edge.manifest import Manifest, Target
from trimkv_edge.models.gated import GatedModel
from trimkv_edge.models.gates import GateShape, load_gates
from trimkv_edge.models.rope import fix_rope
from trimkv_edge.models.skeleton import WeightFiles, fits, skeleton, weights_of
from trimkv_edge.retention import NoGate
from trimkv_edge.runtime.engines.base import ArtefactEngine
from trimkv_edge.runtime.profile import OperatorTime

FOLDER = "torch"
CONFIG, GATES = "config.json", "gates.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class FromArtefact(ArtefactEngine):
    """What both kinds of engine do with an artefact.

    Args:
        folder: the artefact.
        manifest, target: its manifest and the target to run.
        threads: of torch in this process, on the CPU. Default: as they are.
        device: to run on instead.
        compiled: False runs step by step, which starts at once and is slower.

    Raises:
        ConfigError: settings that the engine cannot honour, or a device that is not there.
        ArtefactError: a file is missing, damaged, or does not fit the manifest.
    """

    shares_model = True

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        target: Target,
        threads: int | None = None,
        *,
        profile: bool = False,
        device: str | None = None,
        compiled: bool = True,
    ) -> None:
        super().__init__(folder, manifest, target, threads, profile=profile)
        place = find_device(device)
        check_fits_on(place, manifest.bytes.peak, f"running {folder}")
        if threads is not None:
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads() if place.type == "cpu" else None
        with _readable(folder):
            model = self._load(place)
        self._start(self._rounded(model), compiled)
        self._profiler = _profiler(place) if profile else None

    def _load(self, device: torch.device) -> GatedModel:
        folder, manifest = self._file("config").parent, self._manifest
        config = AutoConfig.from_pretrained(folder)
        files, base = WeightFiles(self._file("weights").parent), skeleton(config)
        if not fits(base, files):
            raise ArtefactError(f"the weights in {folder} do not fit its {CONFIG}: export the artefact again")
        fix_rope(base, "auto" if manifest.rope.variant == "default" else manifest.rope.variant)
        shape = GateShape.of(config)
        if manifest.gates.kind == "none":
            gates = nn.ModuleList(NoGate(shape.num_kv_heads) for _ in range(shape.num_layers))
        else:
            gates, _ = load_gates(self._file("gates"), shape)
        return moved(GatedModel(base, gates), device, DTYPES[manifest.dtype], weights_of(files, gates))

    def _rounded(self, model: GatedModel) -> GatedModel:
        """The model to run; subclasses change its weights."""
        return model

    @abstractmethod
    def _open(self, model: GatedModel, compiled: bool) -> None: ...

    @abstractmethod
    def warm_up(self) -> None: ...

    def _start(self, model: GatedModel, compiled: bool) -> None:
        self._model, self._compiled = model, compiled
        self._open(model, compiled)
        self.warm_up()

    def _open_cache(self) -> None:
        self._start(self._model, self._compiled)

    def _read_profile(self) -> list[OperatorTime]:
        assert self._profiler is not None
        self._profiler.stop()
        on_device = home(self._model)[0].type == "cuda"
        found = []
        for row in self._profiler.key_averages():
            microseconds = row.self_device_time_total if on_device else row.self_cpu_time_total
            if microseconds:
                found.append(OperatorTime(row.key, row.count, microseconds * 1e-6))
        return sorted(found, key=lambda row: -row.seconds)


class TorchArtefactEngine(DeviceEngine, FromArtefact):
    """Runs the ``torch`` target of an artefact on CUDA if torch can use it, else on the CPU; arguments and errors as
    for its base."""


class TorchPooledArtefactEngine(DevicePooledEngine, FromArtefact):
    """The same where heads share a budget."""


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ModelError, SafetensorError, OSError, ValueError, KeyError) as error:
        if isinstance(error, ArtefactError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ArtefactError(f"the torch target of {folder} cannot be read ({reason}): export it again") from error


def _profiler(device: torch.device) -> Any:
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    profiler = torch.profiler.profile(activities=kinds)
    profiler.start()
    return profiler
