"""Results that a slot keeps at hand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple


class Cached(NamedTuple):
    """Pickled form of a result; nobody else refers to its buffers."""

    head: bytes
    buffers: Sequence[bytes]
    nbytes: int


class ResultCache:
    """Least recently used results, bounded by bytes.

    Args:
        limit: most bytes kept; a result larger than half of it is not kept at all.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._items: OrderedDict[str, Cached] = OrderedDict()

    def has_room(self, nbytes: int) -> bool:
        """Tell whether a result of this size would be kept."""
        return nbytes <= self.limit // 2

    def put(self, name: str, item: Cached) -> None:
        """Keep a result; drops the least recently used ones that have no room beside it."""
        if not self.has_room(item.nbytes):
            return
        old = self._items.pop(name, None)
        self._items[name] = item
        self.nbytes += item.nbytes - (0 if old is None else old.nbytes)
        while self.nbytes > self.limit:
            _, old = self._items.popitem(last=False)
            self.nbytes -= old.nbytes

    def get(self, name: str) -> Cached | None:
        """Return a result, now the most recently used one."""
        item = self._items.get(name)
        if item is not None:
            self._items.move_to_end(name)
        return item
