"""Every error a user can meet, by whose turn it is to act.

Fields are positional and reach `super().__init__`, so that errors survive pickling to other processes.
"""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import NoReturn


class CeleryMemError(Exception):
    """Base of all errors of this package."""


# --- the caller's turn: the call or the set-up is wrong --------------------------------------------------


class ConfigError(CeleryMemError, ValueError):
    """A setting is missing, misspelt or out of range; the text names it and the way out."""


class RedisUnavailableError(CeleryMemError, ConnectionError):
    """No usable Redis at the address: nobody answers, the password is wrong, or it is too old."""


class NoRedisServerError(CeleryMemError):
    """A private Redis was asked for and no server program is installed."""


class ClosedClientError(CeleryMemError):
    """The client was closed; make a new one."""


class UnboundFutureError(CeleryMemError, RuntimeError):
    """A future that belongs to no client here was asked for its result; use it inside `with client:`."""


class ForeignFutureError(CeleryMemError, ValueError):
    """A future of one client was given to another; send it through `client.future(key)` first."""


class SerializationError(CeleryMemError, TypeError):
    """A function, argument or result cannot be pickled; the text names it and its type."""


class PayloadTooLargeError(CeleryMemError, ValueError):
    """The arguments of a task are larger than this deployment takes; nothing was submitted.

    Args:
        key: key text of the task.
        nbytes: size of its pickled arguments.
        limit: the most, `mem_payload_limit`.
    """

    def __init__(self, key: str, nbytes: int, limit: int) -> None:
        super().__init__(key, nbytes, limit)
        self.key = key
        self.nbytes = nbytes
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"the arguments of task {self.key} take {self.nbytes:,} bytes pickled, and mem_payload_limit is "
            f"{self.limit:,}. Scatter large data and pass the future, "
            "client.submit(f, client.scatter(data)), or let the task load it; or raise the limit"
        )


class DeserializationError(CeleryMemError):
    """Bytes cannot be unpickled here, mostly because a module or a version differs; the text says which."""


class SignatureError(CeleryMemError):
    """A pickle stream is not signed as it must be here: it was not unpickled, and no task was run with it.

    Args:
        kind: what it is: a function, payload, result, error or dataset.
        name: key text, or for a function its hash.
        reason: what is wrong with it.
    """

    def __init__(self, kind: str, name: str, reason: str) -> None:
        super().__init__(kind, name, reason)
        self.kind = kind
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"the {self.kind} of {self.name} was refused: {self.reason}. Do all clients, workers and "
            "coordinators have the same mem_secret_key? If they do, somebody else writes to this Redis"
        )


class UnreadableRecordError(CeleryMemError, ValueError):
    """A task's record in Redis is not as this package writes them.

    Args:
        what: which part of which record.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return (
            f"{self.what} is not as celery-mem writes it: somebody else writes to this Redis, or under this "
            "namespace. Submit the task again, and see docs/security.md"
        )


class VersionMismatchError(CeleryMemError):
    """Client and worker run versions that cannot exchange tasks."""


class RecordingError(CeleryMemError, ValueError):
    """A file is no recording of what ran, or of another version; the text says which."""


class UnsupportedPoolError(CeleryMemError):
    """This Celery pool cannot run graph tasks; use prefork, threads or solo."""


class UnknownAppTaskError(CeleryMemError):
    """A worker's Celery app has no task of this name.

    Args:
        name: of the task.
        node: where it was to run.
        known: names of the tasks that the app has there.
    """

    def __init__(self, name: str, node: str, known: tuple[str, ...]) -> None:
        super().__init__(name, node, known)
        self.name = name
        self.node = node
        self.known = known

    def __str__(self) -> str:
        there = ", ".join(name for name in self.known if not name.startswith("celery")) or "none"
        return (
            f"the app of {self.node} has no task {self.name!r}; it has {there}. Does its worker run the app "
            "that registers it? Other workers can be left out by workers= or queue="
        )


class GraphCycleError(CeleryMemError, ValueError):
    """A graph depends on itself.

    Args:
        path: keys along the cycle, the first one repeated at the end.
    """

    def __init__(self, path: tuple[object, ...]) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return "the graph has a cycle: " + " -> ".join(map(repr, self.path))


class MissingKeyError(CeleryMemError, KeyError):
    """A graph names a key that is neither in it nor a live future.

    Args:
        key: the key that is missing.
        needed_by: the task (or the call) that names it.
    """

    def __init__(self, key: object, needed_by: object = None) -> None:
        super().__init__(key, needed_by)
        self.key = key
        self.needed_by = needed_by

    def __str__(self) -> str:
        by = "" if self.needed_by is None else f", needed by {self.needed_by!r},"
        return f"key {self.key!r}{by} is neither in the graph nor a live future"


class DatasetError(CeleryMemError, KeyError):
    """A dataset is published already, or is not, or what it needs is gone.

    Args:
        name: of the dataset.
        problem: what is wrong, and what to do.
    """

    def __init__(self, name: object, problem: str) -> None:
        super().__init__(name, problem)
        self.name = name
        self.problem = problem

    def __str__(self) -> str:
        return f"dataset {self.name!r} {self.problem}"


class UnknownWorkerError(CeleryMemError, ValueError):
    """A call needs workers that are not there.

    Args:
        names: the names that are of no node and no host.
        known: the nodes that are there.
    """

    def __init__(self, names: tuple[str, ...], known: tuple[str, ...]) -> None:
        super().__init__(names, known)
        self.names = names
        self.known = known

    def __str__(self) -> str:
        there = ", ".join(sorted(self.known)) or "none"
        return f"no worker is called {' or '.join(map(repr, self.names))}; there are: {there}"


class StoreFullError(CeleryMemError, MemoryError):
    """Redis is at its `maxmemory`; release futures, or give Redis more memory."""


# --- lost work: the task's own fate ------------------------------------------------------------------------


class FutureCancelledError(CeleryMemError, CancelledError):
    """The future was cancelled, by this client or by another one with force.

    Args:
        key: key of the future.
        reason: who did it, or why.
    """

    def __init__(self, key: object, reason: str = "") -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key!r} was cancelled" + (f": {self.reason}" if self.reason else "")


class FuturesCancelledError(CeleryMemError, CancelledError):
    """Several futures of one call were cancelled.

    Args:
        keys: their keys.
    """

    def __init__(self, keys: tuple[object, ...]) -> None:
        super().__init__(keys)
        self.keys = keys

    def __str__(self) -> str:
        return f"{len(self.keys)} futures were cancelled, first {self.keys[0]!r}"


class RemoteError(CeleryMemError):
    """A task raised an exception that cannot be rebuilt here.

    Args:
        type_name: qualified name of the original class.
        message: its text.
        traceback_text: the traceback as the worker printed it.
    """

    def __init__(self, type_name: str, message: str, traceback_text: str = "") -> None:
        super().__init__(type_name, message, traceback_text)
        self.type_name = type_name
        self.message = message
        self.traceback_text = traceback_text

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}"


class TaskExitError(CeleryMemError):
    """A task raised SystemExit or KeyboardInterrupt, which would have ended its worker."""


class TaskInterrupt(BaseException):
    """Raised inside a running task that was cancelled, or ran for longer than its `timeout`.

    Not an `Exception`, so that a task which retries what fails does not take it for a failure. A task may
    catch it to clean up, for `mem_stop_grace` seconds at most, and should let it pass.

    Args:
        reason: "cancelled" or "timeout".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TaskTimeoutError(CeleryMemError):
    """A task ran for longer than the `timeout` that it was submitted with, and was stopped.

    No TimeoutError: that is for a caller who waited long enough, and says nothing about the task.

    Args:
        key: key text.
        seconds: the limit.
        node: where it ran.
    """

    def __init__(self, key: str, seconds: float, node: str) -> None:
        super().__init__(key, seconds, node)
        self.key = key
        self.seconds = seconds
        self.node = node

    def __str__(self) -> str:
        return f"task {self.key} ran for longer than its timeout of {self.seconds:g} s on {self.node}"


class KilledWorkerError(CeleryMemError):
    """Processes died while they ran a task, more often than `mem_allowed_failures`: it is not tried again.

    Args:
        key: key text of the task.
        function: name of its function.
        deaths: one text for each process that died with it: its node, and how it ended.
        others: key texts of tasks that the last of them had in hand too; nobody can tell which is to blame.
    """

    def __init__(
        self, key: str, function: str, deaths: tuple[str, ...], others: tuple[str, ...] = ()
    ) -> None:
        super().__init__(key, function, deaths, others)
        self.key = key
        self.function = function
        self.deaths = deaths
        self.others = others

    def __str__(self) -> str:
        beside = f", beside {', '.join(self.others)} the last time" if self.others else ""
        return (
            f"task {self.key} ({self.function}) was running when its process died, {len(self.deaths)} times"
            f"{beside}: {'; '.join(self.deaths)}. It is not tried again: mem_allowed_failures is "
            f"{len(self.deaths) - 1}. Out of memory, a crash in compiled code, or os._exit?"
        )


class NoValidWorkerError(CeleryMemError):
    """No worker may run a task, and `mem_no_workers_timeout` is over.

    Args:
        reason: what was asked for and what there is.
        waited: for how long, seconds.
    """

    def __init__(self, reason: str, waited: float) -> None:
        super().__init__(reason, waited)
        self.reason = reason
        self.waited = waited

    def __str__(self) -> str:
        return f"no worker may run this task, after {self.waited:g} s: {self.reason}"


class JobError(CeleryMemError):
    """A job of the coordinator (rebalance, replicate, retire) ended without doing all that was asked.

    Args:
        job: what was asked.
        reason: what was left, and why.
    """

    def __init__(self, job: str, reason: str) -> None:
        super().__init__(job, reason)
        self.job = job
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.job}: {self.reason}"


class DataLostError(CeleryMemError):
    """A result is gone and nothing can make it again.

    Args:
        key: the key that is lost.
        reason: why it cannot be rebuilt.
    """

    def __init__(self, key: object, reason: str = "scattered data has no lineage") -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"the data of {self.key!r} is lost: {self.reason}"


class StateLostError(CeleryMemError):
    """Redis lost a task (it was emptied or replaced) and this client cannot make it again; submit it again.

    Args:
        key: the key that is lost.
        reason: what happened, and why the client cannot help it.
    """

    def __init__(self, key: object, reason: str = "") -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"Redis knows nothing of {self.key!r} any more: {self.reason}; submit it again"


class RestartedError(CeleryMemError):
    """Somebody restarted the cluster: all futures from before are cancelled, and this call is to be repeated.

    Args:
        reason: who did.
    """


# --- answers of the scripts ---------------------------------------------------------------------------------


class StateError(CeleryMemError):
    """A script refused a change of state.

    Args:
        script: the transition that was attempted.
        detail: what was found.
    """

    code = ""

    def __init__(self, script: str, detail: str) -> None:
        super().__init__(script, detail)
        self.script = script
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.script}: {self.detail}"


class NamespaceResetError(StateError, StateLostError):
    """The namespace is not the one this process joined: Redis was emptied, replaced or failed over."""

    code = "NAMESPACE_RESET"


class RestartingError(StateError):
    """The namespace is being restarted; who joins helps with that, users never see this."""

    code = "RESTARTING"


class UnknownClientError(StateError):
    """The client's lease ran out (60 s without a heartbeat) and what it held was released."""

    code = "UNKNOWN_CLIENT"


class UnknownDependencyError(StateError):
    """A task depends on a key of which there is no record; the future was released or cancelled."""

    code = "UNKNOWN_DEPENDENCY"


class UnknownFunctionError(StateError):
    """The function's code is not stored; the client sends it again, users never see this."""

    code = "UNKNOWN_FUNCTION"


class UnknownNodeError(StateError):
    """The node is not alive (any more): it left, or its lease ran out."""

    code = "UNKNOWN_NODE"


class NameTakenError(StateError):
    """A dataset of this name is published already."""

    code = "DATASET_EXISTS"


class FencedError(StateError):
    """Another coordinator leads now; this one's writes are void."""

    code = "FENCED"


class SchemaError(StateError):
    """The namespace was made by another version of celery-mem."""

    code = "SCHEMA"


BY_CODE: dict[str, type[StateError]] = {
    cls.code: cls
    for cls in (
        NamespaceResetError,
        RestartingError,
        UnknownClientError,
        UnknownDependencyError,
        UnknownFunctionError,
        UnknownNodeError,
        NameTakenError,
        FencedError,
        SchemaError,
    )
}


def raise_for_reply(reply: Exception, script: str) -> NoReturn:
    """Turn an error reply of a script into the class of its code.

    Raises:
        StateError: the class that `BY_CODE` maps the code to.
        StoreFullError: Redis refused the write for lack of memory.
        Exception: `reply` itself where the error is not ours.
    """
    text = str(reply)
    code, _, detail = text.partition(" ")
    if (error := BY_CODE.get(code)) is not None:
        raise error(script, detail) from reply
    if (
        "OOM command not allowed" in text
        or text.startswith("OOM")
        or "command not allowed when used memory" in text
    ):
        raise StoreFullError(
            f"{script}: Redis is at its maxmemory and refuses writes; release futures or raise maxmemory"
        ) from reply
    raise reply
