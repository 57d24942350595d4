"""The capacity loss of retention gates (TRIM-KV, arXiv 2512.03324; DBTrimKV, arXiv 2605.09649)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_edge.errors import ConfigError

SCOPES = ("head", "global")
FORMS = ("paper", "code")


def capacity(
    held: Tensor, index: Tensor, memory: float, scope: str = "head", form: str = "paper", valid: Tensor | None = None
) -> Tensor:
    """What is held above the budget.

    ``paper``: mean over t of ``max(0, S_t - M) / t``, averaged over layers and heads; ``global`` compares the sum over
    all layers and heads with ``M * L * H``, stated per entry of the pool. ``code`` (the authors' repository):
    ``max(0, (S - M) / max(t - M, 1))`` with t from 0, averaged over the places where it is positive.

    Args:
        held: ``[L, B, H, T]``, see :func:`trimkv_edge.training.retained.retained`.
        index: int64 ``[B, T]``, the formula's t - 1 for each token: its place in the row.
        memory: budget M per head (``global``: on average).
        scope: one budget per head, or one for all.
        form: normalisation.
        valid: bool ``[B, T]``, False for padding; at least one True per row.

    Returns:
        ``[B]``, one loss per row.

    Raises:
        ConfigError: unknown scope or form.
    """
    if scope not in SCOPES or form not in FORMS:
        raise ConfigError(f"capacity scope {scope!r}, form {form!r}: use one of {SCOPES} and one of {FORMS}")
    least = 1.0
    if scope == "global":
        least = 1.0 / (held.shape[0] * held.shape[2])  # the pool's least divisor is 1, and all is stated per entry
        held = held.mean((0, 2), keepdim=True)
    over = held - memory
    keep = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
    keep = keep[:, None].expand(held.shape)
    place = index[:, None].to(held.dtype)
    if form == "paper":
        each = torch.where(keep, F.relu(over) / (place + 1), 0.0)
        return each.sum((0, 2, 3)) / keep.sum((0, 2, 3))
    each = torch.where(keep, F.relu(over / (place - memory).clamp(min=least)), 0.0)
    return each.sum((0, 2, 3)) / (each > 0).sum((0, 2, 3)).clamp(min=1)
