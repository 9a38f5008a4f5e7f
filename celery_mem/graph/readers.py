"""Calls that only read their arguments, so that inputs may be lent to them instead of copied.

What Dask, NumPy and pandas themselves do with a chunk never writes into it: Dask's own schedulers give one
object to many tasks. A function of somebody else's may write, and among the arguments of Dask's functions may
be such a one (`map_blocks`, `map_partitions`, aggregations).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any

_LIBRARIES = frozenset(
    {
        *("builtins", "cytoolz", "dask", "functools", "itertools", "math", "numpy"),
        *("_operator", "operator", "pandas", "pyarrow", "tlz", "toolz"),
    }
)
_LISTS = (list, tuple, set, frozenset)


def is_reader(func: Any) -> bool:
    """Tell whether a function is of a library that leaves its arguments alone, and so are those inside it."""
    if isinstance(func, functools.partial):
        return is_reader(func.func) and only_read(func.args) and only_read(func.keywords.values())
    owner = getattr(func, "__self__", None)
    module = getattr(func, "__module__", None)
    if not isinstance(module, str):  # of compiled functions and methods the type knows
        module = type(func if owner is None else owner).__module__
    return module.partition(".")[0] in _LIBRARIES


def only_read(values: Iterable[Any]) -> bool:
    """Tell whether all functions among arguments, in built-in containers and in Dask's nodes, are readers."""
    return all(_reads(value) for value in values)


def _reads(value: Any) -> bool:
    kind = type(value)
    if kind in _LISTS:
        return only_read(value)
    if kind is dict:
        return only_read(value.values())
    nodes = sys.modules.get("dask._task_spec")
    if nodes is not None and isinstance(value, nodes.GraphNode):
        if isinstance(value, nodes.Task):
            return is_reader(value.func) and only_read(value.args) and only_read(value.kwargs.values())
        return not isinstance(value, nodes.DataNode) or _reads(value.value)
    return not callable(value) or is_reader(value)
