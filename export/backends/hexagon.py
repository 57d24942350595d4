"""``npu:hexagon``: host-evicted graphs, compiled for Qualcomm's HTP by onnxruntime-qnn; each whole, as one context, or
as few as hold its weights.

The files are what ONNX Runtime's QNN provider loads on a phone: a graph of one node, and the binary that it names.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from torch import nn

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import ConfigError, VerificationError, first_line
from trimkv_edge.export.backends.calibration import MASKED_IN_BITS
from trimkv_edge.export.backends.hexagon_float16 import for_float16
from trimkv_edge.export.backends.hexagon_shards import cut, shards_needed
from trimkv_edge.export.backends.lowering import quiet
from trimkv_edge.export.host_evicted import CONSTANTS, GRAPHS, export_host_evicted
from trimkv_edge.export.host_files import EMBEDDING, chunks, tokens
from trimkv_edge.export.quantization import SCHEMES
from trimkv_edge.export.tokenizer import sample_tokens
from trimkv_edge.hexagon import DEFAULT_SOC, FORMAT, HexagonInfo, check_shards, find_soc, shard_role
from trimkv_edge.host_border import Encoding
from trimkv_edge.host_cache import MASKED
from trimkv_edge.host_constants import load_constants
from trimkv_edge.manifest import Target
from trimkv_edge.runtime.engines.qnn_emulator import htp_options, qairt_version, quiet_output

if TYPE_CHECKING:
    from trimkv_edge.export.targets import Job
    from trimkv_edge.models.gated import GatedModel

TARGET, ENGINE = "npu:hexagon", "qnn-emulator"
PRECISIONS = ("fp16", "a16w8", "a8w8", "a16w4")
INFO, HOST = "hexagon.json", "hexagon_host.json"
_EVENTS = 8


def check_hexagon(config: CacheConfig, precision: str, soc: str = DEFAULT_SOC) -> None:
    """Raises :class:`ConfigError` for what cannot be compiled, and
    :class:`~trimkv_edge.errors.TrimKVError` without onnxruntime-qnn."""
    find_soc(soc)
    if precision not in PRECISIONS:
        raise ConfigError(f"{TARGET} has no precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    if config.policy == "keydiff" and precision != "fp16":
        raise ConfigError(f"policy keydiff compares keys, which {precision} keeps as integers: use --precision fp16")
    qairt_version()


def export_hexagon(job: Job) -> Target:
    """Writes the compiled graphs, the embedding's rows and what their host needs.

    Args:
        job: ``ops`` is the precision; ``soc`` the chip, a key of :data:`~trimkv_edge.hexagon.SOCS`.

    Raises:
        ConfigError: as :func:`check_hexagon`, or more shards than layers.
        VerificationError: the compiler left a part of a graph to the CPU.
    """
    config, precision, soc = job.config, job.ops, job.soc or DEFAULT_SOC
    check_hexagon(config, precision, soc)
    if job.shards is not None:
        check_shards(job.shards, job.model.config.num_hidden_layers)
    masked = MASKED if precision == "fp16" else MASKED_IN_BITS
    with tempfile.TemporaryDirectory(prefix=".hexagon-", dir=job.folder) as temporary:
        work = Path(temporary)
        export_host_evicted(
            job.model,
            config,
            work,
            scheme=SCHEMES["none"],
            weights=job.weights,
            masked=masked,
            numbers=job.numbers(),
            progress=job.say,
        )
        counts = chunks(config)
        graphs = {count: work / GRAPHS[role] for role, count in counts.items()}
        encodings: dict[str, Encoding] = {}
        if precision == "fp16":
            graphs = {count: for_float16(path, work / f"float16_{path.name}") for count, path in graphs.items()}
        else:
            graphs, encodings = _quantised(job, graphs, work, masked)
        files = {"info": INFO, "constants": HOST, "embedding": EMBEDDING}
        made = work / "made"
        made.mkdir()
        layers = job.model.config.num_hidden_layers
        shards = job.shards or shards_needed(*_weight_bytes(job.model, precision), layers)
        for role, count in counts.items():
            for part, path in enumerate(cut(graphs[count], layers, shards)):
                which = f", part {part + 1} of {shards}" if shards > 1 else ""
                job.say(f"{TARGET}: compiling the graph for {tokens(count)}{which} ({soc}, {precision})")
                files |= _compile(path, made, shard_role(role, part), soc)
        os.replace(work / EMBEDDING, made / EMBEDDING)
        os.replace(work / CONSTANTS, made / HOST)
        HexagonInfo(FORMAT, precision, soc, qairt_version(), encodings).save(made / INFO)
        for name in files.values():
            os.replace(made / name, job.folder / name)
    return Target(ENGINE, precision, files)


def _weight_bytes(model: GatedModel, precision: str) -> tuple[int, int]:
    """Compiled: of the linear layers in one layer, and of the output layer."""
    from trimkv_edge.export.backends.hexagon_quantize import RECIPES, weight_bits

    def size(module: nn.Module, prefix: str = "") -> int:
        linear = ((name, part) for name, part in module.named_modules(prefix=prefix) if isinstance(part, nn.Linear))
        wide = 16 if precision == "fp16" else 0
        return sum(part.weight.numel() * (wide or weight_bits(name, RECIPES[precision])) for name, part in linear) // 8

    return size(model.base.model.layers[0]), size(model.base.lm_head, "lm_head")


def _quantised(
    job: Job, graphs: dict[int, Path], work: Path, masked: float
) -> tuple[dict[int, Path], dict[str, Encoding]]:
    from trimkv_edge.export.backends.hexagon_quantize import RECIPES, Float, measure, quantise

    config, constants = job.config, load_constants(work / CONSTANTS)
    width = job.model.config.hidden_size
    embedding = np.memmap(work / EMBEDDING, "<f4", "r").reshape(-1, width)
    # Text from far from where verification reads, and any tokens, as for int8 caches.
    count = config.budget + _EVENTS * config.buffer
    text = sample_tokens(job.folder, job.tokenizer, embedding.shape[0], 16 * count)[-count:]
    mixed = sample_tokens(job.folder, None, embedding.shape[0], 2 * count)[-count:]
    job.say(f"{TARGET}: ranges of all tensors over {2 * count} tokens")
    model = Float(graphs, config, embedding, constants.rotary, masked)
    ranges = measure(model, [*text, *mixed], work)
    found: dict[int, Path] = {}
    encodings: dict[str, Encoding] = {}
    for chunk, path in graphs.items():
        found[chunk] = work / f"quantised_{path.name}"
        with quiet():
            own = quantise(path, found[chunk], ranges[chunk], RECIPES[job.ops])
        differ = [name for name in own if encodings.get(name, own[name]) != own[name]]
        kept = [name for name in own if name.startswith("past.") and own[name] != own[name.replace("past.", "new.")]]
        if differ or kept:
            raise VerificationError(
                f"encodings of {', '.join(differ or kept)} are not the same everywhere: report this with the model's "
                "name and settings"
            )
        encodings |= own
    return found, encodings


def _compile(source: Path, folder: Path, role: str, soc: str) -> dict[str, str]:
    """Writes ``hexagon_ROLE.onnx`` and its binary, and returns both by role."""
    import onnxruntime as ort

    name = f"hexagon_{role}.onnx"
    options = htp_options(soc)
    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_file_path", str(folder / name))
    options.add_session_config_entry("ep.context_embed_mode", "0")
    try:
        with quiet_output():
            ort.InferenceSession(str(source), options)
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise VerificationError(
            f"{role} does not compile for {soc} with QAIRT {qairt_version()} ({first_line(error)}): try another "
            "precision or SoC, or report this with the model's name and settings"
        ) from error
    return {role: name, f"{role}_context": one_context(folder / name)}


def one_context(path: Path) -> str:
    """Name of the binary that a compiled graph is; it lies beside it.

    Raises:
        VerificationError: the graph is more than one context, so a part was left to the CPU.
    """
    nodes = onnx.load(path, load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    if kinds != ["EPContext"]:
        raise VerificationError(f"{path.name} has nodes {', '.join(kinds)}, but one context must hold all of them")
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in nodes[0].attribute}
    return str(attributes["ep_cache_context"].decode())
