"""Giving up copies that are too many; Redis has the last word, and keeps the last one and any wanted."""

from __future__ import annotations

from collections.abc import Iterable

from celery_mem.coordinator.plans import Drop, Move
from celery_mem.state.store import Store

CHUNK = 500


def shed(store: Store, plan: Iterable[Drop]) -> int:
    """Give up copies; returns how many went."""
    by_place: dict[str, list[tuple[str, str]]] = {}
    for drop in plan:
        by_place.setdefault(drop.place, []).append((drop.key, drop.token))
    n = 0
    for place, items in by_place.items():
        for start in range(0, len(items), CHUNK):
            n += len(store.shed(place, items[start : start + CHUNK]))
    return n


def source_of(move: Move) -> Drop:
    """Return the copy that a move, whose new copy is there, makes superfluous."""
    return Drop(move.key, move.token, move.nbytes, move.source)
