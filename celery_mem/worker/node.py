"""A worker becomes a node: the bootstep that announces it and keeps its agent."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from celery import bootsteps

from celery_mem.errors import UnsupportedPoolError
from celery_mem.graph.tickets import send_tickets
from celery_mem.state.store import Store


log = logging.getLogger("celery_mem.worker")

POOLS = {
    "celery.concurrency.prefork": "prefork",
    "celery.concurrency.thread": "threads",
    "celery.concurrency.solo": "solo",
}


class NodeStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Runs in the worker's main process, which forks: no thread is started and no connection kept there."""

    requires = {"celery.worker.components:Pool"}

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        module = parent.pool_cls.__module__
        if module not in POOLS:
            raise SystemExit(
                str(
                    UnsupportedPoolError(
                        f"celery-mem runs on the pools prefork, threads and solo, not on {module.rpartition('.')[2]}; "
                        "start this worker with --pool=prefork"
                    )
                )
            )
        self.pool = POOLS[module]
        self.agent: subprocess.Popen[bytes] | None = None

    def start(self, parent: Any) -> None:
        """Announce the node, start its agent, and call for work that waits already."""
        app = parent.app
        settings = app.mem_settings()
        store = Store.connect(settings)
        store.heartbeat(
            parent.hostname,
            queue=settings.queue or _consumed_queue(app),
            slots=_slots(parent, self.pool),
            pid=os.getpid(),
            pool=self.pool,
            hostname=parent.hostname.partition("@")[2],
        )
        tickets = store.call_tickets()
        store.link.close()
        self.agent = subprocess.Popen(
            [sys.executable, "-m", "celery_mem.worker.agent", parent.hostname, str(os.getpid())],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self.agent.stdin is not None
        # By pipe, not by argument: the address may hold a password, and anyone may read a command line.
        self.agent.stdin.write(json.dumps(asdict(settings)).encode())
        self.agent.stdin.close()
        send_tickets(app, tickets)
        log.info("node %s: %s slots (%s)", parent.hostname, _slots(parent, self.pool), self.pool)

    def stop(self, parent: Any) -> None:
        """Take no more tickets; the agent stays until this process is gone and then signs the node off."""
        try:
            store = Store.connect(parent.app.mem_settings().replace(retry_timeout=1.0))
            store.heartbeat(parent.hostname, slots=0)
            store.link.close()
        except Exception as error:
            log.warning("could not announce the end of node %s: %s", parent.hostname, error)

    terminate = stop


def _slots(worker: Any, pool: str) -> int:
    return 1 if pool == "solo" else int(worker.concurrency)


def _consumed_queue(app: Any) -> str:
    names = list(app.amqp.queues.consume_from)
    default: str = app.conf.task_default_queue
    return default if default in names or not names else str(names[0])
