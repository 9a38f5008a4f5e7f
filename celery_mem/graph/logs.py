"""Log lines say which task they are of, in formats of plain `logging` too."""

from __future__ import annotations

import logging
import sys

from celery_mem.graph import inside

NOBODY = "-"


class TaskKeyFilter(logging.Filter):
    """Gives log records `task_id` and `task_name`: key and function's name of the graph task that runs.

    In a plain task of Celery these are its own id and name; outside of tasks, "-". Add it to a handler, as
    that of a logger does not see what comes from loggers below: `handler.addFilter(TaskKeyFilter())`, or
    `{"()": "celery_mem.TaskKeyFilter"}` among the filters of `logging.config.dictConfig`. Threads that a task
    starts by itself belong to no task, except in a copy of its context, as `asyncio.to_thread` makes it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields to `record`, where no filter has yet; every record passes."""
        if not hasattr(record, "task_id"):
            record.task_id, record.task_name = _running() or (NOBODY, NOBODY)
        return True


def _running() -> tuple[str, str] | None:
    state = sys.modules.get("celery._state")  # where it is not loaded, no task runs
    task = None if state is None else state.get_current_task()
    if task is not None and task.request.id:
        return task.request.id, task.name
    return None if inside.worker is None else inside.worker.running_task()
