"""Files in memory, by mapping. A mapping keeps no descriptor: a client may hold ten thousand results.

Python's mmap keeps a duplicate of the descriptor until version 3.13; there the C library is asked instead.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import weakref
from typing import Any

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)  # a copy-on-write mapping is not yet memory in use
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_FAILED = ctypes.c_void_p(-1).value


def map_private(fd: int, nbytes: int) -> memoryview:
    """Map the start of a file, writable; what is written stays in this process (copy on write).

    The mapping lasts as long as any view of it, and `fd` may be closed at once.

    Raises:
        OSError: it cannot be mapped.
    """
    return _map(fd, nbytes, mmap.MAP_PRIVATE | _NORESERVE)


def map_shared(fd: int, nbytes: int) -> memoryview:
    """Map the start of a file so that what is written goes to the file. See `map_private`."""
    return _map(fd, nbytes, mmap.MAP_SHARED)


if sys.version_info >= (3, 13):

    def _map(fd: int, nbytes: int, flags: int) -> memoryview:
        return memoryview(mmap.mmap(fd, nbytes, flags=flags, prot=_READ_WRITE, trackfd=False))

else:

    def _map(fd: int, nbytes: int, flags: int) -> memoryview:
        libc = _libc()
        address = libc.mmap(None, nbytes, _READ_WRITE, flags, fd, 0)
        if address == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot map {nbytes} bytes: {os.strerror(code)}")
        owner = _array_type(nbytes).from_address(address)
        # Every view refers to `owner`, so it dies after the last of them.
        weakref.finalize(owner, libc.munmap, address, nbytes).atexit = False
        return memoryview(owner).cast("B")


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    )
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


@functools.lru_cache(256)  # making a type takes longer than mapping; files come in few sizes
def _array_type(nbytes: int) -> Any:
    return ctypes.c_char * nbytes
