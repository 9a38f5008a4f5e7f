"""The slot loop: one place of a node where tasks run, for as long as a ticket lends it to the graph.

Runner and watcher share the batch: the runner takes tasks from its head; when one turns out long, the watcher
reports what is done and hands back what has not begun, so that no other slot waits for it. When a task waits
for other tasks, a further thread drives the slot meanwhile: the only slot may be the one that those need.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar

from celery.exceptions import WorkerShutdown, WorkerTerminate

from celery_mem.config import Settings
from celery_mem.errors import NamespaceResetError
from celery_mem.graph.inside import Wait
from celery_mem.memory.trimming import give_back
from celery_mem.profiling.lines import Notebook
from celery_mem.state.counts import STEP, Tally
from celery_mem.state.keys import TASK
from celery_mem.state.letters import save_copy
from celery_mem.state.link import Link
from celery_mem.state.records import read_recipe
from celery_mem.state.store import Done, Store, Taken, Tickets
from celery_mem.worker.batch import Batch, Reports
from celery_mem.worker.events import TaskEvents
from celery_mem.worker.interrupts import Interrupts
from celery_mem.worker.memory import ProcessMemory
from celery_mem.worker.run import TaskRunner
from celery_mem.worker.standing_in import standing_in
from celery_mem.worker.turns import Driver, Turns

log = logging.getLogger("celery_mem.worker")

LONG = 10
"""A task is long when it has run for this many times the batch target."""
BATCH_BYTES = 2 << 20
"""The results of one batch should take no more: what they are needed for comes after the batch."""
MOST_HELPERS = 100
"""Threads that drive a slot whose tasks wait for tasks that wait for tasks; beyond, they only wait."""
NOTICE_S = 0.005
"""What a slot reports is known to a client in its process after this time, mostly after a tenth of it."""
LONGEST_PAUSE_S = 0.1
TELL_S = 1.0
"""A slot that stays at work tells after this time what it counted; others when they begin or end."""
RETRY_PAUSE_S = 1.0

here: ContextVar[Driver | None] = ContextVar("celery_mem_driver", default=None)
"""Who runs the task of this context."""


class Slot:
    """One slot. A ticket calls `run_ticket`; between tickets it keeps its connection, functions and cache.

    Args:
        name: `<node>|<process identity>.<n>`; the node's agent watches the process.
        node: name of the Celery worker.
        send_tickets: sends tickets that a step asked for; returns whether the broker took them.
        memory: node memory of this process; None if all results go through Redis.
        interrupts: of this process; None where tasks cannot be ended.
        events: of this process; None if nobody is to see its tasks.
    """

    def __init__(
        self,
        name: str,
        node: str,
        settings: Settings,
        send_tickets: Callable[[Tickets], bool],
        memory: ProcessMemory | None = None,
        interrupts: Interrupts | None = None,
        events: TaskEvents | None = None,
    ) -> None:
        self.name = name
        self.node = node
        self.settings = settings
        self.send_tickets = send_tickets
        self.store = Store.connect(settings)
        self.memory = memory
        self.interrupts = interrupts
        self.notebook = Notebook()
        self.runner = TaskRunner(
            self.store,
            settings,
            memory,
            slot=name,
            interrupts=interrupts,
            events=events,
            notebook=self.notebook,
        )
        self.seconds_per_task = settings.batch_target
        self.bytes_per_task = 0.0
        self._told_pace_s = 0.0
        self._tally = Tally()
        self._tally_due = 0.0
        self._wake = Link.connect(settings, blocking=True)
        self.batch = Batch()
        self._turns = Turns()
        # Held from taking reports out of the batch until Redis has them: so at any step this slot owns what
        # runs now and what the step names, nothing else.
        self._reporting = threading.Lock()
        self._helpers: set[Driver] = set()
        self._watcher: threading.Thread | None = None
        self._closed = False
        self._was_useful = True
        self._may_trim = False  # something ran since the heap was trimmed
        self._at_work = threading.Lock()  # held while a ticket runs
        self._confirmed = 0  # value of `store.n_rejoined` since which Redis told what this slot owns
        self._cut_off_until = 0.0  # until then, tickets that the broker did not take count as on their way

    def run_ticket(self, ticket: str) -> int:
        """Run tasks until the slice is over or nothing came for the linger time; returns how many ran.

        A slice gets longer where a task waits for others: what has begun here ends here.
        """
        driver = Driver(self)
        token = here.set(driver)
        self._at_work.acquire()
        if self.interrupts is not None:
            self.interrupts.begin_ticket()
        self._turns.take(driver)
        try:
            if self.interrupts is not None and self.interrupts.is_outdated:
                self._step("iq", 0, ticket)  # another process takes the place of this one, and the work
                return 0
            with standing_in(driver):
                return self._run_slice(driver, ticket)
        except (WorkerShutdown, WorkerTerminate):
            self.batch.give_up_all()  # this process is about to end: what it has must go back now
            self._step("iq", 0)
            raise
        finally:
            self._turns.give(driver)
            if self.interrupts is not None:
                self.interrupts.end_ticket()
            self._at_work.release()
            here.reset(token)

    @property
    def is_at_work(self) -> bool:
        """Whether a ticket runs."""
        return self._at_work.locked()

    def confirm_at_home(self) -> None:
        """If another server took over while this slot runs no ticket, see that it owns nothing there."""
        if not self._at_work.acquire(blocking=False):
            return  # its next step tells
        try:
            if self._closed:
                return
            self.store.link.call("PING")  # on a new connection, if the old one broke
            self.store.follow()
            if self.is_in_doubt:
                self.batch.begin(self._step("", 1))
                self._step("iq", 0)
        finally:
            self._at_work.release()

    @property
    def is_in_doubt(self) -> bool:
        """Whether Redis may say that this slot owns tasks of which it reported the results already."""
        return self.store.n_rejoined != self._confirmed

    def _run_slice(self, driver: Driver, ticket: str) -> int:
        end = time.monotonic() + self.settings.slice
        ran = 0
        # Tickets that come late, behind other messages, come in heaps; only the first of them waits for work.
        mode = "" if self._was_useful else "l"
        while True:
            leaving = time.monotonic() >= end and not (self._helpers or self.is_in_doubt)
            taken = self._step("iq" if leaving else mode, 0 if leaving else self._want(), ticket)
            ticket = ""
            if taken:
                ran += self._run(driver, taken)
                mode = ""
            elif leaving and time.monotonic() < self._cut_off_until:
                # Slots cannot be called, as when Redis is full and with it the broker. Those that run must go
                # on: what they get done may be what frees memory.
                end = time.monotonic() + self.settings.slice
                mode = ""
            elif leaving or ("l" in mode and not self.is_in_doubt):
                self._was_useful = ran > 0
                return ran
            else:
                mode = "i" if self._wait_for_work(driver) or self._helpers else "il"

    def _step(self, mode: str, want: int, ticket: str = "") -> list[Taken]:
        """Report what is done, hand back what will not be run, take more: one round trip.

        Args:
            mode: see scripts/step.lua.
        """
        with self._reporting:
            taken = self._send(mode, want, self.batch.drain(), ticket)
        # After a lost reply Redis names all that this slot owns.
        return [t for t in taken if not self.batch.has_begun(t.attempt)]

    def _send(self, mode: str, want: int, reports: Reports, ticket: str = "") -> list[Taken]:
        if self.memory is not None:
            mode += "mp" if self.memory.is_paused else "m"
        pace_s = self._new_pace()
        if want > 0 and self.is_in_doubt:
            mode += "r"
        counts = self._due_counts(mode, ticket)
        began = time.perf_counter()
        try:
            step = self.store.step(
                self.name,
                self.node,
                ticket=ticket,
                mode=mode,
                want=want,
                done=reports.done,
                failed=reports.failed,
                back=[(task.key, task.attempt) for task in reports.back],
                missing=reports.missing,
                lines=self.notebook.pages(self.name, reports.lines) if reports.lines else (),
                pace_ms=None if pace_s is None else pace_s * 1000,
                counts=counts,
            )
        except BaseException:
            self.batch.restore(reports)  # repeated by the next step, which does no harm
            if counts:
                self._tally.restore(counts)
            raise
        self._tally.note(STEP, time.perf_counter() - began)
        if step.ticket_age_ms is not None:
            self._tally.note_ticket(step.ticket_age_ms)
        if want > 0:
            self._confirmed = self.store.n_rejoined  # with "r" from the start, or since it was repeated
        if reports.lines:
            self.notebook.count(len(reports.lines))
        if step.taken:
            self.notebook.turn_to(step.recordings)  # of these tasks; what waited goes back with each step
        if pace_s is not None:
            self._told_pace_s = pace_s
        if step.stale:
            log.info("%d reports came too late, first %s: void", len(step.stale), step.stale[0])
        self._settle_copies(reports.done, set(step.stale))
        if step.tickets:
            sent = self.send_tickets(step.tickets)
            self._cut_off_until = 0.0 if sent else time.monotonic() + self.settings.ticket_lease
        return step.taken

    def _settle_copies(self, reported: list[Done], late: set[str]) -> None:
        """Drop the copies of results that came too late; of the others Redis knows from now on."""
        known: list[str] = []
        unwanted: list[str] = []
        for done in reported:
            if done.kind == "n":
                (unwanted if done.key in late else known).append(str(done.data))
            elif done.kind == "b" and done.key in late:
                self.store.link.call("UNLINK", self.store.keys.blob(done.attempt, done.key))
        if self.memory is not None and (known or unwanted):
            self.memory.live.now_known(known)
            self.memory.drop(unwanted)
        if known and self.settings.publish == "always":
            made = [done for done in reported if done.kind == "n" and done.key not in late]
            self.store.mail(self.node, *(save_copy(str(done.data), done.key) for done in made))

    def _due_counts(self, mode: str, ticket: str) -> Mapping[str, int] | None:
        """Return what this step is to tell of what was counted, None mostly."""
        now = time.monotonic()
        if not ticket and now < self._tally_due and not ("q" in mode or "l" in mode):
            return None
        self._tally_due = now + TELL_S
        return self._tally.take()

    def _new_pace(self) -> float | None:
        """Return how long a task takes here, if Redis was told something else."""
        told, now = self._told_pace_s, self.seconds_per_task
        return None if 2 * told / 3 <= now <= 3 * told / 2 else now

    def _wait_for_work(self, driver: Driver) -> bool:
        """Wait up to the linger time for a wake-up."""
        name = self.store.keys.of("wake", self.name)
        self._turns.give(driver)
        try:
            is_called = self._wake.call("BLPOP", name, self.settings.linger) is not None
            if not is_called and self._may_trim:
                self._may_trim = False
                give_back()  # between tasks it would slow down the next one, which needs it again
            return is_called
        finally:
            self._turns.take(driver)

    def _want(self) -> int:
        most = min(
            self.settings.batch_target / self.seconds_per_task, BATCH_BYTES / (self.bytes_per_task + 1)
        )
        return max(1, min(self.settings.batch_limit, int(most)))

    def _run(self, driver: Driver, taken: list[Taken]) -> int:
        """Run tasks one after the other, until none is left or the driver is to end; returns how many ran."""
        batch, ran = self.batch, 0
        live = None if self.memory is None else self.memory.live
        batch.begin(taken)
        self._may_trim = True
        if len(taken) > 1:
            self._watch()
        if live is not None:
            live.begin()
        try:
            while self._turns.pass_on(driver) and (task := batch.next()) is not None:
                self._run_task(driver, task)
                ran += 1
        finally:
            if live is not None:
                live.end()
        return ran

    def _run_task(self, driver: Driver, task: Taken) -> None:
        driver.task = task
        try:
            report = self.runner.run(task)
        except BaseException:
            self.batch.give_up(task)
            raise
        finally:
            driver.task = None
        outcome = report.outcome
        self.batch.add(task, outcome, report.keep, report.line)
        self.seconds_per_task += 0.3 * (max(report.seconds, 1e-6) - self.seconds_per_task)
        nbytes = outcome.nbytes if isinstance(outcome, Done) else 0
        # Slowly down: what reduces large results has small ones.
        self.bytes_per_task = max(nbytes, 0.9 * self.bytes_per_task)

    # --- the watcher ---

    def _watch(self) -> None:
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch_forever, daemon=True)
            self._watcher.start()

    def _watch_forever(self) -> None:
        limit = LONG * self.settings.batch_target
        while not self._closed:
            self.batch.has_several.wait()
            time.sleep(limit / 2)
            try:
                with self._reporting:
                    reports = self.batch.drain_if_held_up(limit)
                    if reports is not None:
                        self._send("", 0, reports)
            except Exception as error:
                log.warning("could not hand back the tasks behind a long one: %s", error)

    # --- for tasks that wait for tasks ---

    def help_until(self, driver: Driver, wait: Wait, timeout: float | None) -> bool:
        """Wait inside a task of `driver`, while another thread drives; returns what `wait` returns.

        The task goes on when nothing else of this slot runs: then that thread has come to the end of what it
        was running, or that waits in its turn.
        """
        if wait(0):
            return True
        with driver.lock:
            driver.waiting += 1
            if driver.waiting == 1:
                driver.helper = self._start_helper().stop
                self._turns.give(driver)
        try:
            return wait(timeout) if self.interrupts is None else self.interrupts.wait(wait, timeout)
        finally:
            with driver.lock:
                driver.waiting -= 1
                if driver.waiting == 0:
                    driver.helper.set()
                    self._turns.resume(driver)

    def _start_helper(self) -> Driver:
        driver = Driver(self)
        if len(self._helpers) < MOST_HELPERS:
            self._helpers.add(driver)
            threading.Thread(target=self._help, args=(driver,), name="celery-mem-helper", daemon=True).start()
        else:
            log.warning("%d tasks of slot %s wait for each other's tasks", MOST_HELPERS, self.name)
        return driver

    def _help(self, driver: Driver) -> None:
        """Drive until told to end, which the driver that began to wait does when its task can go on."""
        here.set(driver)
        pause = NOTICE_S
        try:
            self._turns.take(driver)
            with standing_in(driver):
                while not driver.stop.is_set():
                    try:
                        pause = self._help_once(driver, pause)
                    except BaseException as error:
                        log.warning("slot %s cannot help a task that waits: %s", self.name, error)
                        self._sleep(driver, RETRY_PAUSE_S)
        finally:
            self._turns.give(driver)
            self._helpers.discard(driver)

    def _help_once(self, driver: Driver, pause: float) -> float:
        """Run what is ready; if there is nothing, or before a long task, see if the waiting one can go on."""
        want = self._want()
        if want == 1 and not self.batch.is_empty:
            self._step("", 0)
            if not self._sleep(driver, NOTICE_S):
                return pause
        taken = self._step("", want)
        if taken:
            self._run(driver, taken)
            return NOTICE_S
        self._step("i", 0)  # does not idle: a wake-up must go to a slot that listens
        self._sleep(driver, pause)
        return min(2 * pause, LONGEST_PAUSE_S)

    def _sleep(self, driver: Driver, seconds: float) -> bool:
        """Let others have their turn; returns whether `driver` has it again, and is not told to end."""
        self._turns.give(driver)
        return not driver.stop.wait(seconds) and self._turns.take(driver)

    def priority_of(self, task: Taken) -> float:
        """Read the priority of a task that runs here."""
        raw = self.store.link.call("HGET", self.store.keys.of("task", task.key), TASK["recipe"])
        recipe = read_recipe(raw)
        return 0.0 if recipe is None else recipe.priority

    # --- the end ---

    def retire(self) -> None:
        """Give up the slot after an error, in a thread: its tasks go back as soon as Redis can be told."""
        threading.Thread(target=self._sign_off, name="celery-mem-retired-slot", daemon=True).start()

    def _sign_off(self) -> None:
        while self._helpers:  # for tasks that wait for others; those end first
            time.sleep(RETRY_PAUSE_S)
        while True:
            try:
                self.batch.begin(self._step("r", 1))  # also what a lost reply gave
                self._step("iq", 0)
                break
            except NamespaceResetError:
                break  # with the old namespace all that it owned went
            except Exception as error:
                log.warning("slot %s cannot give back its tasks yet: %s", self.name, error)
                time.sleep(RETRY_PAUSE_S)
        self.close()

    def close(self) -> None:
        """Disconnect; the watcher ends."""
        self._closed = True
        self.batch.has_several.set()
        self._wake.close()
        self.runner.inputs.close()
        self.store.link.close()
