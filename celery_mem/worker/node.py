"""A worker becomes a node: the bootstep that announces it and keeps its agent."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from celery import bootsteps, signals
from kombu.entity import Exchange, Queue

from celery_mem.errors import CeleryMemError, ConfigError, SchemaError, UnsupportedPoolError
from celery_mem.graph.broker import close_spare, line_of
from celery_mem.graph.constraints import ENOUGH, QUEUE
from celery_mem.graph.doctor import own_versions
from celery_mem.graph.tickets import REDIS, broker_of, send_tickets
from celery_mem.memory.files import NodeFolder
from celery_mem.memory.limits import memory_limit
from celery_mem.memory.process import own_identity
from celery_mem.memory.roots import SHARED_MEMORY, choose_root, remove_dead_folders
from celery_mem.memory.seal import warn_if_unsigned
from celery_mem.state.eviction import Eviction
from celery_mem.state.keys import META, NODE, Keys
from celery_mem.state.store import Store, node_news
from celery_mem.worker import children
from celery_mem.worker.agent import AGENT_SIGNALS
from celery_mem.worker.control import Control, make_control, note_generation, report_exits
from celery_mem.worker.revoking import hear_revoke
from celery_mem.worker.ticket_requests import acknowledge_old_tickets
from celery_mem.worker.tickets import close_events, close_interrupts, close_memory, know_worker

log = logging.getLogger("celery_mem.worker")

POOLS = {
    "celery.concurrency.prefork": "prefork",
    "celery.concurrency.thread": "threads",
    "celery.concurrency.solo": "solo",
}
AGENT_CHECK_S = 2.0
CHILDREN_S = 0.25
"""A pool child that was killed is replaced within this time."""
OLD_TICKETS_S = 60.0
SPARE_S = 2.0
ANNOUNCE_S = 2.0
"""How long the worker itself tries to tell Redis of its begin or end. Its signals have to wait meanwhile."""
LEAVE_S = 5.0
"""How long an agent may take to sign its node off, beside what saving takes."""


class NodeStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Runs in the worker's main process, which forks: no thread is started and no connection kept there."""

    requires = ("celery.worker.components:Timer", "celery.worker.components:Pool")

    def __init__(self, parent: Any, mem_resources: str = "", **options: Any) -> None:
        super().__init__(parent, **options)
        try:
            self.pool = supported_pool(parent.pool_cls)
            self.settings = parent.app.mem_settings()
            warn_if_unsigned(self.settings)
            self.resources = parse_resources(mem_resources)
        except (UnsupportedPoolError, ConfigError) as error:
            raise SystemExit(str(error)) from error
        self.agent: subprocess.Popen[bytes] | None = None
        self.news: dict[str, str] = {}
        self.slots = 1 if self.pool == "solo" else int(parent.concurrency)
        self.limit = memory_limit(self.settings.memory_limit)
        # Before the pool forks: its children find the folder in the app.
        self.folder = self._make_folder(parent.hostname) if self.settings.node_memory else None
        parent.app.mem_folder = "" if self.folder is None else self.folder.path
        self.control = Control(make_control(self.folder), self.pool)
        parent.app.mem_control = self.control
        if self.pool == "prefork":
            children.limit_memory(parent, self.limit // self.slots)
            signals.worker_process_init.connect(
                lambda **_: know_worker(parent.app, self.settings, parent.hostname), weak=False
            )
        else:
            know_worker(parent.app, self.settings, parent.hostname)
        if self.pool != "prefork" and self.slots > 1:
            # What its threads would import at any time, and at the same time; see `serialize.loads`.
            importlib.import_module("celery_mem.client.client")

    def start(self, parent: Any) -> None:
        """Announce the node, start its agent, and call for work that waits already."""
        consumed = list(parent.app.amqp.queues.consume_from)
        default = self.settings.queue or parent.app.conf.task_default_queue
        takes_all = default in consumed or not consumed
        queue = default if takes_all else consumed[0]
        self.news = node_news(
            queue=queue,
            slots=str(self.slots),
            pid=str(os.getpid()),
            pool=self.pool,
            hostname=parent.hostname.partition("@")[2],
            dir=parent.app.mem_folder,
            control=self.control.folder,
            limit=str(self.limit),
            resources={f"{QUEUE}{name}": ENOUGH for name in consumed} | self.resources,
            status="running",
            **self._for_doctor(parent),
        )
        self.own_queue = Keys(self.settings.namespace).own_queue(parent.hostname)
        # By the default exchange: a binding of its own would be left behind, in Redis for ever. Durable, as
        # RabbitMQ 4 lets no others be shared; it goes with its consumer all the same.
        parent.app.amqp.queues.select_add(
            Queue(self.own_queue, Exchange(""), self.own_queue, durable=True, auto_delete=True)
        )
        self._keep_agent(parent.hostname)
        hear_revoke()
        if self.pool == "prefork":
            report_exits(parent.pool._pool, self.control.folder)
            # Celery's own look comes every five seconds.
            parent.timer.call_repeatedly(CHILDREN_S, parent.pool._pool.maintain_pool)
        parent.timer.call_repeatedly(AGENT_CHECK_S, self._keep_agent, (parent.hostname,))
        parent.timer.call_repeatedly(OLD_TICKETS_S, acknowledge_old_tickets)
        parent.timer.call_repeatedly(SPARE_S, close_spare_of, (parent,))
        signals.worker_ready.connect(lambda **_: close_spare_of(parent), weak=False)
        atexit.register(self._leave, os.getpid())
        try:
            # The agent would do this too, a moment later; and it does if there is no Redis yet.
            store = Store.connect(self.settings.replace(retry_timeout=ANNOUNCE_S))
            note_generation(self.control.folder, store.generation, first=True)
            Eviction(store.link).warn()
            if not takes_all and store.link.call("HGET", store.keys.fixed("meta"), META["queue"]):
                self.news["queue"] = ""  # tickets for any worker go where most of them look
            store.heartbeat(parent.hostname, **self.news)
            send_tickets(parent.app, store.call_tickets())
            line_of(parent.app).hang_up()
            store.link.close()
        except SchemaError as error:
            raise SystemExit(str(error)) from error
        except CeleryMemError as error:
            log.warning("node %s joins later: %s", parent.hostname, error)
        log.info("node %s: %s slots (%s)", parent.hostname, self.slots, self.pool)

    def _for_doctor(self, parent: Any) -> dict[str, Any]:
        """What graph/doctor.py looks at."""
        told: dict[str, Any] = {"versions": own_versions(), "hashseed": os.environ.get("PYTHONHASHSEED", "")}
        told["broker"] = broker_of(parent.app)
        if self.settings.node_memory:
            with contextlib.suppress(OSError):
                room = os.statvfs(self.settings.shm_folder or SHARED_MEMORY)
                told["shm"] = str(room.f_bavail * room.f_frsize)
        options = parent.app.conf.broker_transport_options or {}
        if told["broker"] == REDIS and "visibility_timeout" in options:
            told["visibility"] = str(options["visibility_timeout"])
        return told

    def stop(self, parent: Any) -> None:
        """Take no more tickets; the agent stays until all else is gone and then signs the node off."""
        if not self.news:
            return  # it never started
        self.news = {}
        try:
            store = Store.connect(self.settings.replace(retry_timeout=ANNOUNCE_S))
            pid = store.link.call("HGET", store.keys.of("node", parent.hostname), NODE["pid"])
            if pid == str(os.getpid()).encode():  # no worker of the same name has started since
                store.heartbeat(parent.hostname, slots="0", status="stopping")
                self._delete_queue(parent.app)
            store.link.close()
        except Exception as error:
            log.warning("could not announce the end of node %s: %s", parent.hostname, error)

    terminate = stop

    def _make_folder(self, node: str) -> NodeFolder | None:
        root = choose_root(self.settings)
        if not root:
            return None
        for path in remove_dead_folders(root):
            log.info("removed %s, which a dead worker left", path)
        try:
            return NodeFolder.create(
                root,
                self.settings.namespace,
                node,
                own_identity(),
                recycle_bytes=self.settings.recycle_bytes,
                spill_url=self.settings.spill_url,
            )
        except OSError as error:
            log.warning("results go through Redis: no folder can be made in %s: %s", root, error)
            return None

    def _delete_queue(self, app: Any) -> None:
        with app.connection_for_write() as connection, contextlib.suppress(Exception):
            channel = connection.default_channel  # whatever the broker makes of this, it is only tidier
            channel.queue_purge(self.own_queue)
            channel.queue_delete(self.own_queue)

    def _leave(self, pid: int) -> None:
        """At the end of the process, when the pool is gone, have the agent sign the node off; wait for it.

        Where this process is all that a container runs, nobody would be left to save what only this node has.
        """
        if os.getpid() != pid:
            return
        close_memory()  # of a pool whose slots are threads of this process
        close_interrupts()
        close_events()
        self.news = {}
        if self.agent is not None and self.agent.poll() is None:
            self.agent.send_signal(signal.SIGUSR1)
            try:
                self.agent.wait(self.settings.save_seconds + LEAVE_S)
            except subprocess.TimeoutExpired:
                log.warning("the agent does not end; it will when it sees that the worker is gone")

    def _keep_agent(self, node: str) -> None:
        """Start the agent, again if somebody killed it: without it the node counts as gone."""
        if not self.news or (self.agent is not None and self.agent.poll() is None):
            return
        if self.agent is not None:
            log.warning("the agent of node %s is gone (%s); starting another", node, self.agent.returncode)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, AGENT_SIGNALS)
        try:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "celery_mem.worker.agent", node, str(os.getpid())],
                stdin=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert self.agent.stdin is not None
        # By pipe, not by argument: the address may hold a password, and anyone may read a command line.
        self.agent.stdin.write(json.dumps({"settings": asdict(self.settings), "news": self.news}).encode())
        self.agent.stdin.close()


def close_spare_of(parent: Any) -> None:
    """Close connections that Celery needed for the start of a worker, or now and then, and keeps."""
    consumer = getattr(parent, "consumer", None)
    if consumer is None:
        return
    for owner in (consumer, getattr(consumer, "event_dispatcher", None)):
        connection = getattr(owner, "connection", None)
        if connection is not None:
            close_spare(connection)


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


def parse_resources(text: str | None) -> dict[str, float]:
    """Return the amounts in a text such as "GPU=2,TPU=1".

    Raises:
        ConfigError: it is none.
    """
    found: dict[str, float] = {}
    for item in filter(None, (text or "").split(",")):
        name, sign, amount = item.partition("=")
        try:
            found[name.strip()] = float(amount)
        except ValueError:
            sign = ""
        if not (sign and name.strip() and found[name.strip()] >= 0):
            raise ConfigError(f"--mem-resources takes pairs such as GPU=2,TPU=1, not {text!r}")
    return found
