"""Tasks of a Celery app as functions of graph tasks: they travel by name, the worker's own app has them."""

from __future__ import annotations

from typing import Any

from celery_mem.errors import UnknownAppTaskError
from celery_mem.graph import inside


class AppTask:
    """A function that runs the task `name` of the app whose worker this is."""

    def __init__(self, name: str) -> None:
        self.name = name
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

    def __reduce__(self) -> tuple[Any, ...]:
        return AppTask, (self.name,)


class AppTaskAfter(AppTask):
    """The same, after something whose result it does not take, as an immutable signature of a chain."""

    def __call__(self, before: Any, *args: Any, **kwargs: Any) -> Any:
        """Run it without its first argument."""
        return super().__call__(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return AppTaskAfter, (self.name,)


def is_app_task(func: Any) -> bool:
    """Tell whether something is a task of a Celery app."""
    return hasattr(func, "apply_async") and hasattr(func, "run") and isinstance(getattr(func, "name", 0), str)


def as_app_task(task: Any, retries: int) -> tuple[AppTask, int]:
    """Return what runs a task of an app, and how often it is retried: as it says, unless the caller does."""
    own = int(task.max_retries or 0) if getattr(task, "autoretry_for", None) else 0
    return AppTask(task.name), retries or own
