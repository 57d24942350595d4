"""What an ExecuTorch target has beside the decoder for models that read pictures.

In ``model.pte``, ``forward`` reads rows, and one more method makes them of token ids; all else is as in
:mod:`trimkv_edge.export.executorch`:

=========== ======================================================================================
``embed``   input_ids int64 [1, T] -> embeddings float32 [1, T, hidden_size]
``forward`` embeddings float32 [1, T, hidden_size], positions int64 [3, T] (M-RoPE), deepstack float32 [features, T,
            hidden_size] (zeros at text), live int64 [1] -> logits float32 [1, 1, vocabulary], x_0, ..., x_{L-1}
=========== ======================================================================================

``vision.pte`` has a method for each picture size of H x W patches, over one set of weights:

============== ===================================================================================
``encode_HxW`` pixel_values float32 [patches, values] -> rows float32 [rows, hidden_size], deepstack float32 [features,
               rows, hidden_size]
============== ===================================================================================

A model without DeepStack features has no ``deepstack`` in either: ExecuTorch plans no empty tensors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from trimkv_edge.export.executorch_attention import Step
from trimkv_edge.export.executorch_quantize import Late, Zeros
from trimkv_edge.models.family import text_decoder, vision_encoder
from trimkv_edge.models.picture_encoder import PictureEncoder
from trimkv_edge.models.pictures import Embed, GatedVisionModel
from trimkv_edge.models.rope import mrope_axes
from trimkv_edge.models.skeleton import Weights, parameter_slots

VISION = "vision.pte"
_VISUAL = "base.model.visual"
# Numbers in the largest table of an encoder's attention: 64 MiB.
_PAIRS = 2**24


def decoder_part(model: GatedVisionModel) -> GatedVisionModel:
    """The same model without its encoder, and with rotary angles in operators that need no copies; names stay."""
    made = _shallow(model)
    made.base = _shallow(model.base)
    made.base.model = _shallow(model.base.model)
    del made.base.model.visual
    decoder = made.base.model.language_model = _shallow(text_decoder(model.base))
    decoder.rotary_emb = _MixedRotary(decoder.rotary_emb)
    return made


def _shallow(module: Any) -> Any:
    """A copy whose children can be replaced."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made


class _MixedRotary(nn.Module):
    """Cosines and sines of M-RoPE; transformers writes the axes into each other in place.

    Args:
        rotary: transformers' own.
    """

    axes: Tensor
    inv_freq: Tensor

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.register_buffer("axes", mrope_axes(rotary))
        self.register_buffer("inv_freq", rotary.inv_freq.float())
        self.scaling = rotary.attention_scaling

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 ``[3, 1, T]`` -> ``[1, T, head_dim]`` each."""
        chosen = torch.index_select(positions[:, 0], 0, self.axes).t()
        angles = chosen.float() * self.inv_freq
        angles = torch.cat((angles, angles), -1)[None]
        return angles.cos() * self.scaling, angles.sin() * self.scaling


class RowsForward(nn.Module):
    """``(embeddings, positions, deepstack, live) -> logits``, and what gates read; arguments as for
    :class:`~trimkv_edge.export.executorch_attention.Forward`."""

    def __init__(
        self, model: GatedVisionModel, cache: nn.Module, make_step: Callable[[Any, Tensor, int], Step], *, gated: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.cache = cache
        self.make_step = make_step
        self.gated = gated

    def forward(self, embeddings: Tensor, positions: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *deepstack, live = rest
        step = self.make_step(self.cache, live, embeddings.shape[1])
        rows = deepstack[0] if deepstack else embeddings.new_zeros(0)
        logits = self.model.decode_rows(embeddings, positions, rows, step)
        return logits, *(step.read if self.gated else ())


def trace_rows(forward: RowsForward, most: int) -> dict[str, ExportedProgram]:
    """``torch.export`` of ``forward`` and ``embed``, for chunks of up to ``most`` tokens."""
    model, chunk = forward.model, min(most, 3)
    width, features = model.config.hidden_size, model.features
    moving = {1: Dim("T", min=1, max=most)} if chunk > 1 else None
    rows = [torch.zeros(1, chunk, width), torch.zeros(3, chunk, dtype=torch.int64)]
    rows += [torch.zeros(features, chunk, width)] if features else []
    embed = Embed(text_decoder(model.base).embed_tokens)
    first, second, *deepstack = [moving] * len(rows)
    return {
        "forward": export(
            forward,
            (*rows, torch.zeros(1, dtype=torch.int64)),
            dynamic_shapes=(first, second, (*deepstack, None)),
            strict=False,
        ),
        "embed": export(embed, (torch.zeros(1, chunk, dtype=torch.int64),), dynamic_shapes=(moving,), strict=False),
    }


class Encoders(NamedTuple):
    """Traced encoders.

    Attributes:
        visual: what they share; the weights of its linear layers may be missing.
        late: those, by module name.
        programs: by method.
    """

    visual: nn.Module
    late: dict[str, Late]
    programs: dict[str, ExportedProgram]


def encode_method(size: tuple[int, int]) -> str:
    """Method for pictures of so many patches (down, across)."""
    return f"encode_{size[0]}x{size[1]}"


def trace_encoders(
    model: GatedVisionModel, weights: Weights, sizes: Sequence[tuple[int, int]], *, late: bool
) -> Encoders:
    """``torch.export`` of the encoder for each size.

    Args:
        model: hollow or not.
        weights: its float32 values by parameter name.
        sizes: (patches down, patches across).
        late: leave the weights of linear layers out.
    """
    visual = vision_encoder(model.base)
    assert visual is not None
    zeros, memo, missing = Zeros(), dict[int, Any](), dict[str, Late]()
    for name, owner, own in parameter_slots(visual):
        parameter, full = getattr(owner, own), f"{_VISUAL}.{name}"
        hollow = late and isinstance(owner, nn.Linear) and own == "weight"
        if hollow:
            missing[name.rpartition(".")[0]] = Late(partial(_weight, weights, full), parameter.numel() * 4)
        value = zeros(tuple(parameter.shape), torch.float32) if hollow else weights(full)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    made = copy.deepcopy(visual, memo).eval()
    patch = made.patch_embed.proj
    # A matrix in the file: XNNPACK takes no view of a weight.
    patch.weight = nn.Parameter(patch.weight.flatten(1), requires_grad=False)
    values = patch.weight.shape[1]
    programs = {}
    with torch.no_grad():
        for size in sizes:
            pixels = torch.zeros(size[0] * size[1], values)
            traced = export(_Encoder(made, *size), (pixels,), strict=False)
            programs[encode_method(size)] = traced.run_decompositions(_DECOMPOSED)
    return Encoders(made, missing, programs)


def _weight(weights: Weights, name: str) -> dict[str, Tensor]:
    return {"weight": nn.Parameter(weights(name), requires_grad=False)}


class _Encoder(PictureEncoder):
    """Gives no DeepStack features where there are none."""

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        rows, features = super().forward(pixel_values)
        return (rows, features) if features.shape[0] else (rows,)


def _attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float, **__: Any) -> Tensor:
    """``[1, heads, patches, width]`` -> the same, all patches seeing each other; as many heads at once as ``_PAIRS``
    allows. ExecuTorch's own form looks for rows that see nothing, which takes longer than the attention."""
    heads, patches = query.shape[1:3]
    query, key, value = ((query * scale)[0], key[0], value[0])
    out = []
    for start in range(0, heads, step := max(1, _PAIRS // patches**2)):
        some = slice(start, start + step)
        weights = torch.softmax(torch.bmm(query[some], key[some].transpose(1, 2)), dim=-1)
        out.append(torch.bmm(weights, value[some]))
    return (torch.cat(out) if len(out) > 1 else out[0])[None]


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """The form with tanh, as a sigmoid that XNNPACK computes exactly enough; the other one stays as it is."""
    if approximate != "tanh":
        return NotImplemented
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


_DECOMPOSED = {
    torch.ops.aten.scaled_dot_product_attention.default: _attend,
    torch.ops.aten.gelu.default: _gelu,
}


def picture_constants(model: GatedVisionModel, sizes: Sequence[tuple[int, int]]) -> dict[str, int | list[int]]:
    """Constant methods of both programs; sizes are one list, down and across in turns."""
    return {
        "get_trimkv_hidden_size": model.config.hidden_size,
        "get_trimkv_features": model.features,
        "get_trimkv_picture_sizes": [side for size in sizes for side in size],
    }
