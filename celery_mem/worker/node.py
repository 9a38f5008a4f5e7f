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

from celery_mem.errors import CeleryMemError, ConfigError, SchemaError, UnsupportedPoolError
from celery_mem.graph.tickets import send_tickets
from celery_mem.state.keys import NODE
from celery_mem.state.store import Store

log = logging.getLogger("celery_mem.worker")

POOLS = {
    "celery.concurrency.prefork": "prefork",
    "celery.concurrency.thread": "threads",
    "celery.concurrency.solo": "solo",
}
AGENT_CHECK_S = 2.0
ANNOUNCE_S = 2.0
"""How long the worker itself tries to tell Redis of its begin or end. Its signals have to wait meanwhile."""


class NodeStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Runs in the worker's main process, which forks: no thread is started and no connection kept there."""

    requires = ("celery.worker.components:Timer", "celery.worker.components:Pool")

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        try:
            self.pool = supported_pool(parent.pool_cls)
            self.settings = parent.app.mem_settings()
        except (UnsupportedPoolError, ConfigError) as error:
            raise SystemExit(str(error)) from error
        self.agent: subprocess.Popen[bytes] | None = None
        self.news: dict[str, str] = {}

    def start(self, parent: Any) -> None:
        """Announce the node, start its agent, and call for work that waits already."""
        slots = 1 if self.pool == "solo" else int(parent.concurrency)
        self.news = {
            "queue": self.settings.queue or _consumed_queue(parent.app),
            "slots": str(slots),
            "pid": str(os.getpid()),
            "pool": self.pool,
            "hostname": parent.hostname.partition("@")[2],
        }
        self._keep_agent(parent.hostname)
        parent.timer.call_repeatedly(AGENT_CHECK_S, self._keep_agent, (parent.hostname,))
        try:
            # The agent would do this too, a moment later; and it does if there is no Redis yet.
            store = Store.connect(self.settings.replace(retry_timeout=ANNOUNCE_S))
            store.heartbeat(parent.hostname, **self.news)
            send_tickets(parent.app, store.call_tickets())
            store.link.close()
        except SchemaError as error:
            raise SystemExit(str(error)) from error
        except CeleryMemError as error:
            log.warning("node %s joins later: %s", parent.hostname, error)
        log.info("node %s: %s slots (%s)", parent.hostname, slots, self.pool)

    def stop(self, parent: Any) -> None:
        """Take no more tickets; the agent stays until this process is gone and then signs the node off."""
        if not self.news:
            return  # it never started
        self.news = {}
        try:
            store = Store.connect(self.settings.replace(retry_timeout=ANNOUNCE_S))
            pid = store.link.call("HGET", store.keys.of("node", parent.hostname), NODE["pid"])
            if pid == str(os.getpid()).encode():  # no worker of the same name has started since
                store.heartbeat(parent.hostname, slots="0")
            store.link.close()
        except Exception as error:
            log.warning("could not announce the end of node %s: %s", parent.hostname, error)

    terminate = stop

    def _keep_agent(self, node: str) -> None:
        """Start the agent, again if somebody killed it: without it the node counts as gone."""
        if not self.news or (self.agent is not None and self.agent.poll() is None):
            return
        if self.agent is not None:
            log.warning("the agent of node %s is gone (%s); starting another", node, self.agent.returncode)
        self.agent = subprocess.Popen(
            [sys.executable, "-m", "celery_mem.worker.agent", node, str(os.getpid())],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self.agent.stdin is not None
        # By pipe, not by argument: the address may hold a password, and anyone may read a command line.
        self.agent.stdin.write(json.dumps({"settings": asdict(self.settings), "news": self.news}).encode())
        self.agent.stdin.close()


def supported_pool(pool_cls: type) -> str:
    """Return the kind of a pool, as `--pool` spells it.

    Raises:
        UnsupportedPoolError: slots cannot run there.
    """
    for base in pool_cls.__mro__:
        if base.__module__ in POOLS:
            return POOLS[base.__module__]
    raise UnsupportedPoolError(
        "celery-mem runs on the pools prefork, threads and solo, not on "
        f"{pool_cls.__module__.rpartition('.')[2]}; start this worker with --pool=prefork"
    )


def _consumed_queue(app: Any) -> str:
    names = list(app.amqp.queues.consume_from)
    default: str = app.conf.task_default_queue
    return default if default in names or not names else str(names[0])
