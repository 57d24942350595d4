"""The ordinary cache: nothing ever leaves, so the budget has to hold the whole stream."""

from __future__ import annotations

from torch import Tensor

from trimkv_edge.config import CacheConfig
from trimkv_edge.errors import BudgetError
from trimkv_edge.policies.base import Entries, Policy


def _score(entries: Entries, config: CacheConfig) -> Tensor:
    raise BudgetError(
        f"the full cache holds {config.slots} entries per head, and all are taken: raise the budget to the length of "
        "the stream, or choose a policy that evicts"
    )


POLICY = Policy("full", _score, evicts=False)
