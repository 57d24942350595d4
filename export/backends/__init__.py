"""Compilers that start from a host-evicted graph (docs/npu.md): one line each, and the names that have none yet.

A backend is one module with a function ``Job -> Target``; its packages are imported when it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from trimkv_edge.errors import TrimKVError

if TYPE_CHECKING:
    from trimkv_edge.export.targets import Job
    from trimkv_edge.manifest import Target


@dataclass(frozen=True)
class Ran:
    """What a target's files are for and where they were executed, as the table in README.md says.

    Attributes:
        made_for: the device.
        here: what executes them where this project is tested; empty: nothing does.
        simulates: that is a model of the device, not the device.
        device: one of those that they are made for, on which they ran; empty: they never did.
    """

    made_for: str
    here: str = ""
    simulates: bool = False
    device: str = ""


NOT_TOLD = Ran("")


@dataclass(frozen=True)
class Host:
    """Another program that runs a target's files.

    Attributes:
        target: that it runs; ran: where it was executed.
        command: starts it with the artefact ``artefacts/tiny``, in a clone of the repository.
    """

    target: str
    ran: Ran
    command: str


@dataclass(frozen=True)
class Backend:
    """One ``--target``.

    Attributes:
        path: ``module:function`` that makes it; the module is in this package.
        precisions: what ``--precision`` chooses from; the first is the default.
        packages: modules that its compiler needs beyond those of ``trimkv-edge[export]``.
        install: the command that installs them.
        rounds: precisions whose activations have few bits, so that results cannot be equal.
        runs: an engine of the same name runs its files here. Otherwise it is compiled only: for a device, never run.
        ran: what its files are for and where they were executed.
        left: compute nodes that its compiler leaves to the CPU; an export that finds others fails.
    """

    path: str
    precisions: tuple[str, ...]
    packages: tuple[str, ...] = ()
    install: str = ""
    rounds: tuple[str, ...] = ()
    runs: bool = False
    ran: Ran = NOT_TOLD
    left: str = "none"

    def export(self, job: Job) -> Target:
        """Writes the target into the artefact's folder."""
        module, _, function = self.path.partition(":")
        made: Target = getattr(import_module(f"{__name__}.{module}"), function)(job)
        return made

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [package for package in self.packages if find_spec(package) is None]

    def require(self, name: str) -> None:
        """Raises :class:`~trimkv_edge.errors.TrimKVError` if a package is missing; ``name``: of the target."""
        if missing := self.missing():
            raise TrimKVError(f"--target {name} needs {', '.join(missing)}: {self.install}")


_ARM = "pip install --no-deps tosa-tools==2026.5.0 ethos-u-vela==5.1.0"  # see docs/npu.md for why without dependencies
_COREML = "pip install 'trimkv-edge[coreml]'"
_LITERT = "pip install 'trimkv-edge[litert-export]'"

X86 = "CPU, Linux x86-64"

BACKENDS: dict[str, Backend] = {
    "litert": Backend(
        "litert:export_litert",
        ("fp32",),
        ("litert_torch",),
        _LITERT,
        runs=True,
        ran=Ran("CPUs, through LiteRT", "LiteRT's interpreter", device=X86),
    ),
    "npu:hexagon": Backend(
        "hexagon:export_hexagon",
        ("fp16", "a16w8", "a8w8", "a16w4"),
        ("onnxruntime_qnn",),
        "pip install 'trimkv-edge[hexagon]' (its libraries have Qualcomm's licence, docs/npu.md)",
        ("a16w8", "a8w8", "a16w4"),
        runs=True,
        ran=Ran("Qualcomm's Hexagon NPU, v73 to v79", "Qualcomm's emulator of it", simulates=True),
    ),
    "npu:coreml": Backend(
        "coreml:export_coreml",
        ("fp16", "c4w", "8a8w"),
        ("coremltools",),
        _COREML,
        rounds=("8a8w",),
        ran=Ran("Apple's CoreML, iOS 18"),
        left="none when compiled; Core ML decides on the device",
    ),
    "npu:coreml-stateful": Backend(
        "coreml_stateful:export_coreml_stateful",
        ("fp16", "c4w"),
        ("coremltools",),
        _COREML,
        ran=Ran("Apple's CoreML, iOS 18"),
        left="none when compiled; Core ML decides on the device",
    ),
    "npu:ethos-u85": Backend(
        "ethos_u85:export_ethos_u85",
        ("int8", "a8w4", "a16w8"),
        ("tosa_serializer", "ethosu"),
        _ARM,
        ran=Ran("Arm's Ethos-U85, 256 MACs"),
    ),
    "tosa": Backend(
        "tosa:export_tosa",
        ("fp32", "int8", "a8w4", "a16w8"),
        ("tosa_serializer", "tosa_reference_model"),
        _ARM,
        ("int8", "a8w4", "a16w8"),
        runs=True,
        ran=Ran("what takes Arm's TOSA 1.0", "Arm's reference model of TOSA", simulates=True),
    ),
    "vulkan": Backend("vulkan:export_vulkan", ("fp32", "fp16"), ran=Ran("GPUs of phones, through ExecuTorch")),
}

HOSTS: dict[str, Host] = {
    "web": Host(
        "host-evicted",
        Ran("browsers and Node", "onnxruntime-web (WebAssembly)", device="Chromium and Node, Linux x86-64"),
        "cd examples/web && npm ci --ignore-scripts && npm start -- ../../artefacts/tiny",
    ),
}

# Names that people look for, and why they are not here; docs/npu.md says how each was tried.
UNSUPPORTED: dict[str, str] = {
    "npu:qnn-executorch": "ExecuTorch's Qualcomm backend downloads Qualcomm's SDK while it lowers, and refuses the "
    "libraries of onnxruntime-qnn: use --target npu:hexagon",
    "npu:mediatek": "MediaTek's mtk_converter and mtk_neuron are in no public package index: start from "
    "--target host-evicted with MediaTek's own tools",
    "npu:samsung": "Samsung's Exynos AI SDK is in no public package index: start from --target host-evicted with "
    "Samsung's own tools",
    "npu:vgf": "Arm's model converter for Vulkan needs GLIBCXX_3.4.32, which Debian 12 does not have: --target tosa "
    "makes the graph that it starts from",
    "npu:nxp": "NXP's eIQ Neutron SDK is in no public package index: use --target npu:ethos-u85 for Arm's NPUs",
    "npu:mlx": "ExecuTorch's wheel for Linux lacks the files of its MLX backend: use --target npu:coreml",
    "npu:openvino": "OpenVINO's wheel lacks the compiler for Intel's NPU: use --target onnx on a CPU",
    "npu:cadence": "Cadence's compiler is not public: use --target npu:ethos-u85 for Arm's NPUs",
}
