"""Memory of mapped weight files that nobody looks at again."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil

_MADV_DONTNEED = 4


def release_mapped(folder: Path) -> int:
    """Takes the pages of mapped files below ``folder`` out of this process; who reads one again gets it from the file.

    An engine maps its weights, packs most of them into memory of its own and does not read those again, but their pages
    stay: 450 MiB with Phi-3-mini in 4 bits. Mappings that were written to, which have pages of no file, are left alone.
    No engine of this folder may close meanwhile, because its addresses could become somebody else's.

    Returns:
        Bytes that were released; 0 where the system is not Linux.
    """
    if sys.platform != "linux":
        return 0
    advise, within, released = ctypes.CDLL(None).madvise, folder.resolve(), 0
    for mapping in psutil.Process().memory_maps(grouped=False):
        if not Path(mapping.path).is_relative_to(within) or mapping.anonymous:
            continue
        start, end = (int(address, 16) for address in mapping.addr.split("-"))
        if advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED) == 0:
            released += mapping.rss
    return released
