"""Slots that are gone: what they were running runs again elsewhere, unless it took too many with it."""

from __future__ import annotations

import json
import pickle
from typing import NamedTuple

from celery_mem.errors import KilledWorkerError
from celery_mem.state.keys import TASK
from celery_mem.state.store import Store, Tickets


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


def give_up_slot(store: Store, slot: str, node: str, *, is_death: bool = True) -> GivenUp:
    """Take away the tasks of a slot that is gone, as the caller knows.

    Args:
        is_death: hold its end against the tasks; False for a worker that was stopped on purpose.
    """
    owned = store.link.call("HGETALL", store.keys.of("slot", slot))
    attempts = {owned[i].decode(): owned[i + 1].decode() for i in range(0, len(owned), 2)}
    if not is_death:
        step = store.step(slot, node, mode="iq", want=0, back=list(attempts.items()))
        return GivenUp(list(attempts), [], step.tickets)
    deaths = [store.link.call("HGET", store.keys.of("task", key), TASK["deaths"]) for key in attempts]
    last = [
        key for key, n in zip(attempts, deaths, strict=True) if int(n or 0) >= store.settings.allowed_failures
    ]
    keys, killed, tickets = store.abandon_slot(
        slot, node, killed_error(last, slot, store.settings.allowed_failures)
    )
    return GivenUp(keys, killed, tickets)


def killed_error(keys: list[str], slot: str, allowed: int) -> bytes:
    """Return the error of tasks that took too many slots with them, in the form of graph/errors.py."""
    error = KilledWorkerError(tuple(keys), slot, allowed)
    head = {
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "message": str(error),
        "traceback": "",
    }
    # Not by that module's own means: this runs in node agents, which are to stay small.
    return json.dumps(head).encode() + b"\n" + pickle.dumps([b"p" + pickle.dumps(error)])
