"""Training rows: token ids with the place, the weight and the skipped stretch of each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One row of training data.

    Attributes:
        ids: token ids.
        index: place of each token in its stream, increasing; None is 0, 1, 2, ...
        weight: weighs the prediction of each token; None is 1 for all.
        skip: (start, end, resume, gap): `gap` tokens were left out before row place `resume`, and tokens
            `start..end` of the row stand for them in the capacity loss. Gap 0 is no skip.
    """

    ids: Sequence[int]
    index: Sequence[int] | None = None
    weight: Sequence[float] | None = None
    skip: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass
class Rows:
    """Rows of at most `length` tokens, held compactly (ids as int32).

    Attributes:
        length: tokens that each row is padded to.
        kind: ``text``, ``chat`` or ``rows``.
    """

    length: int
    kind: str
    ids: list[Tensor] = field(default_factory=list)
    index: dict[int, Tensor] = field(default_factory=dict)
    weight: dict[int, Tensor] = field(default_factory=dict)
    skips: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, row: Row) -> None:
        """Appends a row; what passes `length` is cut."""
        number = len(self.ids)
        self.ids.append(torch.tensor(list(row.ids[: self.length]), dtype=torch.int32))
        if row.index is not None:
            self.index[number] = torch.tensor(list(row.index[: self.length]), dtype=torch.int64)
        if row.weight is not None:
            self.weight[number] = torch.tensor(list(row.weight[: self.length]), dtype=torch.float32)
        if row.skip[3]:
            self.skips[number] = row.skip

    @property
    def tokens(self) -> int:
        """Tokens in all rows, padding not counted."""
        return sum(len(ids) for ids in self.ids)

    def item(self, number: int) -> Batch:
        """Row `number`: ids, index [length] int64, weight [length] float32 (0 on padding and on the first token, which
        nothing predicts), skips [4] and held [] int64: how many tokens are not padding."""
        ids = self.ids[number].long()
        held = len(ids)
        index = self.index.get(number, torch.arange(held))
        weight = self.weight.get(number, torch.ones(held)).clone()
        weight[0] = 0.0
        spare = self.length - held
        return {
            "input_ids": torch.cat([ids, ids.new_zeros(spare)]),
            "index": torch.cat([index, index[-1] + 1 + torch.arange(spare)]),
            "weight": torch.cat([weight, torch.zeros(spare)]),
            "skips": torch.tensor(self.skips.get(number, (0, 0, 0, 0)), dtype=torch.int64),
            "held": torch.tensor(held),
        }

    def sha256(self) -> str:
        """Hash over all rows in order: what a resumed run must share."""
        digest = hashlib.sha256(f"{self.length} {self.kind}".encode())
        for number, ids in enumerate(self.ids):
            digest.update(f" {number} {len(ids)} {self.skips.get(number)}".encode())
            for tensor in (ids, self.index.get(number), self.weight.get(number)):
                digest.update(b"-" if tensor is None else tensor.numpy().tobytes())
        return digest.hexdigest()


class Shuffled(Dataset[Batch]):
    """`count` draws from rows: whole shuffled passes over them, one after the other.

    The order follows from the seed alone, so it is the same however the work is divided over processes, accumulation
    and resumed runs.
    """

    def __init__(self, rows: Rows, count: int, seed: int) -> None:
        self.rows = rows
        self.count = count
        self.seed = seed
        self._pass = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Batch:
        number, offset = divmod(place, len(self.rows))
        if number != self._pass:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            self._order, self._pass = torch.randperm(len(self.rows), generator=generator).tolist(), number
        return self.rows.item(self._order[offset])


def collate(items: list[Batch]) -> Batch:
    """Stacks items along a new first dimension."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
