"""The vision encoder for one static picture size: what depends on the size alone is a constant."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def size_tables(visual: Any, down: int, across: int, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What an encoder needs to know of a size: position embeddings ``[patches, width]``, interpolated from ``table``,
    and cosines and sines ``[patches, head_dim]`` of its rotary embedding."""
    # Exports of text models import this module too, and need none of transformers' vision code.
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

    grid, merge = torch.tensor([[1, down, across]]), visual.config.spatial_merge_size
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid,
        num_grid_per_side=visual.num_grid_per_side,
        mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners,
        spatial_merge_size=merge,
    )
    positions = (table[indices] * weights[:, :, None]).sum(1)
    cos, sin = visual.rotary_pos_emb(positions, get_vision_position_ids(grid, merge))
    return positions, cos, sin


class PictureEncoder(nn.Module):
    """Encodes one image, or one frame group of a video, of a fixed size: all of its patches see each other.

    Args:
        visual: Qwen3-VL's encoder in transformers.
        down, across: size in patches, multiples of the encoder's ``spatial_merge_size``.
        table: values of its position embeddings; default: those it has.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, visual: Any, down: int, across: int, table: Tensor | None = None) -> None:
        super().__init__()
        self.visual = visual
        with torch.no_grad():
            tables = size_tables(visual, down, across, visual.pos_embed.weight if table is None else table)
        for name, made in zip(("positions", "cos", "sin"), tables, strict=True):
            self.register_buffer(name, made)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """``[patches, values]`` -> rows ``[rows, hidden_size]`` (rows are patches / merge^2) and DeepStack features
        ``[features, rows, hidden_size]``."""
        visual = self.visual
        patch = visual.patch_embed.proj  # its kernel is its stride: each patch is one product
        hidden = F.linear(pixel_values, patch.weight.flatten(1), patch.bias) + self.positions
        features = []
        for number, block in enumerate(visual.blocks):
            hidden = hidden + self._attend(block.attn, block.norm1(hidden))
            hidden = hidden + block.mlp(block.norm2(hidden))
            if number in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
                features.append(merger(hidden))
        rows: Tensor = visual.merger(hidden)
        return rows, torch.stack(features) if features else rows.new_zeros(0, *rows.shape)

    def _attend(self, attention: Any, hidden: Tensor) -> Tensor:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

        count = hidden.shape[0]
        query, key, value = attention.qkv(hidden).view(count, 3, attention.num_heads, -1).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, self.cos, self.sin)
        query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
        merged: Tensor = attention.proj(out[0].transpose(0, 1).reshape(count, -1))
        return merged
