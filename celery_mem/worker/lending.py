"""Live results lent to tasks that only read them: no copy is made, and none is written for them.

What is lent is read-only, so a wrong guess changes nobody's data. Such a task fails or hands out a part of
what it was lent, and is called again with inputs of its own, as are those like it from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from celery_mem.graph.keys import key_of
from celery_mem.graph.readers import is_reader
from celery_mem.state.store import Taken

MOST = 1000
"""Functions, and kinds of tasks, that are remembered: a bound, not a policy."""


class Lender:
    """Says which tasks get inputs on loan."""

    def __init__(self) -> None:
        self._readers: dict[str, bool] = {}
        self._refused: set[tuple[str, str]] = set()

    def may(self, task: Taken, func: Callable[..., Any]) -> bool:
        """Tell whether a task's function only reads, as far as its name and experience say."""
        known = self._readers.get(task.function)
        if known is None:
            if len(self._readers) >= MOST:
                self._readers.clear()
            known = self._readers[task.function] = is_reader(func)
        return known and not (self._refused and _kind_of(task) in self._refused)

    def refuse(self, task: Taken) -> None:
        """Lend nothing to tasks of this kind any more."""
        if len(self._refused) >= MOST:
            self._refused.clear()
        self._refused.add(_kind_of(task))


def _kind_of(task: Taken) -> tuple[str, str]:
    """Return the function, and the name in the key: Dask has one function for all that it fused."""
    from dask.utils import key_split

    return task.function, key_split(key_of(task.key))


def borrows(buffers: Sequence[memoryview], lent: Sequence[memoryview]) -> bool:
    """Tell whether some buffers of a result may lie in lent memory, of which any part is read-only too."""
    suspects = [b for b in buffers if b.readonly and b.nbytes]
    if not suspects:
        return False
    try:
        import numpy as np
    except ImportError:
        return True
    lenders = [np.frombuffer(view, np.uint8) for view in lent if view.nbytes]
    return any(np.may_share_memory(np.frombuffer(b, np.uint8), whole) for b in suspects for whole in lenders)
