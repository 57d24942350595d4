"""Memory between two stages of an export."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Hands freed memory back to the system, so that it does not count beside what the next stage takes: glibc keeps
    what lies between things that are still used."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
        if trim is not None:
            trim(0)
