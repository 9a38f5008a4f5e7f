"""The slot loop: one place of a node where tasks run, for as long as a ticket lends it to the graph.

Runner and watcher share the batch: the runner takes tasks from its head; when one turns out long, the watcher
reports what is done and hands back what has not begun, so that no other slot waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from celery_mem.config import Settings
from celery_mem.state.link import Command, Link
from celery_mem.state.store import Done, Failed, Step, Store, Taken, Tickets
from celery_mem.worker.run import TaskRunner

log = logging.getLogger("celery_mem.worker")

LONG = 10
"""A task is long when it has run for this many times the batch target."""


class Slot:
    """One slot. A ticket calls `run_ticket`; between tickets it keeps its connection, functions and cache.

    Args:
        name: `<node>|<pid>.<n>`; the node's agent watches the process.
        node: name of the Celery worker.
        send_tickets: sends tickets that a step asked for.
    """

    def __init__(
        self, name: str, node: str, settings: Settings, send_tickets: Callable[[Tickets], None]
    ) -> None:
        self.name = name
        self.node = node
        self.settings = settings
        self.send_tickets = send_tickets
        self.store = Store.connect(settings)
        self.runner = TaskRunner(self.store, settings)
        self.seconds_per_task = settings.batch_target
        self._wake = Link.connect(settings, blocking=True)
        self._batch = Batch()
        self._watcher: threading.Thread | None = None

    def run_ticket(self, ticket: str) -> int:
        """Run tasks until the slice is over or nothing came for the linger time; returns how many ran."""
        end = time.monotonic() + self.settings.slice
        mode, ran = "", 0
        finished = Finished()
        while True:
            leaving = time.monotonic() >= end
            step = self._step(ticket, mode + "q" if leaving else mode, 0 if leaving else self._want(), finished)
            ticket = ""
            if leaving:
                return ran
            if step.taken:
                finished = self._run(step.taken)
                ran += len(finished.done) + len(finished.failed)
                mode = ""
            elif "l" in mode:
                return ran
            else:
                finished = Finished()
                mode = "i" if self._wait_for_work() else "il"

    def _step(self, ticket: str, mode: str, want: int, finished: Finished) -> Step:
        step = self.store.step(
            self.name,
            self.node,
            ticket=ticket,
            mode=mode,
            want=want,
            done=finished.done,
            failed=finished.failed,
            before=finished.before,
        )
        self._after_step(step, finished, self.runner.discard)
        return step

    def _after_step(self, step: Step, finished: Finished, discard: Callable[[str, str], None]) -> None:
        if step.stale:
            log.info("fenced: %d reports came too late and count for nothing, first %s", len(step.stale), step.stale[0])
            late = set(step.stale)
            for done in finished.done:
                if done.key in late and done.kind == "b":
                    discard(done.key, done.attempt)
        if step.tickets.ids:
            self.send_tickets(step.tickets)

    def _wait_for_work(self) -> bool:
        """Wait up to the linger time for a wake-up."""
        name = self.store.keys.of("wake", self.name)
        return self._wake.call("BLPOP", name, self.settings.linger) is not None

    def _want(self) -> int:
        return max(1, min(self.settings.batch_limit, int(self.settings.batch_target / self.seconds_per_task)))

    def _run(self, taken: list[Taken]) -> Finished:
        batch = self._batch
        batch.begin(taken)
        if len(taken) > 1:
            self._watch()
        try:
            while (task := batch.next()) is not None:
                report = self.runner.run(task)
                self.seconds_per_task += 0.3 * (max(report.seconds, 1e-6) - self.seconds_per_task)
                batch.add(report.done, report.failed, report.before)
        except BaseException:
            # The worker is told to stop in the middle of a task: nothing that was taken may be lost.
            finished, unrun = batch.end(with_current=True)
            self.store.step(self.name, self.node, mode="q", want=0, done=finished.done, failed=finished.failed,
                            back=[(t.key, t.attempt) for t in unrun], before=finished.before)
            raise
        return batch.end()[0]

    def _watch(self) -> None:
        if self._watcher is None or not self._watcher.is_alive():
            self._watcher = threading.Thread(target=self._watch_forever, name="celery-mem-watcher", daemon=True)
            self._watcher.start()

    def _watch_forever(self) -> None:
        store = self.store.twin()
        limit = LONG * self.settings.batch_target
        while True:
            self._batch.running.wait()
            time.sleep(limit / 2)
            finished, unrun = self._batch.split_if_older(limit)
            if not (unrun or finished.done or finished.failed):
                continue
            try:
                step = store.step(
                    self.name, self.node, want=0, done=finished.done, failed=finished.failed,
                    back=[(t.key, t.attempt) for t in unrun], before=finished.before,
                )
                self._after_step(
                    step, finished, lambda key, attempt: store.link.call("UNLINK", store.keys.blob(attempt, key))
                )
            except Exception:
                log.exception("could not hand back %d tasks behind a long one", len(unrun))
                self._batch.give_back(finished, unrun)


class Finished:
    """Reports that wait to be sent."""

    def __init__(self) -> None:
        self.done: list[Done] = []
        self.failed: list[Failed] = []
        self.before: list[Command] = []


class Batch:
    """The tasks a slot has taken. Invariant: each is in exactly one of waiting, current, finished."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self._lock = threading.Lock()
        self._waiting: deque[Taken] = deque()
        self._current: Taken | None = None
        self._since = 0.0
        self._finished = Finished()

    def begin(self, taken: list[Taken]) -> None:
        """Take up a new batch; the one before has ended."""
        with self._lock:
            self._waiting.extend(taken)
            self._finished = Finished()
        if len(taken) > 1:
            self.running.set()

    def next(self) -> Taken | None:
        """Return the next task to run; None when there are no more."""
        with self._lock:
            self._current = self._waiting.popleft() if self._waiting else None
            self._since = time.monotonic()
            return self._current

    def add(self, done: Done | None, failed: Failed | None, before: list[Command]) -> None:
        """Record what came of the current task."""
        with self._lock:
            self._current = None
            finished = self._finished
            if done is not None:
                finished.done.append(done)
            if failed is not None:
                finished.failed.append(failed)
            if before:
                finished.before += before

    def end(self, *, with_current: bool = False) -> tuple[Finished, list[Taken]]:
        """Close the batch; returns the reports, and what was not run."""
        self.running.clear()
        with self._lock:
            finished, self._finished = self._finished, Finished()
            unrun = list(self._waiting)
            self._waiting.clear()
            if with_current and self._current is not None:
                unrun.insert(0, self._current)
            self._current = None
            return finished, unrun

    def split_if_older(self, seconds: float) -> tuple[Finished, list[Taken]]:
        """If the current task has run for longer, take away the reports and the tasks behind it."""
        with self._lock:
            if self._current is None or time.monotonic() - self._since < seconds:
                return Finished(), []
            finished, self._finished = self._finished, Finished()
            unrun = list(self._waiting)
            self._waiting.clear()
            self.running.clear()
            return finished, unrun

    def give_back(self, finished: Finished, unrun: list[Taken]) -> None:
        """Undo a split whose report could not be sent."""
        with self._lock:
            self._finished.done[:0] = finished.done
            self._finished.failed[:0] = finished.failed
            self._finished.before[:0] = finished.before
            self._waiting.extend(unrun)
