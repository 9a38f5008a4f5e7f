"""Runs one task: fetch its function and inputs, call it, turn what comes out into a report."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from celery.exceptions import WorkerShutdown, WorkerTerminate
from redis.exceptions import ResponseError

from celery_mem.config import Settings
from celery_mem.errors import CeleryMemError, DataLostError, SerializationError, StoreFullError, TaskExitError
from celery_mem.graph.calls import decode_call, decode_function
from celery_mem.graph.errors import encode_error
from celery_mem.graph.keys import key_of
from celery_mem.memory import blobs
from celery_mem.memory.serialize import Frames, dumps, loads, loads_inline
from celery_mem.state.link import Command
from celery_mem.state.store import Done, Failed, Input, Store, Taken
from celery_mem.worker.cache import Cached, ResultCache

PIPELINED_BLOB = 1 << 20
"""Blobs up to this size are sent along with the report, larger ones before it."""


class Report(NamedTuple):
    """What came of one task.

    Attributes:
        done: its completion, or
        failed: its failure.
        before: commands to send ahead of the report.
        seconds: how long the call took.
    """

    done: Done | None
    failed: Failed | None
    before: list[Command]
    seconds: float


class TaskRunner:
    """Runs the tasks of one slot, one after the other.

    Args:
        store: where functions, inputs and results are.
        settings: limits.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.settings = settings
        self.results = ResultCache(settings.cache_bytes)
        self._functions: dict[str, Callable[..., Any]] = {}

    def run(self, task: Taken) -> Report:
        """Run a task. Only what asks this worker to stop is raised; all else is in the report."""
        started = time.perf_counter()
        try:
            func = self._function(task.function)
            started = time.perf_counter()
            args, kwargs = self._arguments(task)
            result = _call(func, args, kwargs)
            done, before = self._store_result(task, result)
            return Report(done, None, before, time.perf_counter() - started)
        except (WorkerShutdown, WorkerTerminate):
            raise
        except BaseException as error:
            return Report(None, _failure(task, error), [], time.perf_counter() - started)

    def discard(self, key: str, attempt: str) -> None:
        """Remove what `run` stored for a report that came too late."""
        self.store.link.call("UNLINK", self.store.keys.blob(attempt, key))
        self.results.drop(f"{attempt}:{key}")

    def _function(self, name: str) -> Callable[..., Any]:
        func = self._functions.get(name)
        if func is None:
            code = self.store.link.call("GET", self.store.keys.of("function", name))
            if code is None:
                raise CeleryMemError(f"the code of function {name} is not in Redis any more; submit the task again")
            func = decode_function(code)
            if len(self._functions) >= 1000:
                self._functions.clear()  # a bound, not a policy: they are fetched again
            self._functions[name] = func
        return func

    def _arguments(self, task: Taken) -> tuple[tuple[Any, ...], dict[str, Any]]:
        payload = task.payload
        if task.payload_blob:
            found = blobs.load(self.store.link, self.store.keys.blob(task.payload_blob, task.key), "arguments")
            if found is None:
                raise DataLostError(key_of(task.key), "the blob with its arguments is gone")
            payload = found[0]
        values = [self._input(i) for i in task.inputs]
        return decode_call(payload, [i.key for i in task.inputs], values)

    def _input(self, given: Input) -> Any:
        if given.kind == "v":
            return loads_inline(given.data, f"input {given.key}")
        name = f"{given.data.decode()}:{given.key}"
        cached = self.results.get(name)
        if cached is None:
            found = blobs.read(self.store.link, self.store.keys.blob(given.data.decode(), given.key), given.key)
            if given.kind != "b" or found is None:
                raise DataLostError(key_of(given.key), "its data was gone when a task came to read it")
            head, buffers = bytes(found[0]), found[1]
            cached = Cached(head, buffers, len(head) + sum(map(len, buffers)))
            self.results.put(name, cached)
        return loads(cached.head, [bytearray(b) for b in cached.buffers], f"input {given.key}")

    def _store_result(self, task: Taken, result: Any) -> tuple[Done, list[Command]]:
        frames = dumps(result, f"the result of {task.key}")
        nbytes = frames.nbytes
        type_name = type(result).__qualname__
        if nbytes <= self.settings.inline_limit:
            data = frames.inline()
            return Done(task.key, task.attempt, nbytes, type_name, "v", data, frames.contains), []
        commands = blobs.write_commands(
            self.store.keys.blob(task.attempt, task.key),
            frames,
            piece_bytes=self.settings.piece_bytes,
            lease_s=self.settings.blob_lease,
        )
        done = Done(task.key, task.attempt, nbytes, type_name, "b", task.attempt, frames.contains)
        # What the client may never see is written even so: a dependent may run in any slot.
        self._write(commands)
        self._keep(task, frames, nbytes)
        return done, []

    def _keep(self, task: Taken, frames: Frames, nbytes: int) -> None:
        self.results.put(f"{task.attempt}:{task.key}", Cached(frames.head, frames.buffers, nbytes))

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
                        f"Redis stayed at its maxmemory for {self.settings.retry_timeout:g} s: no room for a result; "
                        "release futures or give Redis more memory"
                    ) from error
            time.sleep(delay)  # frees work while Redis is full; wait for them
            delay = min(delay * 2, 2.0)


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = func(*args, **kwargs)
    return asyncio.run(result) if inspect.iscoroutine(result) else result


def _failure(task: Taken, error: BaseException) -> Failed:
    if not isinstance(error, Exception):
        exit_error = TaskExitError(
            f"task {task.key} raised {type(error).__name__}({error}), which would have ended its worker"
        )
        exit_error.__cause__ = error
        exit_error.__traceback__ = error.__traceback__
        error = exit_error
    may_retry = not isinstance(error, SerializationError)
    return Failed(task.key, task.attempt, encode_error(error, skip_frames=_own_frames(error)), may_retry)


def _own_frames(error: BaseException) -> int:
    """Count the frames at the top that are this file's: `run`, and `_call` if the task itself raised."""
    tb, n = error.__traceback__, 0
    while tb is not None and tb.tb_frame.f_code.co_filename == __file__:
        tb, n = tb.tb_next, n + 1
    return n if tb is not None else max(n - 1, 0)
