"""Memory that the stages of an export leave behind."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Frees graphs, which are cycles, and hands freed memory back to the system, so that it does not count beside what
    the next stage takes."""
    gc.collect()
    trim()


def trim() -> None:
    """Hands freed memory back: glibc keeps what lies between things that are still used."""
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
        if malloc_trim is not None:
            malloc_trim(0)
