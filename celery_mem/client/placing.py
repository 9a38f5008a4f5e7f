"""Where the tasks of one call may run: by its arguments, by annotations, by dicts for parts of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dask

from celery_mem.graph import collections as lowering
from celery_mem.graph.constraints import ANYWHERE, Constraint, constraint_of, is_per_key
from celery_mem.graph.keys import Key

NAMES = ("workers", "allow_other_workers", "resources")


class Placing:
    """The constraints of the tasks of one call.

    What annotations say of a task counts for it; then the arguments of the call; then `dask.annotate` around
    the call.

    Args:
        workers, resources: as `Client.submit` takes them, or a dict of that for collections and keys.
        allow_other_workers: as `Client.submit` takes it.
        members: the collections of the call, for dicts that name them.
        lowered: their graph.
    Raises:
        TypeError, ValueError: an argument is of no use; nothing was sent.
    """

    def __init__(
        self,
        workers: Any = None,
        allow_other_workers: bool | None = None,
        resources: Any = None,
        *,
        members: Sequence[Any] = (),
        lowered: lowering.Lowered | None = None,
    ) -> None:
        around = dask.get_annotations()  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
        given = {"workers": workers, "allow_other_workers": allow_other_workers, "resources": resources}
        self._common = {
            name: around.get(name) if value is None else value
            for name, value in given.items()
            if not is_per_key(value)
        }
        self._of_parts = {
            name: dict(_expand(name, value, members, lowered))
            for name, value in given.items()
            if is_per_key(value)
        }
        annotations = {} if lowered is None else lowered.annotations
        self._annotations = {n: a for n in NAMES if (a := annotations.get(n)) or self._of_parts.get(n)}
        self._default = constraint_of(**self._common)
        self._is_uniform = not self._of_parts and not self._annotations
        if not self._is_uniform and lowered is not None:
            for key in lowered.nodes:
                self.of(key)  # raises what is wrong with one before anything is sent

    @property
    def default(self) -> Constraint:
        """The constraint of a task of which nothing else is said."""
        return self._default

    def of(self, key: Key | None) -> Constraint:
        """Return the constraint of one task."""
        if self._is_uniform or key is None:
            return self._default
        own = {name: self._one(name, key) for name in NAMES}
        return ANYWHERE if not any(own.values()) else constraint_of(**own)

    def _one(self, name: str, key: Key) -> Any:
        found = (self._annotations.get(name) or {}).get(key)
        if found is None:
            found = self._of_parts.get(name, {}).get(key)
        return self._common.get(name) if found is None else found


def _expand(
    name: str, per_part: Mapping[Any, Any], members: Sequence[Any], lowered: lowering.Lowered | None
) -> Iterator[tuple[Key, Any]]:
    """Yield keys and what is said of each; a dict names collections, keys, or tuples of them."""
    if lowered is None:
        raise TypeError(f"{name}= is no dict here: {per_part!r}")
    for part, value in per_part.items():
        found = _keys_of(part, members, lowered)
        if found is None and isinstance(part, tuple):
            each = [_keys_of(item, members, lowered) for item in part]
            found = None if None in each else [key for keys in each for key in keys or ()]
        if found is None:
            raise ValueError(f"{name}= speaks of {part!r}, which this call does not compute")
        for key in found:
            yield key, value


def _keys_of(part: Any, members: Sequence[Any], lowered: lowering.Lowered) -> list[Key] | None:
    if lowering.is_dask_collection(part):
        return next((lowered.outputs[i] for i, member in enumerate(members) if member is part), None)
    try:
        return [part] if part in lowered.nodes else None
    except TypeError:  # not hashable: no key
        return None
