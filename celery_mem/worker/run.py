"""Runs one task: fetch its function and inputs, call it, turn what comes out into a report."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
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
from celery_mem.graph.calls import call_name, decode_call, decode_function, timeout_of
from celery_mem.graph.errors import encode_error, message_of
from celery_mem.graph.keys import key_of
from celery_mem.memory import blobs
from celery_mem.memory.seal import MARK, Kind, seal_of
from celery_mem.memory.serialize import dumps
from celery_mem.state.link import Command
from celery_mem.state.store import Done, Failed, Missing, Store, Taken
from celery_mem.worker.events import Run, TaskEvents
from celery_mem.worker.inputs import Inputs, InputsMissingError, NodeInputs, StoredInputs
from celery_mem.worker.interrupts import TIMEOUT, Interrupts
from celery_mem.worker.memory import ProcessMemory, token_suffix

KEPT_FUNCTIONS = 1000


class Report(NamedTuple):
    """What came of one task.

    Attributes:
        outcome: its completion, its failure, or which of its inputs were not there.
        seconds: how long the call took.
        keep: the result, if futures are inside: until Redis has the report, only this object pins them.
    """

    outcome: Done | Failed | Missing
    seconds: float
    keep: Any


class TaskRunner:
    """Runs the tasks of one slot. A task that waits for another may have it run inside itself.

    Args:
        store: where functions, inputs and results are.
        settings: limits.
        memory: of this process; None if all results go through Redis.
        slot: its name.
        interrupts: told of each call; None where tasks cannot be ended.
        events: shows tasks to others; None if nobody is to see them.
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
    ) -> None:
        self.store = store
        self.slot = slot
        self.events = events
        self.interrupts = interrupts
        self.settings = settings
        self.seal = seal_of(settings)
        self.inputs: Inputs = StoredInputs(store, settings) if memory is None else NodeInputs(store, memory)
        self.memory = memory
        self._functions: dict[str, Callable[..., Any]] = {}

    def run(self, task: Taken) -> Report:
        """Run a task; what it raises is in the report.

        Raises:
            WorkerShutdown, WorkerTerminate: this worker is asked to stop.
            RedisUnavailableError: no inputs or no place for the result; not the task's fault.
        """
        started = time.perf_counter()
        outcome: Done | Failed | Missing
        keep = None
        shown = None if self.events is None else self.events.begin(task)
        try:
            func = self._function(task)
            started = time.perf_counter()
            timeout, args, kwargs = self._arguments(task)
            if shown is not None:
                shown.calls(func, args, kwargs)
            try:
                result = [self._call(task, timeout, func, args, kwargs)]
            except RedisUnavailableError as error:  # of a Redis that the task itself uses
                outcome = self._failure(task, error, shown)
            except TaskInterrupt as error:
                outcome = self._failure(task, self._named(task, timeout, error), shown)
            else:
                del args, kwargs  # an input may be part of the result, which is to be nobody else's
                if shown is not None:
                    shown.returned(result[0], time.perf_counter() - started)
                outcome, keep = self._store_result(task, result)
        except InputsMissingError as error:
            outcome = Missing(task.key, task.attempt, error.lost)
        except (WorkerShutdown, WorkerTerminate, RedisUnavailableError):
            raise
        except SystemExit as error:
            if _is_by_signal(error):
                raise WorkerTerminate(error.code) from error
            outcome = self._failure(task, error, shown)
        except BaseException as error:
            outcome = self._failure(task, error, shown)
        finally:
            if shown is not None and shown.end is None:
                shown.goes_back()
        return Report(outcome, time.perf_counter() - started, keep)

    def _call(
        self,
        task: Taken,
        timeout: float | None,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self.interrupts is None:
            return call_task(func, args, kwargs)
        try:
            self.interrupts.enter(task, self.slot, timeout)
            return call_task(func, args, kwargs)
        finally:
            self.interrupts.leave(task)

    def _named(self, task: Taken, timeout: float | None, error: TaskInterrupt) -> BaseException:
        """Return the error of a task that was ended; nobody will hear of one that was cancelled."""
        if timeout is None or error.reason != TIMEOUT:
            return error
        named = TaskTimeoutError(task.key, timeout, self.slot.rpartition("|")[0])
        named.__cause__, named.__traceback__ = error, error.__traceback__
        return named

    def _failure(self, task: Taken, error: BaseException, shown: Run | None) -> Failed:
        if shown is not None:
            shown.raised(error)
        elif self.events is not None:
            self.events.failed(task, error)
        if not isinstance(error, Exception):
            exit_error = TaskExitError(
                f"task {task.key} raised {type(error).__name__}({message_of(error)}), "
                "which would have ended its worker"
            )
            exit_error.__cause__ = error
            exit_error.__traceback__ = error.__traceback__
            error = exit_error
        may_retry = not isinstance(error, SerializationError | SignatureError | UnreadableRecordError)
        data = encode_error(error, skip_frames=_own_frames(error), key=task.key)
        return Failed(task.key, task.attempt, self.seal.close(Kind.ERROR, "", data), may_retry)

    def _function(self, task: Taken) -> Callable[..., Any]:
        name = task.function
        if not name:
            raise UnreadableRecordError(f"the record of {task.key}")
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

    def _arguments(self, task: Taken) -> tuple[float | None, tuple[Any, ...], dict[str, Any]]:
        """Return the time limit of a call, and its arguments."""
        payload = task.payload
        if task.payload_blob:
            name = self.store.keys.blob(task.payload_blob, task.key)
            found = blobs.read(self.store.link, name, "arguments")
            if found is None or len(found[1]) != 1:
                raise DataLostError(key_of(task.key), "the blob with its arguments is gone")
            payload = bytes(found[1][0])
        keys = [i.key for i in task.inputs]
        if self.seal.is_on or payload[:1] == MARK:
            payload = self.seal.open(Kind.PAYLOAD, call_name(task.key, task.function, keys), payload)
        timeout, payload = timeout_of(payload)
        return timeout, *decode_call(payload, keys, self.inputs.read(task.inputs))

    def _store_result(self, task: Taken, box: list[Any]) -> tuple[Done, Any]:
        """Put a result where it belongs; returns its report, and the result if that must live on meanwhile.

        Args:
            box: the result, which is taken out: nothing else may refer to what is kept in node memory.
        """
        result = box.pop()
        frames = self.seal.close_frames(task.key, dumps(result, f"the result of {task.key}"))
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
    thread = threading.Thread(target=context.run, args=(_run_apart, coroutine, outcome))
    thread.start()
    thread.join()
    value, error = outcome
    if error is not None:
        raise error
    return value


def _run_apart(coroutine: Coroutine[Any, Any, Any], outcome: list[Any]) -> None:
    try:
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
