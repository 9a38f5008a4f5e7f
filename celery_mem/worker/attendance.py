"""Sees that Redis knows which slots are at work, also after a server took over that lacks the last writes.

It may count a slot that went home as one that runs a ticket, and as owning tasks that it has reported. Nobody
but the process itself can tell; so a thread looks, while its slots are at home, if the server is another.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING

from celery_mem.errors import CeleryMemError

if TYPE_CHECKING:
    from celery_mem.worker.slot import Slot

log = logging.getLogger("celery_mem.worker")

_slots: weakref.WeakSet[Slot] = weakref.WeakSet()
_lock = threading.Lock()
_thread: threading.Thread | None = None


def attend(slot: Slot) -> None:
    """Look after a slot from now on. Called in the process that runs it."""
    global _thread
    with _lock:
        _slots.add(slot)
        if _thread is None or not _thread.is_alive():  # of the parent, before a fork
            _thread = threading.Thread(target=_look_forever, name="celery-mem-attendance", daemon=True)
            _thread.start()


def _look_forever() -> None:
    pause = 1.0
    while True:
        with _lock:
            slots = list(_slots)
        if slots:
            pause = min(1.0, slots[0].settings.node_lease / 4)
        for slot in slots:
            try:
                slot.confirm_at_home()
            except CeleryMemError as error:
                log.info("slot %s: %s", slot.name, error)
            except Exception:
                log.exception("slot %s", slot.name)
        del slots
        time.sleep(pause)
