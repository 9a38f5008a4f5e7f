"""Ends tasks inside the process that runs them, when the node's agent asks for it.

An exception in the thread of a task is the polite way, as it can clean up. Signals are heard by main threads
only, so that is for pool children. The agent asks again and again, and kills the process if the task does not
end.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from celery_mem.errors import TaskInterrupt
from celery_mem.graph.inside import Wait
from celery_mem.memory.asking import Listener, NobodyThere, socket_name, tell
from celery_mem.memory.process import own_identity
from celery_mem.memory.roots import AGENT_SOCKET
from celery_mem.worker.ticket_marks import TicketMark

if TYPE_CHECKING:
    from types import CodeType

    from celery_mem.state.store import Taken
    from celery_mem.worker.slot import Slot

SIGNAL = signal.SIGUSR2
CANCELLED, TIMEOUT = "cancelled", "timeout"
TELL_S = 0.5

_UNSAFE = ("celery_mem.client", "celery_mem.state", "celery_mem.memory", "celery_mem.worker")
"""Modules that an exception out of nowhere would leave with a lock held, or half a reply unread."""


class Timed(NamedTuple):
    """A call with a time limit, as a child tells its agent.

    Attributes:
        slot: which runs it.
        attempt: its attempt.
        seconds: the limit.
        due: when that is over, by the clock of `time.monotonic`, which all processes of a host share.
        key: key text.
    """

    slot: str
    attempt: str
    seconds: float
    due: float
    key: str

    def to_text(self) -> str:
        return f"{self.slot} {self.attempt} {self.seconds!r} {self.due!r} {self.key}"

    @classmethod
    def from_text(cls, text: str) -> Timed:
        slot, attempt, seconds, due, key = text.split(" ", 4)
        return cls(slot, attempt, float(seconds), float(due), key)


class Interrupts:
    """The calls that run in this process, and what is to become of them.

    Args:
        control: folder of the sockets by which the agent and the processes of its node speak.
        entry: the function whose frame a task's own frames begin after.
        by_signal: whether tasks run in the main thread, which is the one that makes this.

    Attributes:
        slot: the slot of a pool child.
        is_outdated: this process is to be replaced as soon as it has nothing to do.
    """

    def __init__(self, control: str, entry: CodeType, *, by_signal: bool) -> None:
        self.control = control
        self.slot: Slot | None = None
        self.is_outdated = False
        self._entry = entry
        self._main = threading.get_ident()
        self._calls: dict[str, int] = {}  # attempt -> thread that is in its call
        self._timed: dict[str, Timed] = {}
        self._due: dict[str, str] = {}  # attempt -> why it is to end
        self._asked: set[str] = set()  # attempts in their call that the agent wants to end
        self._raised: set[str] = set()  # those of them that had their exception; they get no second one
        self._void: set[str] = set()  # attempts that are not to begin their call
        self._may_break = False  # the main thread waits where an exception does no harm
        self._mark: TicketMark | None = None
        if by_signal:
            signal.signal(SIGNAL, self._on_signal)
            self._mark = TicketMark(control, own_identity())
        self._listener = Listener(control, socket_name(own_identity()), self._answer).start()

    # --- around a ticket, and around a call ---

    def begin_ticket(self) -> None:
        """The process runs a ticket from now on."""
        if self._mark is not None:
            self._mark.set()

    def end_ticket(self) -> None:
        """It does so no more."""
        if self._mark is not None:
            self._mark.clear()

    def enter(self, task: Taken, slot: str, timeout: float | None) -> None:
        """The call of a task begins in this thread. Raises TaskInterrupt if it is not to."""
        if task.attempt in self._void:
            self._void.discard(task.attempt)
            raise TaskInterrupt(CANCELLED)
        self._calls[task.attempt] = threading.get_ident()
        if timeout is not None:
            timed = Timed(slot, task.attempt, timeout, time.monotonic() + timeout, task.key)
            self._timed[task.attempt] = timed
            self._tell(f"t {timed.to_text()}")

    def leave(self, task: Taken) -> None:
        """The call is over. The agent hears of it: the next task may keep this process from any answer."""
        self._calls.pop(task.attempt, None)
        if task.attempt in self._timed or task.attempt in self._asked:
            self._timed.pop(task.attempt, None)
            self._due.pop(task.attempt, None)
            self._asked.discard(task.attempt)
            self._tell(f"o {task.attempt}")

    def _tell(self, message: str) -> None:
        with contextlib.suppress(NobodyThere, TimeoutError):  # a new agent asks by itself
            tell(self.control, AGENT_SOCKET, message, timeout=TELL_S)

    def wait(self, wait: Wait, timeout: float | None) -> bool:
        """Wait inside a call; here it may be ended."""
        if threading.get_ident() != self._main:
            return wait(timeout)
        try:
            self._may_break = True
            return wait(timeout)
        finally:
            self._may_break = False

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()
        if self._mark is not None:
            self._mark.close()

    # --- what the agent asks ---

    def _answer(self, question: str) -> str | None:
        """Answer the agent.

        `x <attempt> <why>`: does it still run, and if so, end it; y and the attempts of other tasks that have
        begun, or n. `l`: which calls have a time limit. `e`: end when there is nothing to do; y if tasks of
        the graph run now, else n.
        """
        verb, _, rest = question.partition(" ")
        if verb == "x":
            attempt, why = rest.split(" ")
            others = [other for other in list(self._calls) if other != attempt]
            return " ".join(["y", *others]) if self._end(attempt, why) else "n"
        if verb == "l":
            return "\n".join(["timed", *(timed.to_text() for timed in list(self._timed.values()))])
        if verb == "e":
            self.is_outdated = True
            return "y" if self.slot is not None and self.slot.is_at_work else "n"
        return None

    def _end(self, attempt: str, why: str) -> bool:
        thread = self._calls.get(attempt)
        if thread is None:
            return why == CANCELLED and self._keep_from_beginning(attempt)
        self._asked.add(attempt)
        if attempt not in self._calls:  # it ended at this moment, and may have looked before
            self._asked.discard(attempt)
            return False
        self._raised &= self._asked
        if thread == self._main and attempt not in self._raised:
            self._due[attempt] = why
            signal.pthread_kill(self._main, SIGNAL)
        return True

    def _keep_from_beginning(self, attempt: str) -> bool:
        """See that an attempt which is not in its call does not come to it; returns whether it has begun."""
        batch = None if self.slot is None else self.slot.batch
        if batch is None or batch.discard(attempt) or not batch.has_begun(attempt):
            return False
        self._void = {a for a in self._void if batch.has_begun(a)} | {attempt}
        return True

    def _on_signal(self, _: int, frame: FrameType | None) -> None:
        for attempt, why in list(self._due.items()):
            if self._calls.get(attempt) != self._main:
                self._due.pop(attempt, None)
            elif self._may_break or self._is_in_task(frame):  # else the agent asks once more
                del self._due[attempt]
                self._raised.add(attempt)
                raise TaskInterrupt(why)

    def _is_in_task(self, frame: FrameType | None) -> bool:
        """Whether the main thread is in code of the task, or of libraries that it uses, and not in ours."""
        while frame is not None and frame.f_code is not self._entry:
            if str(frame.f_globals.get("__name__", "")).startswith(_UNSAFE):
                return False
            frame = frame.f_back
        return frame is not None
