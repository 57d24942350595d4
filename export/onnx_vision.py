"""What an ONNX target has beside the decoder for models that read pictures.

``decoder.onnx`` reads rows: ``embeddings`` float32 ``[1, T, hidden_size]``, ``positions`` int64 ``[3, T]`` (M-RoPE)
and, where the model has them, ``deepstack`` float32 ``[features, T, hidden_size]`` with zeros at text. They come from

=================== ============================================== ==============================================
``embed.onnx``      ``input_ids`` int64 ``[1, T]``                 ``embeddings`` float32 ``[1, T, hidden_size]``
``vision-HxW.onnx`` ``pixel_values`` float32 ``[patches, values]`` ``rows`` float32 ``[rows, hidden_size]``,
                                                                   ``features`` ``[features, rows, hidden_size]``
=================== ============================================== ==============================================

A vision graph is for one size of H x W patches; all of them read their weights from one file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import nn

from trimkv_edge.errors import ConfigError
from trimkv_edge.export.onnx_data import save_with_data
from trimkv_edge.export.onnx_rewrite import clean
from trimkv_edge.export.onnx_trace import trace
from trimkv_edge.export.onnx_weights import Stored, fill
from trimkv_edge.export.quantization.base import Scheme
from trimkv_edge.export.resume import Numbers
from trimkv_edge.models.family import text_decoder, vision_encoder
from trimkv_edge.models.picture_encoder import PictureEncoder
from trimkv_edge.models.pictures import Embed, GatedVisionModel
from trimkv_edge.models.skeleton import Weights

EMBED, EMBED_DATA, VISION_DATA = "embed.onnx", "embed.onnx.data", "vision.onnx.data"
_POSITIONS = "base.model.visual.pos_embed.weight"


def check_scheme(scheme: Scheme) -> None:
    """Raises :class:`ConfigError` for what a model that reads pictures cannot have."""
    if scheme.float_bits == 16:
        raise ConfigError(
            f"--quant {scheme.name} computes in {scheme.dtype}, and models that read pictures compute in float32 here: "
            "use none, int8 or int4"
        )


def save_embed(model: GatedVisionModel, chunk: int, folder: Path, opset: int) -> dict[str, str]:
    """Writes ``embed.onnx`` and its data.

    Args:
        model: prepared (:func:`~trimkv_edge.export.onnx_weights.prepare`).
        chunk: most tokens of a chunk.
        folder: where to.
        opset: of ONNX.

    Returns:
        files by role.
    """
    module = Embed(text_decoder(model.base).embed_tokens)
    size = min(chunk, 3)
    tokens = {1: torch.export.Dim("T", min=1, max=chunk)} if size > 1 else None
    ids = torch.zeros(1, size, dtype=torch.int64)
    program = trace(module, (ids,), ["input_ids"], ["embeddings"], opset, {"input_ids": tokens})
    fill(program.model.graph, module)
    save_with_data(program.model, folder / EMBED, EMBED_DATA, Numbers())
    _finish(folder / EMBED)
    return {"embed": EMBED, "embed_data": EMBED_DATA}


def vision_role(size: tuple[int, int]) -> str:
    """Role of the graph for pictures of so many patches (down, across); its file has the same name."""
    return f"vision-{size[0]}x{size[1]}"


def save_vision(
    model: GatedVisionModel,
    weights: Weights,
    sizes: Sequence[tuple[int, int]],
    folder: Path,
    opset: int,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Writes a graph for each size, and ``vision.onnx.data``; arguments and result as of :func:`save_embed`.

    Args:
        weights: values of the model's parameters, float32.
        sizes: (patches down, patches across).
        say: called with one line per graph.
    """
    visual, table = vision_encoder(model.base), weights(_POSITIONS)
    assert visual is not None
    values = visual.patch_embed.proj.weight[0].numel()
    files, first = {"vision_data": VISION_DATA}, dict[str, ir.TensorProtocol]()
    for number, size in enumerate(sizes):
        role = vision_role(size)
        say(f"onnx: vision encoder for {size[0]} x {size[1]} patches")
        encoder = PictureEncoder(visual, *size, table)
        pixels = torch.zeros(size[0] * size[1], values)
        made = trace(encoder, (pixels,), ["pixel_values"], ["rows", "features"], opset).model
        path = folder / f"{role}.onnx"
        if number == 0:
            fill(made.graph, encoder)
            save_with_data(made, path, VISION_DATA, Numbers())
            first = {name: _held(value) for name, value in made.graph.initializers.items()}
        else:
            _share(made.graph, first, _streamed(encoder))
            ir.save(made, path)
        _finish(path)
        files[role] = path.name
    return files


def _share(graph: ir.Graph, first: Mapping[str, ir.TensorProtocol], streamed: Collection[str]) -> None:
    """Lets weights point at the file that the first graph's are in; what depends on the size stays in the graph."""
    for name, value in graph.initializers.items():
        known = first.get(name)
        if isinstance(known, ir.ExternalTensor) and (name in streamed or known.tobytes() == _held(value).tobytes()):
            value.const_value = known


def _streamed(encoder: nn.Module) -> set[str]:
    """Names of large weights, whose values are not in memory."""
    stored = ((path, module) for path, module in encoder.named_modules() if isinstance(module, Stored))
    return {f"{path}.{name}" for path, module in stored for name in module.sources}


def _held(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _finish(path: Path) -> None:
    graph = onnx.load(path, load_external_data=False)
    clean(graph)
    onnx.save(graph, path)
    onnx.checker.check_model(path)
