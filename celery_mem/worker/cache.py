"""Results that a slot keeps at hand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple


class Cached(NamedTuple):
    """Pickled form of a result: head and buffers, which may be views of the live object."""

    head: bytes
    buffers: Sequence[Any]
    nbytes: int


class ResultCache:
    """Least recently used results, bounded by bytes.

    It keeps pickled parts and gives each reader a copy: a task that writes into its input spoils nobody's data.

    Args:
        limit: most bytes kept; a result larger than half of it is not kept at all.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._items: OrderedDict[str, Cached] = OrderedDict()

    def put(self, name: str, item: Cached) -> None:
        """Keep a result; drops the least recently used ones that have no room beside it."""
        if item.nbytes > self.limit // 2:
            return
        self.drop(name)
        self._items[name] = item
        self.nbytes += item.nbytes
        while self.nbytes > self.limit:
            _, old = self._items.popitem(last=False)
            self.nbytes -= old.nbytes

    def get(self, name: str) -> Cached | None:
        """Return a result, now the most recently used one."""
        item = self._items.get(name)
        if item is not None:
            self._items.move_to_end(name)
        return item

    def drop(self, name: str) -> None:
        """Forget a result."""
        item = self._items.pop(name, None)
        if item is not None:
            self.nbytes -= item.nbytes
