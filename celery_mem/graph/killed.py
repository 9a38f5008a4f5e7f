"""Slots that are gone: what they were running runs again elsewhere, unless it took too many with it."""

from __future__ import annotations

import json
import pickle
from typing import NamedTuple

from celery_mem.errors import CeleryMemError, KilledWorkerError
from celery_mem.memory.seal import Kind, seal_of, strip
from celery_mem.state.keys import TASK
from celery_mem.state.records import read_deaths, read_recipe
from celery_mem.state.store import Store, Tickets

FUNCTION_HEAD = 512
"""Bytes of a stored function that begin with a line which names it, see `calls.encode_function`."""


class GivenUp(NamedTuple):
    """What was given up with a slot.

    Attributes:
        keys: key texts of what it was running, or was about to run.
        killed: those of them that erred, as too many slots died with them.
        tickets: to be sent.
    """

    keys: list[str]
    killed: list[str]
    tickets: Tickets


def give_up_slot(store: Store, slot: str, node: str, *, death: str) -> GivenUp:
    """Take away the tasks of a slot that is gone, as the caller knows.

    Args:
        death: how its process ended, which is held against the tasks; empty for one that was to end.
    """
    owned = owned_by(store, slot)
    if not death:
        step = store.step(slot, node, mode="iq", want=0, back=list(owned.items()))
        return GivenUp(list(owned), [], step.tickets)
    death = f"on {node}: {death}"
    errors = {}
    for key in owned:
        deaths, function = _history(store, key)
        if len(deaths) >= store.settings.allowed_failures:
            others = tuple(other for other in owned if other != key)
            errors[key] = encode_plain(KilledWorkerError(key, function, (*deaths, death), others), key, store)
    keys, killed, tickets = store.abandon_slot(slot, node, death, errors)
    return GivenUp(keys, killed, tickets)


def owned_by(store: Store, slot: str) -> dict[str, str]:
    """Return what a slot owns: key text -> attempt."""
    flat = store.link.call("HGETALL", store.keys.of("slot", slot))
    return {flat[i].decode(): flat[i + 1].decode() for i in range(0, len(flat), 2)}


def encode_plain(error: CeleryMemError, key: str, store: Store) -> bytes:
    """Return an error without traceback in the form of graph/errors.py, signed.

    Not by that module's own means: this runs in node agents, which are to stay small.
    """
    head = {
        "key": key,
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "message": str(error),
        "traceback": "",
    }
    data = json.dumps(head).encode() + b"\n" + pickle.dumps([b"p" + pickle.dumps(error)])
    return seal_of(store.settings).close(Kind.ERROR, "", data)


def _history(store: Store, key: str) -> tuple[list[str], str]:
    """Return how processes died with a task, and the name of its function."""
    deaths, raw = store.link.call("HMGET", store.keys.of("task", key), TASK["deaths"], TASK["recipe"])
    recipe = read_recipe(raw)
    if recipe is None:
        return read_deaths(deaths), ""
    head = store.link.call("GETRANGE", store.keys.of("function", recipe.function), 0, FUNCTION_HEAD)
    return read_deaths(deaths), _name_in(head)


def _name_in(head: bytes) -> str:
    try:
        return str(json.loads(strip(head).partition(b"\n")[0])["name"])
    except (ValueError, KeyError):  # its code is gone, or of another version of this package
        return "an unknown function"
