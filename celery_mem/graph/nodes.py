"""What a worker needs of Dask: to evaluate a node among the arguments of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dask._task_spec import GraphNode, TaskRef

from celery_mem.graph.keys import text_of


def is_node(value: Any) -> bool:
    """Tell whether `value` is a Dask node, which is evaluated before the call."""
    return isinstance(value, GraphNode)


def evaluate(value: Any, by_key: Mapping[str, Any]) -> Any:
    """Return what `value` stands for.

    Args:
        by_key: the inputs by key text.
    """
    if isinstance(value, GraphNode):
        return value({key: by_key[text_of(key)] for key in value.dependencies})
    if isinstance(value, TaskRef):
        return by_key[text_of(value.key)]
    return value
