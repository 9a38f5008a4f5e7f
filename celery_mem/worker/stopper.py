"""The agent's part in ending tasks: those that were cancelled, those out of time, and all of a restart.

It asks the process that runs a task to end it, which raises an exception there. A task that does not end
within `mem_stop_grace` loses its process. On threads and in the worker's own process nothing can be stopped:
there what comes out of the task counts for nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from celery_mem.errors import CeleryMemError, NamespaceResetError, TaskTimeoutError
from celery_mem.graph.killed import encode_plain, give_up_slot, owned_by
from celery_mem.memory.asking import Listener, NobodyThere, ask, listeners, socket_name
from celery_mem.memory.process import is_alive
from celery_mem.memory.roots import AGENT_SOCKET
from celery_mem.state.keys import TASK, process_of
from celery_mem.state.records import read_core
from celery_mem.state.store import Failed, Store
from celery_mem.worker.interrupts import CANCELLED, TIMEOUT, Timed
from celery_mem.worker.ticket_marks import is_marked, remove_mark

log = logging.getLogger("celery_mem.agent")

ANSWER_S = 0.2
"""A process whose task holds the GIL gives no answer; that is one as well."""
AGAIN_S = 0.05
"""So often a process is asked to end a task."""
LOOK_S = 0.25
"""So often Redis is asked whether an attempt that was to be cancelled, and may be wanted still, is void."""
RETRY_S = 1.0


@dataclass
class Stop:
    """An attempt that is to end.

    Attributes:
        slot: which runs it.
        attempt: its number.
        key: key text.
        due: when it is to be looked at next, by `time.monotonic`.
        seconds: its time limit; None if it was cancelled.
        kill_at: when its process is killed; None before it was asked to end.
        company: attempts of other tasks that have begun there, as they wait for tasks.
    """

    slot: str
    attempt: str
    key: str
    due: float
    seconds: float | None = None
    kill_at: float | None = None
    company: frozenset[str] = frozenset()

    @property
    def why(self) -> str:
        return CANCELLED if self.seconds is None else TIMEOUT


class Stopper:
    """Ends tasks of one node, in a thread of its own.

    Args:
        node: name of the node.
        pool: "prefork", or another kind, whose tasks cannot be stopped.
        control: folder of the sockets of this node's processes.
        store: may be used by other threads too.
        exited: is told pid and exit code of each pool child that ended, as the worker reports it.
    """

    def __init__(
        self, node: str, pool: str, control: str, store: Store, exited: Callable[[int, int], None]
    ) -> None:
        self.node = node
        self.pool = pool
        self.control = control
        self.store = store
        self.exited = exited
        self._stops: dict[tuple[str, str], Stop] = {}  # by attempt and reason
        self._killed: dict[str, Stop | None] = {}  # process -> because of which its tasks go back
        self._changed = threading.Condition()
        self._closed = False
        self._listener: Listener | None = None
        self._thread = threading.Thread(target=self._run, name="celery-mem-stopper", daemon=True)

    def start(self) -> None:
        """Hear what processes say of their tasks; ask for what they told an agent before this one."""
        self._listener = Listener(self.control, AGENT_SOCKET, self._hear).start()
        for answer in self._ask_all("l").values():
            for line in answer.split("\n")[1:]:
                self._watch(Timed.from_text(line))
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        if self._listener is not None:
            self._listener.close()

    def cancel(self, slot: str, attempt: str, key: str) -> None:
        """Stop an attempt as soon as Redis says that it is void."""
        self._add(Stop(slot, attempt, key, time.monotonic()))

    def buries(self, process: str) -> bool:
        """Whether what a process ran is given back here: it was killed, and its tasks are not to blame."""
        return process in self._killed

    def replace_processes(self, *, give_back: bool) -> None:
        """Have all processes that run tasks of the graph replaced, now those that are at it.

        One that runs another task of Celery, or none, is replaced after its next.

        Args:
            give_back: what they ran is to run again; else the namespace that it belonged to is gone.
        """
        if self.pool != "prefork":
            log.warning("node %s: threads go on with the tasks that they run", self.node)
            return
        for process, answer in self._ask_all("e").items():
            # One that does not answer runs what holds the GIL: of the graph, or another task of Celery.
            if answer == "y" or (not answer and is_marked(self.control, process)):
                self._kill(process, Stop("", "", "", 0.0) if give_back else None)
        with self._changed:
            self._changed.notify()

    # --- inside ---

    def _hear(self, message: str) -> None:
        """Hear what the processes of the node say.

        `t ...`: a call with a time limit began; `o <attempt>`: such a call, or one that was to end, is over;
        `g <pid> <exit code>`: a pool child ended.
        """
        verb, _, rest = message.partition(" ")
        if verb == "t":
            self._watch(Timed.from_text(rest))
        elif verb == "o":
            with self._changed:
                for why in (CANCELLED, TIMEOUT):
                    self._stops.pop((rest, why), None)
        elif verb == "g":
            pid, code = rest.split(" ")
            self.exited(int(pid), int(code))

    def _watch(self, timed: Timed) -> None:
        self._add(Stop(timed.slot, timed.attempt, timed.key, timed.due, timed.seconds))

    def _add(self, stop: Stop) -> None:
        with self._changed:
            self._stops.setdefault((stop.attempt, stop.why), stop)
            self._changed.notify()

    def _ask_all(self, question: str) -> dict[str, str]:
        """Ask all processes that run tasks, or did; returns their answers, empty where none came."""
        names = [n for n in listeners(self.control) if n != AGENT_SOCKET]
        if not names:
            return {}
        with ThreadPoolExecutor(len(names)) as pool:
            answers = list(pool.map(lambda name: self._ask(name, question), names))
        found = {n.removesuffix(".sock"): a for n, a in zip(names, answers, strict=True)}
        return {process: answer for process, answer in found.items() if answer is not None}

    def _ask(self, name: str, question: str) -> str | None:
        """Return the answer of a process: empty if it gave none, None if it is gone."""
        try:
            return ask(self.control, name, question, timeout=ANSWER_S, again_s=ANSWER_S / 2)
        except NobodyThere:
            with contextlib.suppress(OSError):
                os.unlink(f"{self.control}/{name}")
            remove_mark(self.control, name.removesuffix(".sock"))
            return None
        except TimeoutError:
            return ""

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                self._changed.wait(self._pause())
                now = time.monotonic()
                due = [stop for stop in self._stops.values() if stop.due <= now]
            try:
                for stop in due:
                    self._attend(stop)
                for process in list(self._killed):
                    self._give_back(process)
            except NamespaceResetError:
                self._stops.clear()  # the agent sees to it
                self._killed.clear()
            except CeleryMemError as error:
                log.warning("node %s: tasks that are to end must wait: %s", self.node, error)
                time.sleep(RETRY_S)
            except Exception:
                log.exception("node %s", self.node)
                time.sleep(RETRY_S)

    def _pause(self) -> float | None:
        dues = [stop.due for stop in self._stops.values()]
        if self._killed:
            dues.append(time.monotonic() + AGAIN_S / 5)
        return max(0.0, min(dues) - time.monotonic()) if dues else None

    def _attend(self, stop: Stop) -> None:
        """Take the next step towards the end of an attempt."""
        again_s = self._step(stop)
        with self._changed:
            if again_s is not None:
                stop.due = time.monotonic() + again_s
            else:
                self._stops.pop((stop.attempt, stop.why), None)

    def _step(self, stop: Stop) -> float | None:
        """Return the seconds until the next one; None if there is nothing left to do."""
        if stop.seconds is None and (wait_s := self._until_void(stop)) != 0:
            return wait_s
        if self.pool != "prefork":
            if stop.seconds is not None:
                self.store.step(stop.slot, self.node, want=0, failed=[self._overdue(stop)])
            return None
        process = process_of(stop.slot)
        if stop.kill_at is None:
            stop.kill_at = time.monotonic() + self.store.settings.stop_grace
        answer = self._ask(socket_name(process), f"x {stop.attempt} {stop.why}")
        if answer in (None, "n"):
            return None
        stop.company = frozenset((answer or "").split(" ")[1:])
        if (left := stop.kill_at - time.monotonic()) > 0:
            return min(AGAIN_S, left)
        if (stop.attempt, stop.why) not in self._stops:
            return None  # it is over: another task keeps the process from an answer
        log.warning(
            "task %s does not end though it is to (%s): process %s is killed", stop.key, stop.why, process
        )
        self._kill(process, stop)
        return None

    def _until_void(self, stop: Stop) -> float | None:
        """Return when to see again if an attempt is void, 0 if it is; None if it came to its end before."""
        core = self.store.link.call("HGET", self.store.keys.of("task", stop.key), TASK["core"])
        known = None if core is None else read_core(core)
        if known is None or known.attempt != stop.attempt:
            return 0
        return {"processing": LOOK_S, "memory": None, "erred": None}.get(known.state, 0)

    def _kill(self, process: str, stop: Stop | None) -> None:
        self._killed[process] = stop
        if is_alive(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.partition("-")[0]), signal.SIGKILL)

    def _give_back(self, process: str) -> None:
        """Give back what a process ran that was killed, once it is gone."""
        if is_alive(process):
            return
        stop = self._killed[process]
        if stop is not None:
            for raw in self.store.link.call("SMEMBERS", self.store.keys.of("node_slots", self.node)):
                slot = raw.decode()
                if process_of(slot) == process:
                    self._end_slot(slot, stop)
        del self._killed[process]

    def _end_slot(self, slot: str, stop: Stop) -> None:
        owned = owned_by(self.store, slot)
        failed = []
        if stop.seconds is not None and owned.get(stop.key) == stop.attempt:
            del owned[stop.key]
            failed.append(self._overdue(stop))
        back = [(key, attempt) for key, attempt in owned.items() if attempt not in stop.company]
        self.store.step(slot, self.node, want=0, failed=failed, back=back)
        # One that made what cannot be stopped, and waits for it, would do so again and again.
        give_up_slot(self.store, slot, self.node, death=f"it was killed to stop task {stop.key}")

    def _overdue(self, stop: Stop) -> Failed:
        assert stop.seconds is not None
        error = encode_plain(TaskTimeoutError(stop.key, stop.seconds, self.node), stop.key, self.store)
        return Failed(stop.key, stop.attempt, error, may_retry=True)
