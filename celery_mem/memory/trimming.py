"""Free memory that the C library keeps: results are large, and what they leave in the heap is nobody's."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Give the system back what is free in the heap; does nothing where the C library cannot."""
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    try:
        return ctypes.CDLL(None).malloc_trim  # glibc has it
    except (OSError, AttributeError):
        return lambda _: None
