"""`install(app)`: makes the workers of a Celery app run graph tasks beside its own."""

from __future__ import annotations

import functools
from typing import Any

import click
from celery import Celery

from celery_mem.config import Settings
from celery_mem.graph.tickets import TASK_NAME
from celery_mem.worker.node import NodeStep
from celery_mem.worker.ticket_requests import TicketRequest
from celery_mem.worker.tickets import run_ticket


def install(app: Celery, **settings: Any) -> Celery:
    """Add celery-mem to a Celery app.

    The settings are read when a worker starts, which ends with an error text if one is unknown or no Redis
    address is found.

    Args:
        app: the app; its own tasks, queues and result backend stay as they are.
        settings: `mem_*` settings without the prefix, which go before those of the app's configuration.
    Returns:
        the app.
    """
    if hasattr(app, "mem_settings"):
        return app
    app.mem_settings = functools.cache(lambda: Settings.load(app, **settings))

    # acks_late: a ticket that runs counts against the worker's prefetch, so no worker hoards tickets.
    @app.task(
        name=TASK_NAME,
        shared=False,  # other apps of this process have a ticket of their own, or none
        bind=True,
        acks_late=True,
        ignore_result=True,
        track_started=False,
        Request=f"{TicketRequest.__module__}:{TicketRequest.__name__}",
    )
    def ticket(self: Any, ticket_id: str) -> int:
        return run_ticket(self.app, self.app.mem_settings(), self.request.hostname, ticket_id)

    app.steps["worker"].add(NodeStep)
    app.user_options["worker"].add(
        click.Option(
            ["--mem-resources"],
            default="",
            metavar="NAME=AMOUNT,...",
            help="What tasks may ask for with resources=, and how much this node has of it, e.g. GPU=2.",
        )
    )
    return app
