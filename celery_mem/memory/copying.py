"""Copies of large buffers, in huge pages where there are: a fresh small page costs more than to fill it."""

from __future__ import annotations

import mmap
from typing import Any

HUGE_LEAST = 4 << 20
"""Smaller copies hold too few huge pages to be worth a mapping."""
_FLAGS = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
_HUGE = getattr(mmap, "MADV_HUGEPAGE", None)


def copy_of(view: memoryview) -> Any:
    """Return a writable copy of a flat view."""
    if _HUGE is None or view.nbytes < HUGE_LEAST:
        return bytearray(view)
    memory = mmap.mmap(-1, view.nbytes, flags=_FLAGS)
    try:
        memory.madvise(_HUGE)
    except OSError:  # a kernel without them
        pass
    memoryview(memory)[:] = view
    return memory
