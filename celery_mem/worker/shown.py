"""Short forms of what tasks are called with and return, for events and logs.

No code of users runs for them, and their cost does not grow with what is shown: a class is told by identity,
as one that looks like a built-in may do anything when it is asked for its length, items or name.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from types import (
    BuiltinFunctionType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
)
from typing import Any

from celery_mem.graph.calls import tidy_name
from celery_mem.graph.keys import key_of

MOST_ITEMS = 4
MOST_LEVELS = 2
MOST_TEXT = 60
MOST_BITS = 200
MOST_NAME = 200
GENERAL = {"identity", "_execute_subgraph"}
"""Functions that Dask's collections share; there the key says more."""

_name_in_class = type.__dict__["__name__"].__get__  # not by attribute: a metaclass may have its own
_qualname_in_class = type.__dict__["__qualname__"].__get__


def short(value: Any) -> str:
    """Show the beginning of plain values, and of all others the type only, with the shape of an array."""
    try:
        return _short(value, MOST_LEVELS)
    except Exception:  # such as a container that another thread changes meanwhile
        return _of_type(value)


def _short(value: Any, level: int) -> str:
    kind = type(value)
    if kind is str or kind is bytes:
        return _cut(value)
    if kind is int:
        bits = value.bit_length()
        return repr(value) if bits <= MOST_BITS else f"<int of {bits} bits>"
    if value is None or kind is float or kind is bool or kind is complex:
        return repr(value)
    if kind is tuple:
        items = _items(value, len(value), level)
        return f"({items},)" if len(value) == 1 else f"({items})"
    if kind is list:
        return f"[{_items(value, len(value), level)}]"
    if kind is dict:
        return "{" + _pairs(value, level) + "}"
    if kind is set:
        return "{" + _items(value, len(value), level) + "}" if value else "set()"
    if kind is frozenset:
        return "frozenset({" + _items(value, len(value), level) + "})" if value else "frozenset()"
    return _of_type(value)


def _cut(text: Any) -> str:
    if len(text) > MOST_TEXT:
        half = MOST_TEXT // 2 - 2
        text = text[:half] + (b"..." if type(text) is bytes else "...") + text[-half:]
    return repr(text)


def _items(values: Iterable[Any], n: int, level: int) -> str:
    if n and level <= 0:
        return "..."
    parts = [_short(value, level - 1) for value in islice(values, MOST_ITEMS)]
    return ", ".join([*parts, "..."] if n > MOST_ITEMS else parts)


def _pairs(values: dict[Any, Any], level: int) -> str:
    if values and level <= 0:
        return "..."
    parts = [f"{_short(k, level - 1)}: {_short(v, level - 1)}" for k, v in islice(values.items(), MOST_ITEMS)]
    return ", ".join([*parts, "..."] if len(values) > MOST_ITEMS else parts)


def _of_type(value: Any) -> str:
    kind = type(value)
    array = getattr(sys.modules.get("numpy"), "ndarray", None)
    shape = f" {value.shape}" if kind is array else ""
    return f"<{str.__str__(_qualname_in_class(kind))[:MOST_NAME]}{shape}>"


def shown_name(func: Callable[..., Any]) -> str:
    """Return the name of a function, or of its type: as `name_of` does where that takes no code of users."""
    while type(func) is functools.partial:
        func = func.func
    if type(func) is MethodType:
        func = func.__func__
    try:
        name = _own_name(func)
    except Exception:
        name = None
    if type(name) is not str or not name:
        name = str.__str__(_name_in_class(type(func)))
    return tidy_name(name[:MOST_NAME])


def _own_name(func: Any) -> Any:
    if type(func) is FunctionType or type(func) is BuiltinFunctionType:
        return func.__name__
    if issubclass(type(func), type):
        return _name_in_class(func)
    found = inspect.getattr_static(func, "__name__", None)
    if type(found) is GetSetDescriptorType or type(found) is MemberDescriptorType:
        return found.__get__(func)  # of a class in C, or a slot
    return found


def name_in_display(key: str, name: str) -> str:
    """Return under which name a task shows.

    Args:
        key: its key text.
        name: of its function; empty if that is not known.
    """
    if name and name not in GENERAL:
        return name
    from dask.utils import key_split

    return str(key_split(key_of(key)))
