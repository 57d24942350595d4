"""``npu:coreml-stateful``: graphs that hold keys and values as states of a CoreML model, iOS 18 and macOS 15 on.

A package for Core ML itself. ExecuTorch's runtime gives each method a state of its own and hands none to an app; Core
ML's functions ``decode`` and ``prefill`` work on one ``MLState``, whose buffers an app may read and write.

``past_{i}_key`` and ``past_{i}_value``, ``[1, kv_heads, C, head_dim]``, float16, are states instead of inputs, and
there are no outputs ``new.{i}.X``: a graph attends as in :mod:`trimkv_edge.export.host_evicted`, then writes its rows.
``where`` tells it the slots: in ``decode`` one number, int32 ``[1]``; in ``prefill`` ``[1, 1, C, T]``, 1 where row T
goes to slot C, else 0, so that padding is written nowhere. At an event the host moves rows in the states itself.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from trimkv_edge.config import CacheConfig
from trimkv_edge.export.backends.coreml import round_linears
from trimkv_edge.export.backends.coreml_package import Wanted, read_folder
from trimkv_edge.export.backends.lowering import check_job, quiet, save_report, staged
from trimkv_edge.export.host_evicted import HostEvicted
from trimkv_edge.export.host_files import chunks, save_host, tokens
from trimkv_edge.export.onnx_gates import deferred_sigmoid
from trimkv_edge.export.targets import Job
from trimkv_edge.manifest import Target
from trimkv_edge.models.skeleton import filled

TARGET = "npu:coreml-stateful"
PACKAGE, CONSTANTS, REPORT = "coreml_stateful.mlpackage", "coreml_stateful_host.json", "coreml_stateful_report.json"
_DATA = f"{PACKAGE}/Data/com.apple.CoreML"
# It loses its place where writes follow each other; ours are already where it would put them.
_BROKEN_PASS = "common::canonicalize_inplace_pattern"


class Stateful(nn.Module):
    """A host-evicted graph that holds its cache in buffers.

    Args:
        count: tokens of the graph.
    """

    def __init__(self, module: HostEvicted, config: CacheConfig, count: int) -> None:
        super().__init__()
        self.module, self.count = module, count
        *_, past = module.inputs(config, count)
        self.names = [name.replace(".", "_") for name in module.names()[0] if name.startswith("past.")]
        for name, slots in zip(self.names, past, strict=True):
            self.register_buffer(name, torch.zeros(slots.shape))

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, where: Tensor) -> tuple[Tensor, ...]:
        """Logits and gate logits; see the module for ``where``."""
        states = [self.get_buffer(name) for name in self.names]
        logits, *found = self.module(hidden, cos, sin, mask, states)
        for state, rows in zip(states, found, strict=False):
            if self.count == 1:
                state[:, :, where] = rows
            else:
                state.copy_(state * (1 - where.sum(-1, keepdim=True)) + where @ rows)
        return (logits, *found[len(states) :])

    def inputs(self, config: CacheConfig) -> tuple[Tensor, ...]:
        """Arguments of :meth:`forward`."""
        tables = [torch.zeros(table.shape) for table in self.module.inputs(config, self.count)[:4]]
        slot = torch.zeros(1, dtype=torch.int32)
        return (*tables, slot if self.count == 1 else torch.zeros(1, 1, config.slots, self.count))


def export_coreml_stateful(job: Job) -> Target:
    """Writes the package, what its host needs, and ``coreml_stateful_report.json``: what the model was found to be.

    Raises:
        ConfigError: a setting that a host does not run.
        VerificationError: the model is not what was asked for.
    """
    check_job(TARGET, job.config, job.scheme.weight_bits)
    module = HostEvicted(filled(job.model, job.weights))
    counts = chunks(job.config)
    job.say(f"{TARGET}: compiling for {' and '.join(map(tokens, counts.values()))}")
    with staged(job.folder) as scratch:
        files = save_host(module.model, job.weights, scratch, CONSTANTS)
        wanted = Wanted.stateless(module, job.config, counts, job.ops)
        if job.ops == "c4w":
            round_linears(module)
        graphs = {name: Stateful(module, job.config, count) for name, count in counts.items()}
        with quiet(), tempfile.TemporaryDirectory(dir=scratch.parent) as apart:
            _save(graphs, job.config, scratch / PACKAGE, Path(apart))
        found = read_folder(scratch / PACKAGE)
        found.check(
            wanted.stateful(
                {name: list(graph.inputs(job.config)[-1].shape) for name, graph in graphs.items()},
                {name: list(slots.shape) for name, slots in graphs["decode"].named_buffers(recurse=False)},
            )
        )
        save_report(scratch / REPORT, {"model": asdict(found)})
    program = {"program": f"{_DATA}/model.mlmodel", "weights": f"{_DATA}/weights/weight.bin"}
    return Target(TARGET, job.ops, {**program, "package": f"{PACKAGE}/Manifest.json", "report": REPORT, **files})


def _save(graphs: dict[str, Stateful], config: CacheConfig, package: Path, apart: Path) -> None:
    """Converts each graph, ``apart``, and joins them as functions of one package, which share their weights."""
    from coremltools import utils  # no module of its own

    joined = utils.MultiFunctionDescriptor()
    for name, graph in graphs.items():
        own = apart / f"{name}.mlpackage"
        _converted(_traced(graph, config), graph).save(str(own))
        joined.add_function(str(own), src_function_name="main", target_function_name=name)
    joined.default_function_name = "decode"
    utils.save_multifunction(joined, str(package))
    for path in package.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # coremltools lets nobody else read the model


def _traced(graph: Stateful, config: CacheConfig) -> ExportedProgram:
    with torch.no_grad(), deferred_sigmoid(graph.module.model):
        program = torch.export.export(graph, graph.inputs(config), strict=False).run_decompositions({})
    nodes = program.graph_module.graph
    for node in nodes.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        node.replace_all_uses_with(node.args[0])  # the converter does not know it; Phi-3 has some
        nodes.erase_node(node)
    return program


def _converted(program: ExportedProgram, graph: Stateful) -> Any:
    """One function, with names for what leaves it: a converter of exported programs numbers outputs."""
    import coremltools
    from executorch.backends.apple.coreml.compiler import torch_ops  # noqa: F401 (lets it read 4-bit weights)

    passes = coremltools.PassPipeline.DEFAULT
    passes.remove_passes({_BROKEN_PASS})
    made = coremltools.convert(
        program,
        source="pytorch",
        convert_to="mlprogram",
        minimum_deployment_target=coremltools.target.iOS18,
        compute_precision=coremltools.precision.FLOAT16,
        compute_units=coremltools.ComputeUnit.CPU_AND_NE,
        pass_pipeline=passes,
        skip_model_load=True,
    )
    spec = made.get_spec()
    names = [name.replace(".", "_") for name in graph.module.names()[1] if not name.startswith("new.")]
    for given, name in zip([entry.name for entry in spec.description.output], names, strict=True):
        coremltools.utils.rename_feature(spec, given, name, rename_inputs=False)
    return coremltools.models.MLModel(spec, weights_dir=made.weights_dir, skip_model_load=True)
