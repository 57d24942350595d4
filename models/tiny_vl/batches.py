"""Batches of mixed dialogues, and their M-RoPE positions."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimkv_edge.models.tiny.data import MAX_POSITIONS, jumping_positions
from trimkv_edge.models.tiny_vl.dialogues import Mixed, Shown


class Batch(NamedTuple):
    """Rows for the network: ids and kinds int64 [B,T], positions int64 [3,B,T], and the pictures in the order of rows
    and tokens, each with its row."""

    ids: Tensor
    kinds: Tensor
    positions: Tensor
    shown: list[tuple[int, Shown]]


def positions_of(dialogue: Mixed, offsets: np.ndarray) -> np.ndarray:
    """M-RoPE positions int64 [3,T], with `offsets` [T] added, which never change inside a picture."""
    length = len(dialogue.ids)
    out = np.empty((3, length), np.int64)
    at = position = 0
    for picture in [*dialogue.shown, None]:
        end = picture.start if picture else length
        out[:, at:end] = np.arange(position, position + end - at)
        position, at = position + end - at, end
        if picture:
            row = np.arange(picture.height * picture.width)
            out[:, at : at + len(row)] = position + np.stack([0 * row, row // picture.width, row % picture.width])
            position, at = position + max(picture.height, picture.width), at + len(row)
    return out + offsets


def to_batch(rng: random.Random, dialogues: list[Mixed], jump_share: float, span: int = MAX_POSITIONS) -> Batch:
    """Rows of one length; a `jump_share` of them gets jumping positions as in `tiny.data.to_batch`."""
    length = len(dialogues[0].ids)
    positions = []
    for dialogue in dialogues:
        offsets = np.zeros(length, np.int64)
        if rng.random() < jump_share:
            wide = max(int(length * (span / length) ** rng.random()), length)
            inner = [place for place in dialogue.breaks if 0 < place < length]
            offsets = np.array(jumping_positions(rng, inner, length, wide)) - np.arange(length)
        positions.append(positions_of(dialogue, offsets))
    shown = [(row, picture) for row, dialogue in enumerate(dialogues) for picture in dialogue.shown]
    ids, kinds = (torch.tensor([getattr(dialogue, name) for dialogue in dialogues]) for name in ("ids", "kinds"))
    return Batch(ids, kinds, torch.from_numpy(np.stack(positions, 1)), shown)
