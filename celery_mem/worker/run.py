"""Runs one task: fetch its function and inputs, call it, turn what comes out into a report."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from celery.exceptions import WorkerShutdown, WorkerTerminate
from redis.exceptions import ResponseError

from celery_mem.config import Settings
from celery_mem.errors import (
    CeleryMemError,
    DataLostError,
    RedisUnavailableError,
    SerializationError,
    SignatureError,
    StoreFullError,
    TaskExitError,
    TaskInterrupt,
    TaskTimeoutError,
    UnreadableRecordError,
)
from celery_mem.graph.app_tasks import AppTask
from celery_mem.graph.calls import call, call_name, decode_call, decode_function, timeout_of
from celery_mem.graph.errors import encode_error, message_of
from celery_mem.graph.keys import key_of
from celery_mem.graph.readers import only_read
from celery_mem.graph.tracing import context_of
from celery_mem.memory import blobs
from celery_mem.memory.seal import MARK, Kind, seal_of
from celery_mem.memory.serialize import dumps
from celery_mem.profiling.lines import Line, Notebook
from celery_mem.state.keys import node_of
from celery_mem.state.link import Command
from celery_mem.state.store import Done, Failed, Missing, Store, Taken
from celery_mem.worker.events import Run, TaskEvents
from celery_mem.worker.inputs import Inputs, InputsMissingError, NodeInputs, StoredInputs
from celery_mem.worker.interrupts import TIMEOUT, Interrupts
from celery_mem.worker.lending import Lender, borrows
from celery_mem.worker.memory import ProcessMemory, token_suffix
from celery_mem.worker.noting import Note
from celery_mem.worker.shown import name_in_display, shown_name
from celery_mem.worker.standing_in import StandIn, going_on, stand_in_of_thread
from celery_mem.worker.tracing import begin_span
from celery_mem.worker.watching import NOBODY, Audience, Watcher, is_cancelled

log = logging.getLogger("celery_mem.worker")

KEPT_FUNCTIONS = 1000


class _Call(NamedTuple):
    """A call with its arguments; `lent` is what of their memory is not the task's own."""

    func: Callable[..., Any]
    timeout: float | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    lent: list[memoryview]


class Report(NamedTuple):
    """What came of one task.

    Attributes:
        outcome: its completion, its failure, or which of its inputs were not there.
        seconds: how long the call took.
        keep: the result, if futures are inside: until Redis has the report, only this object pins them.
        line: for recordings, if there are any.
    """

    outcome: Done | Failed | Missing
    seconds: float
    keep: Any
    line: Line | None = None


class TaskRunner:
    """Runs the tasks of one slot. A task that waits for another may have it run inside itself.

    Args:
        store: where functions, inputs and results are.
        settings: limits.
        memory: of this process; None if all results go through Redis.
        slot: its name.
        interrupts: told of each call; None where tasks cannot be ended.
        events: shows tasks to others; None if nobody is to see them.
        notebook: says whether somebody records what runs.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        memory: ProcessMemory | None = None,
        *,
        slot: str = "",
        interrupts: Interrupts | None = None,
        events: TaskEvents | None = None,
        notebook: Notebook | None = None,
    ) -> None:
        self.notebook = notebook or Notebook()
        self.store = store
        self.slot = slot
        self._node = node_of(slot)
        self.events = events
        self.interrupts = interrupts
        self.settings = settings
        self.seal = seal_of(settings)
        self.inputs: Inputs = StoredInputs(store, settings) if memory is None else NodeInputs(store, memory)
        self.memory = memory
        self.lender = Lender()
        self._functions: dict[str, Callable[..., Any]] = {}

    def run(self, task: Taken) -> Report:
        """Run a task; what it raises is in the report.

        Raises:
            WorkerShutdown, WorkerTerminate: this worker is asked to stop.
            RedisUnavailableError: no inputs or no place for the result; not the task's fault.
        """
        started = time.perf_counter()
        outcome: Done | Failed | Missing | None = None
        keep = None
        shown = None if self.events is None else self.events.begin(task)
        note = Note(task) if self.notebook.is_open else None
        audience = NOBODY if shown is None and note is None else Audience(shown, note)
        try:
            context, payload = self._payload(task)
            if context:
                audience = Audience(*audience.watchers, self._begin_span(task, context))
            func = self._function(task)
            started = time.perf_counter()
            call = self._prepare(task, func, payload, self.lender.may(task, func))
            del payload
            audience.calls(func, call.args, call.kwargs)
            try:
                result = self._result(task, call)
            except RedisUnavailableError as error:  # of a Redis that the task itself uses
                outcome = self._failure(task, error, audience)
            except TaskInterrupt as error:
                outcome = self._failure(task, self._named(task, call.timeout, error), audience)
            else:
                del call  # an input may be part of the result, which is to be nobody else's
                audience.returned(result[-1], time.perf_counter() - started)
                outcome, keep = self._store_result(task, result)
        except InputsMissingError as error:
            outcome = Missing(task.key, task.attempt, error.lost)
        except (WorkerShutdown, WorkerTerminate, RedisUnavailableError):
            raise
        except SystemExit as error:
            if _is_by_signal(error):
                raise WorkerTerminate(error.code) from error
            outcome = self._failure(task, error, audience)
        except BaseException as error:
            outcome = self._failure(task, error, audience)
        finally:
            audience.ends(outcome)
        return Report(outcome, time.perf_counter() - started, keep, None if note is None else note.line)

    def _result(self, task: Taken, call: _Call) -> list[Any]:
        """Make a call; returns the pickled result or None, and the result."""
        if call.lent:
            result = self._call_on_loan(task, call)
            if result is not None:
                return result
            self.lender.refuse(task)
            call = self._prepare(task, call.func, self._payload(task)[1], may_lend=False)
        return [None, self._call(task, call)]

    def _call_on_loan(self, task: Taken, call: _Call) -> list[Any] | None:
        """Make a call whose inputs are lent, as `_result`; None if it must have inputs of its own."""
        try:
            result = self._call(task, call)
            frames = dumps(result, f"the result of {task.key}")
            if not borrows(frames.buffers, call.lent):
                return [frames, result]
            if hasattr(result, "flags") and hasattr(result, "copy"):  # an array that is a part of another
                del frames
                return [None, result.copy()]
        except Exception as error:
            log.debug("%s is called again, with inputs of its own: %s", task.key, error)
        return None

    def _call(self, task: Taken, call: _Call) -> Any:
        if self.interrupts is None:
            return call_task(call.func, call.args, call.kwargs)
        try:
            self.interrupts.enter(task, self.slot, call.timeout)
            return call_task(call.func, call.args, call.kwargs)
        finally:
            self.interrupts.leave(task)

    def _named(self, task: Taken, timeout: float | None, error: TaskInterrupt) -> BaseException:
        """Return the error of a task that was ended; nobody will hear of one that was cancelled."""
        if timeout is None or error.reason != TIMEOUT:
            return error
        named = TaskTimeoutError(task.key, timeout, self._node)
        named.__cause__, named.__traceback__ = error, error.__traceback__
        return named

    def _failure(self, task: Taken, error: BaseException, audience: Audience) -> Failed:
        """Report a task that raised, whatever the class of the exception does when it is looked at."""
        try:
            may_retry, data = self._described(task, error)
        except Exception as why:
            name = type.__repr__(type(error))
            log.warning("%s raised %s, which cannot be reported: %s", task.key, name, message_of(why))
            stand_in = CeleryMemError(f"task {task.key} raised an exception that cannot be examined: {name}")
            may_retry, data = True, encode_error(stand_in, key=task.key)
        audience.raised(error, data)
        if (
            self.events is not None
            and not is_cancelled(error)
            and not any(type(w) is Run for w in audience.watchers)
        ):
            self.events.failed(task, data)
        return Failed(task.key, task.attempt, self.seal.close(Kind.ERROR, "", data), may_retry)

    def _described(self, task: Taken, error: BaseException) -> tuple[bool, bytes]:
        """Return whether it may run again, and the error as it travels."""
        may_retry = self._may_retry(task, error)
        if not isinstance(error, Exception):
            exit_error = TaskExitError(
                f"task {task.key} raised {type(error).__name__}({message_of(error)}), "
                "which would have ended its worker"
            )
            exit_error.__cause__ = error
            exit_error.__traceback__ = error.__traceback__
            error = exit_error
        return may_retry, encode_error(error, skip_frames=_own_frames(error), key=task.key)

    def _may_retry(self, task: Taken, error: BaseException) -> bool:
        if isinstance(error, SerializationError | SignatureError | UnreadableRecordError):
            return False
        func: Any = self._functions.get(task.function)
        try:
            return not issubclass(type(func), AppTask) or func.may_retry(error)
        except Exception:  # classes of users may say of themselves what they are
            return True

    def name_of(self, task: Taken) -> str:
        """Return the name of a task's function for displays: what its key says, as long as it is not here."""
        func = self._functions.get(task.function)
        return name_in_display(task.key, "" if func is None or func is call else shown_name(func))

    def _function(self, task: Taken) -> Callable[..., Any]:
        name = task.function
        func = self._functions.get(name)
        if func is None:
            code = self.store.link.call("GET", self.store.keys.of("function", name))
            if code is None:
                raise CeleryMemError(f"the code of function {name} is not in Redis any more; submit again")
            func = decode_function(self.seal.open(Kind.FUNCTION, name, code))
            if len(self._functions) >= KEPT_FUNCTIONS:
                self._functions.clear()  # a bound, not a policy: they are fetched again
            self._functions[name] = func
        return func

    def _begin_span(self, task: Taken, context: bytes) -> Watcher | None:
        s = self.settings
        return begin_span(s.tracing, context, task, node=self._node, namespace=s.namespace)

    def _prepare(self, task: Taken, func: Callable[..., Any], payload: bytes, may_lend: bool) -> _Call:
        """Fetch the arguments of a call.

        Args:
            payload: what `_payload` returned.
            may_lend: inputs may be lent, if nothing among the arguments speaks against it.
        """
        keys = [i.key for i in task.inputs]
        timeout, payload = timeout_of(payload)
        lent: list[memoryview] = []
        if may_lend and keys:
            values = self.inputs.read(task.inputs, lent)
            try:
                found = decode_call(payload, keys, values, accepts=only_read if lent else None)
                if found is not None:
                    return _Call(func, timeout, *found, lent)
            except Exception as error:  # of one of Dask's nodes, which are evaluated on the way
                if not lent:
                    raise
                log.debug("the arguments of %s are made again: %s", task.key, error)
            self.lender.refuse(task)
        found = decode_call(payload, keys, self.inputs.read(task.inputs))
        assert found is not None
        return _Call(func, timeout, *found, [])

    def _payload(self, task: Taken) -> tuple[bytes, bytes]:
        """Return the trace that a call belongs to, and its payload; nothing of it is unpickled yet."""
        if not task.function:
            raise UnreadableRecordError(f"the record of {task.key}")
        payload = task.payload
        if task.payload_blob:
            name = self.store.keys.blob(task.payload_blob, task.key)
            found = blobs.read(self.store.link, name, "arguments")
            if found is None or len(found[1]) != 1:
                raise DataLostError(key_of(task.key), "the blob with its arguments is gone")
            payload = bytes(found[1][0])
        if self.seal.is_on or payload[:1] == MARK:
            keys = [i.key for i in task.inputs]
            payload = self.seal.open(Kind.PAYLOAD, call_name(task.key, task.function, keys), payload)
        return context_of(payload)

    def _store_result(self, task: Taken, box: list[Any]) -> tuple[Done, Any]:
        """Put a result where it belongs; returns its report, and the result if that must live on meanwhile.

        Args:
            box: its pickled form if there is one, and the result. Both are taken out: nothing else may refer
                to what is kept in node memory.
        """
        result, frames = box.pop(), box.pop()
        frames = self.seal.close_frames(task.key, frames or dumps(result, f"the result of {task.key}"))
        type_name, nbytes = type(result).__qualname__, frames.nbytes
        keep = result if frames.contains else None
        del result
        if nbytes <= self.settings.inline_limit:
            data = frames.inline()
            return Done(task.key, task.attempt, nbytes, type_name, "v", data, frames.contains), keep
        done = Done(task.key, task.attempt, nbytes, type_name, "b", task.attempt, frames.contains)
        if self.memory is not None and self.memory.live.has_room:
            token = f"{task.attempt}{token_suffix(self.store.generation)}"
            self.memory.live.add(task.key, token, frames)
            return done._replace(kind="n", data=token), keep
        name = self.store.keys.blob(task.attempt, task.key)
        # Ahead of the report, in calls of its own: one that Redis refuses must not count as a completion.
        self._write(
            blobs.write_commands(
                name, frames, piece_bytes=self.settings.piece_bytes, lease_s=self.settings.blob_lease
            )
        )
        self.inputs.note(task.key, task.attempt, frames)
        return done, keep

    def _write(self, commands: list[Command]) -> None:
        deadline = time.monotonic() + self.settings.retry_timeout
        delay = 0.05
        while True:
            try:
                blobs.write(self.store.link, commands)
                return
            except ResponseError as error:
                if "OOM" not in str(error) and "used memory" not in str(error):
                    raise
                if time.monotonic() + delay > deadline:
                    raise StoreFullError(
                        f"Redis stayed at its maxmemory for {self.settings.retry_timeout:g} s: "
                        "no room for a result; release futures or give Redis more memory"
                    ) from error
            time.sleep(delay)  # frees work while Redis is full; wait for them
            delay = min(delay * 2, 2.0)


def call_task(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a task's function, and run what it returns if that is a coroutine."""
    result = func(*args, **kwargs)
    return _run_coroutine(result) if inspect.iscoroutine(result) else result


def _run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    # Inside a task that is itself a coroutine and waits for this one: its loop is busy, loops do not nest.
    outcome: list[Any] = []
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(_run_apart, coroutine, outcome, stand_in_of_thread()))
    thread.start()
    thread.join()
    value, error = outcome
    if error is not None:
        raise error
    return value


def _run_apart(coroutine: Coroutine[Any, Any, Any], outcome: list[Any], stand_in: StandIn | None) -> None:
    try:
        with going_on(stand_in):
            outcome += (asyncio.run(coroutine), None)
    except BaseException as error:
        outcome += (None, error)


def _is_by_signal(error: SystemExit) -> bool:
    """Whether a pool child exits as it got a signal, and not because its task called `sys.exit`.

    Source: the handler in billiard/common.py, which exits with -(256 - number of the signal).
    """
    code = error.code
    return isinstance(code, int) and 256 + code in (
        signal.SIGTERM,
        signal.SIGQUIT,
        signal.SIGINT,
        signal.SIGHUP,
    )


def _own_frames(error: BaseException) -> int:
    """Count the frames at the top that are this file's: down to `call_task` if the task itself raised."""
    tb, n = error.__traceback__, 0
    while tb is not None and tb.tb_frame.f_code.co_filename == __file__:
        tb, n = tb.tb_next, n + 1
    return n if tb is not None else max(n - 1, 0)
