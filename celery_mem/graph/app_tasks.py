"""Tasks of a Celery app as functions of graph tasks: they travel by name, the worker's own app has them."""

from __future__ import annotations

from typing import Any

from celery_mem.errors import UnknownAppTaskError
from celery_mem.graph import inside

NO_LIMIT = 2**31 - 1
"""Retries of a task whose `max_retries` is None."""


class AppTask:
    """A function that runs the task `name` of the app whose worker this is.

    Args:
        only_autoretry: what is not in the `autoretry_for` of the task is not tried again.
    """

    def __init__(self, name: str, *, only_autoretry: bool = False) -> None:
        self.name = name
        self.only_autoretry = only_autoretry
        self.__name__ = name.rpartition(".")[2]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it as Celery does: bound, with a request, and as `current_task`."""
        from celery._state import _task_stack

        if inside.worker is None:
            raise UnknownAppTaskError(self.name, "a process that is no worker", ())
        app, node = inside.worker.app, inside.worker.node
        task = app.tasks.get(self.name)
        if task is None:
            raise UnknownAppTaskError(self.name, node, tuple(sorted(app.tasks)))
        key = inside.worker.task_key() or ""
        _task_stack.push(task)
        # Called directly, as far as Celery is concerned: `self.retry` then raises what it was given, and the
        # graph's own retries decide.
        task.push_request(id=key, root_id=key, args=args, kwargs=kwargs, hostname=node, called_directly=True)
        try:
            return task.run(*args, **kwargs)
        finally:
            task.pop_request()
            _task_stack.pop()

    def may_retry(self, error: BaseException) -> bool:
        """Whether the task says that it may be tried again after an error."""
        from celery.exceptions import Ignore, Retry

        worker = inside.worker
        task = None if worker is None else worker.app.tasks.get(self.name)
        if task is None or not self.only_autoretry:
            return True
        refused = (Ignore, Retry, *(getattr(task, "dont_autoretry_for", None) or ()))
        return not isinstance(error, refused) and isinstance(error, tuple(task.autoretry_for))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.name, self.only_autoretry)


class AppTaskAfter(AppTask):
    """The same, after something that it does not take, as an immutable signature of a chain."""

    def __call__(self, before: Any, *args: Any, **kwargs: Any) -> Any:
        """Run it without its first argument."""
        return super().__call__(*args, **kwargs)


def _rebuild(kind: type[AppTask], name: str, only_autoretry: bool) -> AppTask:
    return kind(name, only_autoretry=only_autoretry)


def is_app_task(func: Any) -> bool:
    """Tell whether something is a task of a Celery app."""
    return hasattr(func, "apply_async") and hasattr(func, "run") and isinstance(getattr(func, "name", 0), str)


def as_app_task(task: Any, retries: int) -> tuple[AppTask, int]:
    """Return what runs a task of an app, and how often it is retried.

    Args:
        retries: after any error; 0 if the caller did not say. Then the task does, with its `autoretry_for`.
    """
    if retries or not getattr(task, "autoretry_for", None):
        return AppTask(task.name), retries
    most = (getattr(task, "retry_kwargs", None) or {}).get("max_retries")
    if most is None:  # to Celery's `retry` it means what the task says
        most = task.max_retries
    return AppTask(task.name, only_autoretry=True), NO_LIMIT if most is None else max(0, int(most))
