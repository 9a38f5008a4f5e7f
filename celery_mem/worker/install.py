"""`install(app)`: makes the workers of a Celery app run graph tasks beside its own."""

from __future__ import annotations

from typing import Any

from celery import Celery

from celery_mem.config import Settings
from celery_mem.graph.tickets import TASK_NAME
from celery_mem.worker.node import NodeStep
from celery_mem.worker.tickets import run_ticket


def install(app: Celery, **settings: Any) -> Celery:
    """Add celery-mem to a Celery app; call it once, after the app is configured.

    Args:
        app: the app; its own tasks, queues and result backend stay as they are.
        settings: `mem_*` settings without the prefix, which go before those of the app's configuration.
    Returns:
        the app.
    Raises:
        ConfigError: an unknown setting, or no Redis address.
    """
    if hasattr(app, "mem_settings"):
        return app
    app.mem_settings = lambda: Settings.load(app, **settings)

    # acks_late: a ticket that runs counts against the worker's prefetch, so no worker hoards tickets.
    @app.task(name=TASK_NAME, bind=True, ignore_result=True, acks_late=True, max_retries=0, track_started=False)
    def ticket(self: Any, ticket_id: str) -> int:
        return run_ticket(self.app, self.app.mem_settings(), self.request.hostname, ticket_id)

    app.steps["worker"].add(NodeStep)
    return app
