"""Tasks of the graph as Celery events, for Flower and whatever else listens: one message for many tasks.

The slots note what they run; a thread of the process makes events of it, twice a second, and sends them in
one message. What that costs is measured, and in `sampled` decides how many tasks the next half second may
note: the others cost a comparison.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery_mem.graph.broker import line_of
from celery_mem.graph.calls import call
from celery_mem.graph.errors import error_summary
from celery_mem.worker.shown import name_in_display, short, shown_name
from celery_mem.worker.watching import Watcher, is_cancelled

if TYPE_CHECKING:
    from celery import Celery

    from celery_mem.state.store import Done, Failed, Missing, Taken

log = logging.getLogger("celery_mem.worker")

PERIOD_S = 0.5
SHARE = 0.015
"""Of a process' time that events may take in `sampled`. Failed tasks beyond those get a third of it more:
together less than the twentieth that is promised."""
FIRST_COST_S = 2e-4
"""What the events of one task cost, before it is known."""
OWN_S = 5e-6
"""What it takes to note a task, without the short forms, whose time is measured."""
MOST = 10_000
"""Tasks noted in a period, also with `all`: a broker that is away must not fill the memory."""
MOST_TRACEBACK = 8_000


class Run(Watcher):
    """One attempt at a task, as others may see it."""

    def __init__(self, task: Taken, began: float) -> None:
        self.key = task.key
        self.parent = next((i.key for i in task.inputs), None)
        self.began = began
        self.name = ""
        self.args = self.kwargs = ""
        self.told = False  # that it began
        self.cost_s = OWN_S  # what this costs the thread of the task
        self.end: tuple[str, float, dict[str, Any]] | None = None  # type of event, time, fields

    def calls(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the call; before it, as it may change its arguments."""
        began = time.thread_time()
        if func is call and args:
            func, args = args[0], args[1:]
        self.args, self.kwargs = short(args), short(kwargs)
        self.name = shown_name(func)  # last: with it, the call may be told
        self.cost_s += time.thread_time() - began

    def returned(self, result: Any, seconds: float) -> None:
        """Note the result."""
        began = time.thread_time()
        self.end = "task-succeeded", time.time(), {"result": short(result), "runtime": seconds}
        self.cost_s += time.thread_time() - began

    def raised(self, error: BaseException, data: bytes) -> None:
        """Note that the task failed, or was stopped while it ran."""
        if is_cancelled(error):
            self.end = "task-revoked", time.time(), {"terminated": True, "signum": None, "expired": False}
        else:
            self.fails(data)

    def fails(self, data: bytes) -> None:
        """Note that the task failed, with the error as it travels."""
        began = time.thread_time()
        name, message, text = error_summary(data)
        fields = {
            "exception": f"{name.rpartition('.')[2]}({short(message)})",
            "traceback": text[-MOST_TRACEBACK:],
        }
        self.end = "task-failed", time.time(), fields
        self.cost_s += time.thread_time() - began

    def ends(self, outcome: Done | Failed | Missing | None) -> None:
        """Note that the attempt came to nothing, if it did: the task runs again, here or elsewhere."""
        if self.end is None:
            self.end = "task-retried", time.time(), {"exception": "it was broken off, and runs again"}


class TaskEvents:
    """Events of the tasks that the slots of one process run.

    Args:
        app: whose broker carries the events.
        node: name of the worker, under which they show.
        is_capped: `sampled`; else all are sent.
    """

    def __init__(self, app: Celery, node: str, *, is_capped: bool) -> None:
        self._app = app
        self._node = node
        self._is_capped = is_capped
        self._cost_s = FIRST_COST_S
        self._room = self._failures = 0
        self._lock = threading.Lock()
        self._runs: list[Run] = []
        self._roots: dict[str, str] = {}
        self._is_wanted = threading.Event()
        self._closed = False
        self._make_room()
        self._thread = threading.Thread(target=self._send_forever, name="celery-mem-events", daemon=True)
        self._thread.start()

    def begin(self, task: Taken) -> Run | None:
        """Note that a task begins; None if this period has had its share."""
        if self._room <= 0:
            return None
        self._room -= 1  # two threads may take the same place: one event more
        return self._note(Run(task, time.time()))

    def failed(self, task: Taken, error: bytes) -> None:
        """Note a task that failed and that was not to be shown: what went wrong goes first."""
        if self._failures > 0:
            self._failures -= 1
            run = Run(task, time.time())
            run.fails(error)
            self._note(run)

    def close(self) -> None:
        """Send what there is; the thread ends."""
        self._closed = True
        self._is_wanted.set()
        self._thread.join(2 * PERIOD_S)

    def _note(self, run: Run) -> Run:
        with self._lock:
            self._runs.append(run)
        if not self._is_wanted.is_set():
            self._is_wanted.set()
        return run

    def _make_room(self) -> None:
        most = min(MOST, int(PERIOD_S * SHARE / self._cost_s)) if self._is_capped else MOST
        self._room, self._failures = most, most // 3 + 1

    def _send_forever(self) -> None:
        pause = threading.Event()
        while not self._closed:
            self._is_wanted.wait()
            if not self._closed:
                pause.wait(PERIOD_S)
            self._is_wanted.clear()
            try:
                self._send()
            except Exception as error:  # whatever the broker's library raises; events are no promise
                log.debug("events of tasks are lost: %s", error)
            if self._runs:
                self._is_wanted.set()  # they will end
            self._make_room()

    def _send(self) -> None:
        with self._lock:
            runs, self._runs = self._runs, []
        began = time.thread_time()
        events: list[tuple[str, dict[str, Any]]] = []
        n_told, own_s = 0, 0.0
        for run in runs:
            own_s, run.cost_s = own_s + run.cost_s, 0.0
            news, is_over = self._news_of(run)
            events += news
            n_told += bool(news)
            if not is_over:
                with self._lock:
                    self._runs.append(run)
        if not events:
            return
        with line_of(self._app).use() as connection:
            dispatcher = self._app.events.Dispatcher(
                connection,
                self._node,
                True,
                connection.default_channel,
                False,
                buffer_group={"task"},
                buffer_limit=len(events) + 1,
            )
            for kind, fields in events:
                dispatcher.send(kind, **fields)
            dispatcher.flush()
        cost_s = (own_s + time.thread_time() - began) / n_told
        self._cost_s = max(cost_s, (self._cost_s + cost_s) / 2)

    def _news_of(self, run: Run) -> tuple[list[tuple[str, dict[str, Any]]], bool]:
        """Return the events of a run since it was looked at last, and whether it is over."""
        end = run.end
        found: list[tuple[str, dict[str, Any]]] = []
        if not run.told and (run.name or end is not None):
            run.told = True
            call = {
                "uuid": run.key,
                "name": name_in_display(run.key, run.name),
                "args": run.args,
                "kwargs": run.kwargs,
                "root_id": self._root_of(run),
                "parent_id": run.parent,
                "retries": 0,
                "eta": None,
                "timestamp": run.began,
            }
            found.append(("task-received", call))
            found.append(("task-started", {"uuid": run.key, "timestamp": run.began}))
        if end is not None:
            kind, when, fields = end
            found.append((kind, {"uuid": run.key, "timestamp": when, **fields}))
        return found, end is not None

    def _root_of(self, run: Run) -> str:
        """Return where the chain of first inputs begins, as far as this process knows."""
        root = run.key if run.parent is None else self._roots.get(run.parent, run.parent)
        if len(self._roots) >= MOST:
            self._roots.clear()  # a bound, not a policy
        self._roots[run.key] = root
        return root
