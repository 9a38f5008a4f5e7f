"""Who is measured: how each system is started, driven and stopped.

A contender offers the few verbs below, and workloads are written in these alone. The two systems
with futures of the same shape share `FuturesContender`; a system with another vocabulary (a `ray`
one, say) implements the verbs by itself and leaves out those that it has no counterpart for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

N_WORKERS = 2  # processes of one thread each, for every contender


class Contender:
    """One system under test, in a process that runs no other.

    Life: `load` (imports, not timed), `start` (a cluster and a client), `wait_ready` (all workers
    there), the verbs, `stop`.
    """

    name: ClassVar[str]

    def load(self) -> None:
        """Import what `start` needs, so that startup times a cluster and not an import."""
        raise NotImplementedError

    def start(self) -> None:
        """Start a cluster of `N_WORKERS` single-threaded processes and a client on it."""
        raise NotImplementedError

    def wait_ready(self) -> None:
        """Return when every worker is there."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop client and cluster; no process is left."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Name and version of everything whose version explains a figure."""
        raise NotImplementedError

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        """Start one task; a reference to its result."""
        raise NotImplementedError

    def map(self, function: Callable[..., Any], *iterables: Iterable[Any]) -> list[Any]:
        """Start one task per tuple of arguments; references in the same order."""
        raise NotImplementedError

    def result(self, reference: Any) -> Any:
        """Wait for one value."""
        raise NotImplementedError

    def gather(self, references: list[Any]) -> list[Any]:
        """Wait for many values, in the order given."""
        raise NotImplementedError

    def compute(self, collection: Any) -> Any:
        """Compute one Dask collection to its value."""
        raise NotImplementedError

    def drain(self) -> None:
        """Return when nothing is left of earlier work, so that it does not weigh on what follows."""
        raise NotImplementedError

    def redis_used_memory(self) -> int:
        """Bytes of memory that Redis has in use, connections' buffers apart; where there is a Redis."""
        raise NotImplementedError


class FuturesContender(Contender):
    """A contender whose client speaks `submit`, `map`, `gather` and `compute` with futures."""

    client: Any
    cluster: Any

    def wait_ready(self) -> None:
        self.client.wait_for_workers(N_WORKERS, timeout=60)

    def stop(self) -> None:
        self.client.close()
        self.cluster.close()

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.client.submit(function, *args)

    def map(self, function: Callable[..., Any], *iterables: Iterable[Any]) -> list[Any]:
        return self.client.map(function, *iterables)

    def result(self, reference: Any) -> Any:
        return reference.result()

    def gather(self, references: list[Any]) -> list[Any]:
        return self.client.gather(references)

    def compute(self, collection: Any) -> Any:
        return self.client.compute(collection).result()

    def drain(self) -> None:
        deadline = time.monotonic() + 30
        while left := self.count_tasks():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} still keeps {left} tasks, 30 s after the last was released")
            time.sleep(0.01)

    def count_tasks(self) -> int:
        """How many tasks the system keeps a record of."""
        raise NotImplementedError


class CeleryMem(FuturesContender):
    """celery-mem with its own LocalCluster: a private Redis, two prefork workers, a coordinator."""

    name = "celery-mem"

    def load(self) -> None:
        from celery_mem import Client, LocalCluster  # noqa: F401

    def start(self) -> None:
        import redis

        from celery_mem import Client, LocalCluster

        self.cluster = LocalCluster(n_workers=N_WORKERS, threads_per_worker=1)
        self.client = Client(self.cluster)
        self.redis = redis.Redis.from_url(self.cluster.url)

    def versions(self) -> dict[str, str]:
        import celery

        import celery_mem

        return {
            "celery-mem": getattr(celery_mem, "__version__", "?"),
            "celery": celery.__version__,
            "redis": str(self.client.info()["redis"]["version"]),
        }

    def count_tasks(self) -> int:
        return sum(self.client.info()["tasks"].values())

    def redis_used_memory(self) -> int:
        memory = self.redis.info("memory")
        return int(memory["used_memory"]) - int(memory.get("mem_clients_normal", 0))


class Distributed(FuturesContender):
    """dask.distributed as installed, without its dashboard."""

    name = "distributed"
    config: ClassVar[dict[str, Any]] = {}
    client_options: ClassVar[dict[str, Any]] = {}

    def load(self) -> None:
        import dask
        import distributed  # noqa: F401

        dask.config.set(self.config)

    def start(self) -> None:
        from distributed import Client, LocalCluster

        self.cluster = LocalCluster(
            n_workers=N_WORKERS, threads_per_worker=1, processes=True, dashboard_address=None
        )
        self.client = Client(self.cluster, **self.client_options)

    def versions(self) -> dict[str, str]:
        import dask
        import distributed

        return {"dask": dask.__version__, "distributed": distributed.__version__}

    def count_tasks(self) -> int:
        return len(self.cluster.scheduler.tasks)


class DistributedTuned(Distributed):
    """dask.distributed set for many short tasks: no queueing on the scheduler, direct gathers."""

    name = "distributed-tuned"
    config: ClassVar[dict[str, Any]] = {"distributed.scheduler.worker-saturation": float("inf")}
    client_options: ClassVar[dict[str, Any]] = {"direct_to_workers": True}


CONTENDERS: dict[str, type[Contender]] = {c.name: c for c in (CeleryMem, Distributed, DistributedTuned)}
REFERENCES = (Distributed.name, DistributedTuned.name)  # ratios are to the faster of these
