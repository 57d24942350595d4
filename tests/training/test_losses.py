"""The capacity loss, both normalisations and both scopes, against loops over the formulas."""

from __future__ import annotations

import pytest
import torch

from trimkv_edge.errors import ConfigError
from trimkv_edge.training.losses import capacity

L, B, H, T = 2, 3, 2, 6


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Held entries, places (row 2 jumps), validity (row 1 ends with padding)."""
    held = 5 * torch.rand(L, B, H, T, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    index = torch.arange(T).repeat(B, 1)
    index[2, 3:] += 40
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, 4:] = False
    return held, index, valid


def loop(row: int, memory: float, scope: str, form: str) -> float:
    held, index, valid = inputs()
    values = []
    for t in range(T):
        if not valid[row, t]:
            continue
        place = int(index[row, t])
        cells = [float(held[layer, row, head, t]) for layer in range(L) for head in range(H)]
        if scope == "global":
            pool, limit, places = sum(cells), memory * L * H, place * L * H
            if form == "paper":
                values.append(max(0.0, pool - limit) / (place + 1) / (L * H))
            else:
                values.append(max(0.0, (pool - limit) / max(places - limit, 1)))
        else:
            for cell in cells:
                scale = place + 1 if form == "paper" else max(place - memory, 1)
                values.append(max(0.0, cell - memory) / scale)
    if form == "code":
        values = [value for value in values if value > 0] or [0.0]
    return sum(values) / len(values)


@pytest.mark.parametrize("memory", [1.0, 2.5, 4.0, 100.0])
@pytest.mark.parametrize("scope", ["head", "global"])
@pytest.mark.parametrize("form", ["paper", "code"])
def test_capacity(memory: float, scope: str, form: str) -> None:
    held, index, valid = inputs()
    got = capacity(held, index, memory, scope, form, valid)
    assert got.tolist() == pytest.approx([loop(row, memory, scope, form) for row in range(B)], rel=1e-9)


def test_nothing_above_the_budget_costs_nothing_and_has_a_gradient() -> None:
    held = torch.ones(1, 1, 1, 4, requires_grad=True)
    for form in ("paper", "code"):
        loss = capacity(held, torch.arange(4)[None], 2.0, "head", form).sum()
        loss.backward()
        assert loss.item() == 0.0
        assert not held.grad.any()


@pytest.mark.parametrize(("scope", "form"), [("heads", "paper"), ("head", "papers")])
def test_unknown_settings(scope: str, form: str) -> None:
    with pytest.raises(ConfigError, match="use one of"):
        capacity(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, dtype=torch.int64), 1.0, scope, form)
