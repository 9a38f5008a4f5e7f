"""Celery's signatures as graphs: a chain, group or chord becomes tasks that depend on each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from celery_mem.graph.app_tasks import AppTask, AppTaskAfter, as_app_task

if TYPE_CHECKING:
    from celery_mem.client.client import Client

WITHOUT_EFFECT = frozenset(
    {
        "ignore_result",
        "serializer",
        "compression",
        "reply_to",
        "group_id",
        "root_id",
        "parent_id",
        "chord",
        "retry",
    }
)
"""Options about messages and result backends, of which there are none here."""
Made = Any
"""A future; for a group a list of what its members made."""


def is_signature(x: Any) -> bool:
    """Tell whether something is a signature of Celery."""
    return isinstance(x, dict) and hasattr(x, "subtask_type") and hasattr(x, "apply_async")


def submit_signature(client: Client, sig: Any, args: Sequence[Any], options: dict[str, Any]) -> Made:
    """Submit all tasks of a signature.

    Args:
        args: go ahead of the signature's own arguments, as with `sig.delay(*args)`.
        options: of `Client.submit`, for each task.
    Raises:
        ValueError: an option of a signature means nothing in a graph; nothing was submitted of that task.
    """
    kind = sig.subtask_type
    if kind not in ("chain", "group", "chord"):
        return _submit_one(client, sig, tuple(args), options)
    _check_whole(sig)
    key = options.get("key")
    inner = {name: value for name, value in options.items() if name != "key"}
    if kind == "group":
        if key is not None:
            raise ValueError(f"a group has no key of its own, as {key!r}; its tasks may have one by task_id")
        return [submit_signature(client, part, args, inner) for part in _members(sig)]
    if kind == "chord":
        header = [submit_signature(client, part, args, inner) for part in _members(sig)]
        return submit_signature(client, sig.body, (header,), options)
    made: Made = None
    for i, part in enumerate(sig.tasks):
        told = options if i == len(sig.tasks) - 1 else inner
        made = submit_signature(client, part, args if i == 0 else (made,), told)
    return made


def _check_whole(sig: Any) -> None:
    for name, value in sig.options.items():
        if value is not None and value != [] and name not in WITHOUT_EFFECT | {"task_id"}:
            raise ValueError(
                f"{sig!r}: set the option {name}={value!r} on its tasks, it says nothing of the whole"
            )


def _members(sig: Any) -> Sequence[Any]:
    tasks = sig.tasks
    return list(tasks.tasks) if is_signature(tasks) else list(tasks)


def _submit_one(client: Client, sig: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Made:
    own: dict[str, Any] = {}
    for name, value in sig.options.items():
        if value is None or value == [] or name in WITHOUT_EFFECT:
            continue
        if name == "task_id":
            own["key"] = value
        elif name == "queue":
            own["queue"] = getattr(value, "name", value)
        elif name == "priority":
            own["priority"] = value
        elif name in ("time_limit", "soft_time_limit"):
            own["timeout"] = min(value, own.get("timeout", value))
        else:
            raise ValueError(
                f"{sig.task}: the option {name}={value!r} of its signature means nothing in a graph; take it "
                "away, or send the signature by Celery itself"
            )
    if taken := sorted(sig.kwargs.keys() & (options.keys() | {"key"})):
        raise ValueError(
            f"{sig.task}: submit has options {taken} of its own; give the task these by position"
        )
    options = {**options, "retries": _retries(sig, options.get("retries") or 0), **own}
    is_after = sig.immutable and bool(args)
    func = (AppTaskAfter if is_after else AppTask)(sig.task)
    return client.submit(func, *args, *sig.args, **sig.kwargs, **options)


def _retries(sig: Any, retries: int) -> int:
    try:
        task = sig.type
    except Exception:  # this process may know the task by its name only
        return retries
    return as_app_task(task, retries)[1]
