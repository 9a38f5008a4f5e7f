"""A whole cluster in threads of this process: the scripts, slots and coordinator of a real one."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from types import TracebackType
from typing import Any, Self

from celery_mem.client import current
from celery_mem.client.client import Client
from celery_mem.config import Settings
from celery_mem.coordinator.daemon import Coordinator
from celery_mem.errors import CeleryMemError, NamespaceResetError
from celery_mem.graph import inside
from celery_mem.state.audit import audit, read
from celery_mem.state.link import IN_PROCESS
from celery_mem.state.store import Store, Tickets, node_news
from celery_mem.testing.server import make_pool
from celery_mem.testing.tickets import TicketApp
from celery_mem.worker.tickets import close_slot, run_ticket

log = logging.getLogger("celery_mem.testing")

QUEUE = "celery-mem"
JOIN_S = 10.0
TICK_S = 0.25
_numbers = itertools.count(1)


class LeftoverError(CeleryMemError):
    """Something is left in a cluster that should be empty."""


class InProcessCluster:
    """A cluster whose Redis is simulated, and whose slots are threads of this process.

    Tasks run as on a worker of the pool "threads", and what they are given and return goes through pickle.
    Not there: other processes, the memory of nodes (large results go through the simulated Redis), a way to
    stop a task that runs, `restart_workers` and `retire_workers`.

    Args:
        n_workers: number of nodes, named worker-1@local and so on.
        threads_per_worker: tasks that a node runs at the same time.
        resources: what each node has for `resources=`.
        settings: `mem_*` settings without the prefix.
    """

    def __init__(
        self,
        n_workers: int = 1,
        threads_per_worker: int = 2,
        *,
        resources: dict[str, float] | None = None,
        **settings: Any,
    ) -> None:
        self.url = f"redis://in-process-{next(_numbers)}"
        IN_PROCESS[self.url] = make_pool()
        try:
            # No broker carries events.
            fixed = {"url": self.url, "node_memory": False, "events": "off"}
            self.settings = Settings.load(**{**settings, **fixed})
            self.app = TicketApp(self.settings, QUEUE)
            self.store = Store.connect(self.settings)
        except BaseException:
            del IN_PROCESS[self.url]
            raise
        self.closed = False
        self.workers = [f"worker-{n + 1}@local" for n in range(n_workers)]
        self._stop = threading.Event()
        self._news = node_news(
            queue=QUEUE,
            slots=str(threads_per_worker),
            pid=str(os.getpid()),
            pool="threads",
            hostname="local",
            dir="",
            resources=resources or {},
            status="running",
        )
        coordinator = Coordinator(Store.connect(self.settings), _Outside(self.app))
        agents = Store.connect(self.settings)
        self._announce(agents)
        self._threads = [
            threading.Thread(target=coordinator.run, args=(self._stop,), name="celery-mem-coordinator"),
            threading.Thread(target=self._renew, args=(agents,), name="celery-mem-node"),
            *(
                threading.Thread(target=self._work, args=(node,), name=f"celery-mem-slot-{node}")
                for node in self.workers
                for _ in range(threads_per_worker)
            ),
        ]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def client(self, **options: Any) -> Client:
        """Return a new client of this cluster; `options` as for `Client`."""
        return Client(self.app, **options)

    def check_empty(self, timeout: float = 5.0) -> None:
        """See that no task and no result is left, and that every rule of the graph holds.

        Args:
            timeout: seconds that what was released may take to go.
        Raises:
            LeftoverError: something is left; the text names the keys.
        """
        deadline = time.monotonic() + timeout
        while (left := self._leftovers()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if left:
            raise LeftoverError(f"left in the cluster {self.url}: {left}")

    def _leftovers(self) -> str:
        records = sorted(read(self.store).records.items())
        found = [f"{key} ({record.state})" for key, record in records[:10]]
        found += ["..."] * (len(records) > len(found))
        return ", ".join(found or map(str, audit(self.store)))

    def close(self) -> None:
        """End the cluster, when the tasks that run have ended; harmless when repeated."""
        if self.closed:
            return
        self.closed = True
        current.close_of_worker(self.url)
        self._stop.set()
        self.app.stop()
        deadline = time.monotonic() + JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("a task still runs in thread %s of the cluster %s", thread.name, self.url)
        self.store.link.close()
        if inside.worker is not None and inside.worker.app is self.app:
            inside.worker = None
        del IN_PROCESS[self.url]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<InProcessCluster {self.url!r}: {len(self.workers)} workers{', closed' * self.closed}>"

    # --- threads ---

    def _work(self, node: str) -> None:
        """Be one slot of a node."""
        try:
            while (ticket := self.app.take((QUEUE, self.store.keys.own_queue(node)))) is not None:
                try:
                    run_ticket(self.app, self.settings, node, ticket)
                except Exception:
                    log.exception("a ticket failed on %s", node)
        finally:
            close_slot()

    def _renew(self, store: Store) -> None:
        """Be the agents: keep the nodes' leases, and bring the nodes back after `Client.restart`."""
        while not self._stop.wait(min(TICK_S, self.settings.node_lease / 4)):
            try:
                self._announce(store)
            except NamespaceResetError:
                store.rejoin()
                self._announce(store)
        store.link.close()

    def _announce(self, store: Store) -> None:
        for node in self.workers:
            store.heartbeat(node, **self._news)
            # Mail asks to stop what runs, or to drop files: there is nothing here that could.
            store.link.call("DEL", store.keys.of("mail", node))


class _Outside:
    """What the coordinator does through Celery, where there is none."""

    def __init__(self, app: TicketApp) -> None:
        self._app = app

    def send_tickets(self, tickets: Tickets) -> None:
        for queue, ticket in tickets:
            self._app.send_task("", args=(ticket,), queue=queue or QUEUE)

    def stop_worker(self, node: str) -> None:
        log.warning("%s is a part of this process and goes on", node)

    def delete_queue(self, queue: str) -> None:
        """There is none to delete."""
