"""Celery's signatures as graphs: a chain, group or chord becomes tasks that depend on each other.

First the whole tree is checked and planned, then all of its tasks are submitted in one call: what is wrong
with one of them is raised before Redis has any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from celery_mem.client.placing import Placing
from celery_mem.client.submission import Submission, check_timeout
from celery_mem.graph.app_tasks import AppTask, AppTaskAfter, as_app_task
from celery_mem.graph.calls import encode_function
from celery_mem.graph.constraints import with_queue
from celery_mem.graph.keys import Key, text_of

if TYPE_CHECKING:
    from celery_mem.client.client import Client

WITHOUT_EFFECT = frozenset(
    {
        "ignore_result",
        "serializer",
        "compression",
        "reply_to",
        "group_id",
        "group_index",
        "root_id",
        "parent_id",
        "chord",
        "retry",
    }
)
"""Options about messages and result backends, of which there are none here."""
Made = Any
"""A future; for a group a list of what its members made."""


class _Options(NamedTuple):
    """Options of `Client.submit`, for one task."""

    priority: Any
    retries: int
    workers: Any
    allow_other_workers: bool | None
    resources: Any
    queue: str | None
    timeout: float | None


class _Task(NamedTuple):
    """One task. What is given to a tree goes ahead of its own arguments, or, if it is immutable, of all."""

    func: AppTask
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: Key | None
    options: _Options
    placing: Placing


class _Chain(NamedTuple):
    parts: list[_Plan]


class _Group(NamedTuple):
    parts: list[_Plan]


class _Chord(NamedTuple):
    header: _Group
    body: _Plan


_Plan = _Task | _Chain | _Group | _Chord


def is_signature(x: Any) -> bool:
    """Tell whether something is a signature of Celery."""
    return isinstance(x, dict) and hasattr(x, "subtask_type") and hasattr(x, "apply_async")


def submit_signature(
    client: Client,
    sig: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    key: Key | None,
    pure: bool,
    durable: bool,
    **options: Any,
) -> Made:
    """Submit all tasks of a signature, or none.

    Args:
        args, kwargs: join the signature's own arguments, as with `sig.delay(*args, **kwargs)`.
        options: others of `Client.submit`, for each task that does not say otherwise.
    Raises:
        ValueError: an option of a signature means nothing in a graph, or a key would name two of its tasks.
        TypeError: a part is no signature.
    """
    plan = _Planner(_Options(**options)).plan(sig, key, is_given=bool(args or kwargs))
    with Submission(client, durable=durable) as submission:
        return _Sender(client, submission, pure=pure).send(plan, args, kwargs)


class _Planner:
    """Checks a tree, and says what becomes of it."""

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._keys: set[str] = set()

    def plan(self, sig: Any, key: Key | None, *, is_given: bool, is_immutable: bool = False) -> _Plan:
        """Plan a tree, or a part of one.

        Args:
            key: of what it makes in the end.
            is_given: whether arguments are given to it, by the call or by the part before it.
            is_immutable: whether a tree around it takes none of them.
        """
        if not is_signature(sig):
            raise TypeError(f"a part of a signature is no signature of Celery: {sig!r}")
        kind = sig.subtask_type
        is_immutable = is_immutable or bool(sig.immutable)
        if sig.task == "celery.chunks":  # that would send messages
            sig, kind = sig.group(), "group"
        if kind not in ("chain", "group", "chord"):
            return self._task(sig, key, is_given=is_given, is_immutable=is_immutable)
        _check_whole(sig)
        if kind == "group":
            if key is not None:
                raise ValueError(
                    f"a group has no key of its own, as {key!r}; its tasks may have one by task_id"
                )
            return self._group(sig, is_given=is_given, is_immutable=is_immutable)
        if kind == "chain" and not sig.tasks:
            raise ValueError("a chain of no tasks makes nothing")
        if key is None and not _makes_list(sig):
            key = sig.options.get("task_id")
        if kind == "chord":
            header = self._group(sig, is_given=is_given, is_immutable=is_immutable)
            return _Chord(header, self.plan(sig.body, key, is_given=True))
        parts = []
        for i, part in enumerate(sig.tasks):
            is_first, is_last = i == 0, i == len(sig.tasks) - 1
            parts.append(
                self.plan(
                    part,
                    key if is_last else None,
                    is_given=is_given or not is_first,
                    is_immutable=is_immutable and is_first,
                )
            )
        return _Chain(parts)

    def _group(self, sig: Any, *, is_given: bool, is_immutable: bool) -> _Group:
        tasks = sig.tasks
        if is_signature(tasks):  # the header of a chord, if that was made of a group
            _check_whole(tasks)
            is_immutable = is_immutable or bool(tasks.immutable)
            tasks = tasks.tasks
        return _Group([self.plan(part, None, is_given=is_given, is_immutable=is_immutable) for part in tasks])

    def _task(self, sig: Any, key: Key | None, *, is_given: bool, is_immutable: bool) -> _Task:
        options = self._options
        for name, value in sig.options.items():
            if value is None or value == [] or name in WITHOUT_EFFECT:
                continue
            if name == "task_id":
                key = value if key is None else key
            elif name == "queue":
                options = options._replace(queue=getattr(value, "name", value))
            elif name == "priority":
                options = options._replace(priority=value)
            elif name not in ("time_limit", "soft_time_limit"):
                raise ValueError(
                    f"{sig.task}: the option {name}={value!r} of its signature means nothing in a graph; "
                    "take it away, or send the signature by Celery itself"
                )
        limits = [v for n in ("time_limit", "soft_time_limit") if (v := sig.options.get(n)) is not None]
        if limits:
            options = options._replace(timeout=min(limits))
        check_timeout(options.timeout)
        if key is not None:
            if text_of(key) in self._keys:
                raise ValueError(f"{sig.task}: another task of this signature has the key {key!r} too")
            self._keys.add(text_of(key))
        func, retries = _function(sig, options.retries)
        args, kwargs = tuple(sig.args), dict(sig.kwargs)
        if is_immutable and is_given:
            func = AppTaskAfter(func.name, only_autoretry=func.only_autoretry)
        placing = Placing(
            options.workers, options.allow_other_workers, with_queue(options.resources, options.queue)
        )
        return _Task(func, args, kwargs, key, options._replace(retries=retries), placing)


def _check_whole(sig: Any) -> None:
    for name, value in sig.options.items():
        if value is not None and value != [] and name not in WITHOUT_EFFECT | {"task_id"}:
            raise ValueError(
                f"{sig!r}: set the option {name}={value!r} on its tasks, it says nothing of the whole"
            )
    if sig.args or sig.kwargs.get("kwargs"):
        raise ValueError(f"{sig!r}: give its arguments to `submit`, or to its tasks")


def _makes_list(sig: Any) -> bool:
    """Whether what a tree makes in the end has no key: that of a group."""
    if sig.subtask_type == "chain":
        return _makes_list(sig.tasks[-1])
    return bool(sig.subtask_type == "group") or (sig.subtask_type == "chord" and _makes_list(sig.body))


def _function(sig: Any, retries: int) -> tuple[AppTask, int]:
    try:
        task = sig.type
    except Exception:  # this process may know the task by its name only
        return AppTask(sig.task), retries
    return as_app_task(task, retries)


class _Sender:
    """Adds the tasks of a plan to a call."""

    def __init__(self, client: Client, submission: Submission, *, pure: bool) -> None:
        self._client = client
        self._submission = submission
        self._pure = pure

    def send(self, plan: _Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Made:
        """Add what was planned.

        Args:
            args, kwargs: what is given to it.
        """
        if isinstance(plan, _Task):
            return self._send(plan, args, kwargs)
        if isinstance(plan, _Group):
            return [self.send(part, args, kwargs) for part in plan.parts]
        if isinstance(plan, _Chord):
            return self.send(plan.body, (self.send(plan.header, args, kwargs),), {})
        made: Made = None
        for part in plan.parts:
            made = self.send(part, args, kwargs)
            args, kwargs = (made,), {}
        return made

    def _send(self, task: _Task, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Made:
        client, submission, options = self._client, self._submission, task.options
        if isinstance(task.func, AppTaskAfter):
            args, kwargs = ((args, kwargs), *task.args), task.kwargs
        else:
            args, kwargs = (*args, *task.args), {**task.kwargs, **kwargs}
        function = encode_function(task.func)
        key = client.key_of_call(function, args, kwargs, pure=self._pure) if task.key is None else task.key
        submission.set_options(options.priority, options.retries, task.placing, options.timeout)
        text = text_of(key)
        state, is_new = submission.refer(text)
        if is_new:
            submission.add_call(text, task.func, function, args, kwargs)
        return client.future_of(key, state)
