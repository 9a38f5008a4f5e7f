"""What a worker does with a ticket: it lends the slot of the thread that took it."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import signals
from celery.exceptions import WorkerShutdown, WorkerTerminate

from celery_mem.config import Settings
from celery_mem.errors import NamespaceResetError
from celery_mem.graph import inside
from celery_mem.graph.tickets import send_tickets
from celery_mem.memory.process import own_identity

if TYPE_CHECKING:
    from celery import Celery

    from celery_mem.worker.events import TaskEvents
    from celery_mem.worker.interrupts import Interrupts
    from celery_mem.worker.memory import ProcessMemory
    from celery_mem.worker.slot import Slot
    from celery_mem.worker.turns import Driver

log = logging.getLogger("celery_mem.worker")

_local = threading.local()
_numbers = itertools.count(1)
_memory: tuple[int, ProcessMemory | None] | None = None  # pid, and the memory that its slots share
_interrupts: tuple[int, Interrupts | None] | None = None  # as _memory
_events: tuple[int, TaskEvents | None] | None = None  # as _memory
_memory_lock = threading.Lock()


def run_ticket(app: Celery, settings: Settings, node: str, ticket: str) -> int:
    """Run the slot of this thread for one ticket; returns how many tasks ran."""
    slot = _slot_here(app, settings, node)
    try:
        return slot.run_ticket(ticket)
    except NamespaceResetError as error:
        log.warning("%s; slot %s begins anew", error, slot.name)
        _local.slot = None
        if slot.memory is not None:
            slot.memory.forget_generation(slot.store.generation)
        slot.close()
        return 0
    except (WorkerShutdown, WorkerTerminate):
        raise
    except BaseException:
        _local.slot = None  # the next ticket gets another; this one may have to wait for Redis
        slot.retire()
        raise


def know_worker(app: Celery, settings: Settings, node: str) -> None:
    """Let tasks of this process find their worker, plain ones of Celery too."""
    inside.worker = Host(app, settings, node)


def _slot_here(app: Celery, settings: Settings, node: str) -> Slot:
    slot: Slot | None = getattr(_local, "slot", None)
    if slot is None or _local.pid != os.getpid() or slot.node != node:
        # Only here, in the process that runs tasks: the main process of a prefork worker needs none of it.
        from celery_mem.worker.attendance import attend
        from celery_mem.worker.slot import Slot

        inside.worker = Host(app, settings, node)
        name = f"{node}|{own_identity()}.{next(_numbers)}"
        memory = _memory_here(app, settings, node)
        interrupts = _interrupts_here(app, settings, node)
        events = _events_here(app, settings, node)
        slot = Slot(
            name, node, settings, lambda tickets: send_tickets(app, tickets), memory, interrupts, events
        )
        if interrupts is not None:
            interrupts.slot = slot
        _local.slot, _local.pid = slot, os.getpid()
        attend(slot)
    return slot


def close_slot() -> None:
    """Close the slot of this thread, which takes no more tickets."""
    slot: Slot | None = getattr(_local, "slot", None)
    _local.slot = None
    if slot is not None:
        slot.close()


def _memory_here(app: Celery, settings: Settings, node: str) -> ProcessMemory | None:
    """Return node memory as this process has it, made by the first of its slots."""
    global _memory
    with _memory_lock:
        if _memory is None or _memory[0] != os.getpid():
            memory = _make_memory(app, settings, node) if settings.node_memory else None
            _memory = (os.getpid(), memory)
            if memory is not None:
                signals.worker_process_shutdown.connect(close_memory, weak=False)
        return _memory[1]


def _interrupts_here(app: Celery, settings: Settings, node: str) -> Interrupts | None:
    """Return what ends tasks of this process, made by the first of its slots."""
    global _interrupts
    with _memory_lock:
        if _interrupts is None or _interrupts[0] != os.getpid():
            from celery_mem.worker.control import control_of
            from celery_mem.worker.interrupts import Interrupts
            from celery_mem.worker.run import call_task

            control = control_of(app, settings, node)
            found = None
            if control.folder:
                found = Interrupts(control.folder, call_task.__code__, by_signal=control.pool == "prefork")
                signals.worker_process_shutdown.connect(close_interrupts, weak=False)
            _interrupts = (os.getpid(), found)
        return _interrupts[1]


def _events_here(app: Celery, settings: Settings, node: str) -> TaskEvents | None:
    """Return what shows tasks of this process to others, made by the first of its slots."""
    global _events
    with _memory_lock:
        if _events is None or _events[0] != os.getpid():
            from celery_mem.worker.events import TaskEvents

            found = None
            if settings.events != "off":
                found = TaskEvents(app, node, is_capped=settings.events == "sampled")
                signals.worker_process_shutdown.connect(close_events, weak=False)
            _events = (os.getpid(), found)
        return _events[1]


def close_events(**_: Any) -> None:
    """Send what was not sent yet: this process ends in good order."""
    global _events
    found, _events = _events, None
    if found is not None and found[0] == os.getpid() and found[1] is not None:
        found[1].close()


def close_interrupts(**_: Any) -> None:
    """Listen to the agent no more: this process ends in good order."""
    global _interrupts
    found, _interrupts = _interrupts, None
    if found is not None and found[0] == os.getpid() and found[1] is not None:
        found[1].close()


def is_outdated() -> bool:
    """Whether another process is to take the place of this one."""
    found = _interrupts
    return found is not None and found[0] == os.getpid() and found[1] is not None and found[1].is_outdated


def _make_memory(app: Celery, settings: Settings, node: str) -> ProcessMemory | None:
    from celery_mem.worker.memory import ProcessMemory, folder_of

    folder = folder_of(app, settings, node)
    return None if folder is None else ProcessMemory(folder, node, settings)


def live_bytes() -> int:
    """Return the bytes of results that this process has not written yet."""
    found = _memory
    return 0 if found is None or found[0] != os.getpid() or found[1] is None else found[1].live.nbytes


def close_memory(**_: Any) -> None:
    """Write what only this process has: it ends in good order."""
    global _memory
    found, _memory = _memory, None
    if found is not None and found[0] == os.getpid() and found[1] is not None:
        found[1].close()


class Host:
    """What tasks may ask of their worker; see `inside.Worker`."""

    def __init__(self, app: Celery, settings: Settings, node: str) -> None:
        self.app = app
        self.settings = settings
        self.node = node

    def help_until(self, wait: inside.Wait, timeout: float | None) -> bool:
        driver = _driver()
        return wait(timeout) if driver is None else driver.slot.help_until(driver, wait, timeout)

    def task_priority(self) -> float | None:
        driver = _driver()
        return None if driver is None or driver.task is None else driver.slot.priority_of(driver.task)

    def task_key(self) -> str | None:
        driver = _driver()
        return None if driver is None or driver.task is None else driver.task.key

    def running_task(self) -> tuple[str, str] | None:
        driver = _driver()
        if driver is None or (task := driver.task) is None:
            return None
        return task.key, driver.slot.runner.name_of(task)

    def at_exit(self, call: Callable[[], Any]) -> None:
        def end(**_: Any) -> None:
            call()

        signals.worker_process_shutdown.connect(end, weak=False)  # a pool child
        signals.worker_shutdown.connect(end, weak=False)  # the main process, where its own threads run tasks


def _driver() -> Driver | None:
    from celery_mem.worker.slot import here

    return here.get()
