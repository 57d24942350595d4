"""The network on a batch of training rows: pictures in groups of one size, then the decoder."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimkv_edge.models.attention import BACKEND_KEYWORD
from trimkv_edge.models.tiny_vl.batches import Batch
from trimkv_edge.models.tiny_vl.dialogues import ROW
from trimkv_edge.models.tiny_vl.network import encode
from trimkv_edge.models.tiny_vl.patches import cut_many


def embed(model: Any, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Hidden states [B,T,hidden] with pictures in place, which are their rows, and DeepStack [rows, hidden]."""
    visual = model.model.visual
    hidden = model.model.language_model.embed_tokens(batch.ids)
    mask = batch.kinds == ROW
    if not batch.shown:
        return hidden, mask, []
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, (_, picture) in enumerate(batch.shown):
        groups[picture.height, picture.width].append(number)
    rows: list[Tensor] = [torch.empty(0)] * len(batch.shown)
    for numbers in groups.values():
        patches, down, across = cut_many(np.stack([batch.shown[number][1].pixels for number in numbers]))
        made, deep = encode(visual, patches, down, across)
        for at, number in enumerate(numbers):
            rows[number] = torch.cat([made[at][None], deep[:, at]])
    # `shown` is in the order of the rows of the batch and of their tokens, and so is the mask.
    joined = torch.cat(rows, 1)
    hidden = hidden.masked_scatter(mask[..., None], joined[0])
    return hidden, mask, list(joined[1:])


def last_hidden(model: Any, batch: Batch, embedded: tuple[Tensor, Tensor, list[Tensor]], backend: Any = None) -> Tensor:
    """The decoder's normed output [B,T,hidden]; `backend` for a model with gates."""
    hidden, mask, deepstack = embedded
    more = {} if backend is None else {BACKEND_KEYWORD: backend}
    out: Tensor = model.model.language_model(
        inputs_embeds=hidden,
        position_ids=batch.positions,
        use_cache=False,
        visual_pos_masks=mask if deepstack else None,
        deepstack_visual_embeds=deepstack or None,
        **more,
    ).last_hidden_state
    return out
