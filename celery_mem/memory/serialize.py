"""Objects to bytes and back: pickle protocol 5, buffers out of band, cloudpickle where pickle cannot.

A future inside an object says so while it is being pickled (`note_future`), so whoever pickles learns on
which keys the bytes depend.
"""

from __future__ import annotations

import importlib
import io
import pickle
import struct
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from celery_mem.errors import DeserializationError, SerializationError

PLAIN = b"p"
FRAMED = b"b"
_COUNT = struct.Struct("<I")
_LENGTH = struct.Struct("<Q")
SIMPLE = frozenset({int, float, str, bytes, bool, type(None), complex})
"""Types whose values pickle as they are: nothing in them can refuse, be a future, or be a buffer."""
_NAMES_SOMETHING = b"\x93"  # the opcode that looks up a module's attribute, in protocol 4 and later
_SHORT = 4096


class _Found(threading.local):
    keys: dict[str, None] | None = None


_found = _Found()


def note_future(key: str) -> None:
    """Record that the object being pickled in this thread contains a future of `key`."""
    if _found.keys is not None:
        _found.keys[key] = None


class Frames(NamedTuple):
    """A pickled object.

    Attributes:
        head: the pickle stream.
        buffers: its out-of-band buffers, flat views of the object's own memory.
        contains: key texts of the futures inside it.
    """

    head: bytes
    buffers: list[memoryview]
    contains: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Size of all parts, bytes."""
        return len(self.head) + sum(b.nbytes for b in self.buffers)

    def inline(self) -> bytes:
        """Return all parts as one byte string, which `loads_inline` reads."""
        if not self.buffers:
            return PLAIN + self.head
        sizes = [len(self.head), *(b.nbytes for b in self.buffers)]
        table = _COUNT.pack(len(sizes)) + b"".join(map(_LENGTH.pack, sizes))
        return b"".join([FRAMED, table, self.head, *self.buffers])


def unpickled(data: bytes) -> Frames:
    """Return bytes that are no pickle stream in the form of one, to be written as a blob."""
    return Frames(b"", [memoryview(data)], ())


def inline_simple(obj: Any) -> bytes:
    """Return what `dumps(obj).inline()` does, sooner, for tuples and dicts of SIMPLE values."""
    return PLAIN + pickle.dumps(obj, protocol=5)


def dumps(obj: Any, what: str = "object") -> Frames:
    """Pickle `obj`.

    Args:
        what: how an error text calls it.
    Raises:
        SerializationError: neither pickle nor cloudpickle can.
    """
    if type(obj) in SIMPLE:
        return Frames(pickle.dumps(obj, protocol=5), [], ())
    import cloudpickle  # not by those who only pass bytes on, and are to stay small

    outer, _found.keys = _found.keys, {}
    try:
        buffers: list[pickle.PickleBuffer] = []
        try:
            head = pickle.dumps(obj, protocol=5, buffer_callback=buffers.append)
            by_value = b"__main__" in head or cloudpickle.list_registry_pickle_by_value()
        except Exception:
            by_value = True
        if by_value:
            # pickle would name a function of __main__, which is another module on the worker.
            buffers.clear()
            _found.keys.clear()
            try:
                head = cloudpickle.dumps(obj, protocol=5, buffer_callback=buffers.append)
            except Exception as error:
                raise SerializationError(
                    f"{what} of type {type(obj).__qualname__} cannot be pickled: {error}"
                ) from error
        return Frames(head, [b.raw() for b in buffers], tuple(_found.keys))
    finally:
        _found.keys = outer


_importing = threading.RLock()
"""Held by a thread that imports because of what it unpickles."""


class _Unpickler(pickle.Unpickler):
    """Imports one module at a time, and packages before what is in them: other threads unpickle, too.

    Two threads whose imports wait for each other would be a deadlock. Python breaks it by giving one of them
    half a module, with which an import fails, of some packages for as long as the process lives. To import
    `a.b` locks `a.b` and then waits for `a`: no circle of modules is needed, only a thread that imports `a`.
    """

    def find_class(self, module_name: str, global_name: str) -> Any:
        if not _is_imported(module_name):
            with _importing:
                names = module_name.split(".")
                for n in range(1, len(names) + 1):
                    importlib.import_module(".".join(names[:n]))
        return super().find_class(module_name, global_name)


def _is_imported(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


def loads(head: bytes | memoryview, buffers: Sequence[Any] = (), what: str = "object") -> Any:
    """Unpickle. Arrays share the memory of `buffers` and are writable where those are.

    Raises:
        DeserializationError: a module is missing here or the bytes do not fit this Python.
    """
    try:
        if len(head) <= _SHORT and _NAMES_SOMETHING not in bytes(head):
            return pickle.loads(head, buffers=buffers)
        return _Unpickler(io.BytesIO(head), buffers=buffers).load()
    except ModuleNotFoundError as error:
        raise DeserializationError(
            f"{what} needs the module {error.name!r}, which this process does not have; "
            "install it on every worker"
        ) from error
    except Exception as error:
        raise DeserializationError(
            f"{what} cannot be unpickled here: {type(error).__name__}: {error}"
        ) from error


def loads_inline(data: bytes, what: str = "object") -> Any:
    """Unpickle what `Frames.inline` made; each call makes a new, writable object."""
    head, buffers = split_inline(data, what)
    return loads(head, buffers, what)


def split_inline(data: bytes, what: str = "object") -> tuple[memoryview, list[bytearray]]:
    """Return the head and the buffers, writable copies, of what `Frames.inline` made."""
    if data[:1] == PLAIN:
        return memoryview(data)[1:], []
    if data[:1] != FRAMED or len(data) < 5:
        raise DeserializationError(f"{what}: these bytes are not a stored object")
    (count,) = _COUNT.unpack_from(data, 1)
    at = 5 + 8 * count
    if count < 1 or at > len(data):
        raise DeserializationError(f"{what}: these bytes are not a stored object")
    parts = []
    for i in range(count):
        (size,) = _LENGTH.unpack_from(data, 5 + 8 * i)
        parts.append(memoryview(data)[at : at + size])
        at += size
    if at != len(data):
        raise DeserializationError(f"{what}: {len(data)} bytes stored, {at} expected")
    return parts[0], [bytearray(p) for p in parts[1:]]
