"""Who is measured: how each system is started, driven and stopped.

A contender offers the few verbs below, and workloads are written in these alone. The two systems
with futures of the same shape share `FuturesContender`; `Ray`, with a vocabulary of its own,
implements the verbs by itself.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, ClassVar

N_WORKERS = 2  # processes of one thread each, for every contender


class Contender:
    """One system under test, in a process that runs no other.

    Life: `load` (imports, not timed), `start` (a cluster and a client), `wait_ready` (all workers
    there), the verbs, `stop`.
    """

    name: ClassVar[str]
    # Around what a workload times: a PeakMemory in a run that is for that, otherwise nothing.
    memory: AbstractContextManager[Any] = nullcontext()

    @classmethod
    def missing(cls) -> str | None:
        """What is not installed and keeps this contender out of a run."""
        return None

    @property
    def shared_files(self) -> str:
        """Globs, separated by colons, of files in shared memory that no process need have mapped."""
        return ""

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

    def wait(self, references: list[Any]) -> None:
        """Wait until all tasks are done, and fetch nothing."""
        raise NotImplementedError

    def scatter(self, values: list[Any]) -> list[Any]:
        """Put values on the cluster, none of them looked at for whether it is there already."""
        raise NotImplementedError

    def compute(self, collection: Any) -> Any:
        """Compute one Dask collection to its value."""
        raise NotImplementedError

    def persist(self, collection: Any) -> Any:
        """Start to compute one Dask collection into the cluster; a collection of what becomes of it."""
        raise NotImplementedError

    def drain(self) -> None:
        """Return when nothing is left of earlier work, so that it does not weigh on what follows."""
        deadline = time.monotonic() + 30
        while left := self.count_left():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} still keeps {left}, 30 s after the last was released")
            time.sleep(0.005)

    def count_left(self) -> int:
        """What the system itself says that it keeps of tasks and results; 0 for nothing."""
        raise NotImplementedError

    def redis_used_memory(self) -> int:
        """Bytes of memory that Redis has in use, connections' buffers apart; where there is a Redis."""
        raise NotImplementedError

    def kill_worker(self) -> None:
        """Kill one of the workers, as a crash would; where the system starts another, it may."""
        raise NotImplementedError

    def kill_child(self) -> None:
        """Kill the process that runs one worker's tasks, where that is not the worker itself."""
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

    def scatter(self, values: list[Any]) -> list[Any]:
        return self.client.scatter(values, hash=False)

    def compute(self, collection: Any) -> Any:
        return self.client.compute(collection).result()

    def persist(self, collection: Any) -> Any:
        return self.client.persist(collection)


class CeleryMem(FuturesContender):
    """celery-mem with its own LocalCluster: a private Redis, two prefork workers, a coordinator."""

    name = "celery-mem"

    def load(self) -> None:
        from celery_mem import Client, LocalCluster  # noqa: F401

    def start(self) -> None:
        import redis

        from celery_mem import Client, LocalCluster

        self.cluster = LocalCluster(n_workers=N_WORKERS, threads_per_worker=1, restart=True)
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

    def wait(self, references: list[Any]) -> None:
        from celery_mem import wait

        wait(references)

    def count_left(self) -> int:
        # Not `client.info()`, which reads every record: here only their names count.
        from celery_mem.state.keys import Keys

        names = Keys(self.client.settings.namespace).of("task", "*")
        n, cursor = 0, 0
        while True:
            cursor, page = self.redis.scan(cursor, match=names, count=100_000)
            n += len(page)
            if cursor == 0:
                break
        return n or sum(map(_results_in, self._folders()))

    @property
    def shared_files(self) -> str:
        return ":".join(f"{folder}/**" for folder in self._folders())

    def _folders(self) -> list[str]:
        """The folders of this cluster's nodes in shared memory, and of no other's."""
        from celery_mem.state.keys import NODE, Keys

        keys = Keys(self.client.settings.namespace)
        nodes = self.redis.zrange(keys.fixed("nodes"), 0, -1)
        told = [self.redis.hget(keys.of("node", node.decode()), NODE["dir"]) for node in nodes]
        return [path.decode() for path in told if path]

    def redis_used_memory(self) -> int:
        memory = self.redis.info("memory")
        return int(memory["used_memory"]) - int(memory.get("mem_clients_normal", 0))

    def kill_worker(self) -> None:
        os.kill(self.cluster.pids()["worker-1"], signal.SIGKILL)

    def kill_child(self) -> None:
        import psutil

        family = psutil.Process(self.cluster.pids()["worker-1"]).children()
        next(p for p in family if "celery_mem.worker.agent" not in p.cmdline()).kill()


def _results_in(folder: str) -> int:
    """Results in a node's files, on its disk, and bytes of those that their makers have not written yet."""
    from celery_mem.memory.asking import NobodyThere, ask, listeners
    from celery_mem.memory.roots import AGENT_SOCKET

    n = sum(len(os.listdir(f"{folder}/{part}")) for part in ("files", "spilled"))
    for name in () if n else listeners(folder):
        if name != AGENT_SOCKET:
            with suppress(NobodyThere):
                n += int(ask(folder, name, "live", timeout=10))
    return n


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

    def wait(self, references: list[Any]) -> None:
        from distributed import wait

        wait(references)

    def count_left(self) -> int:
        return len(self.cluster.scheduler.tasks)

    def kill_worker(self) -> None:
        os.kill(next(iter(self.client.run(os.getpid).values())), signal.SIGKILL)  # its nanny starts another


class DistributedTuned(Distributed):
    """dask.distributed set for many short tasks: no queueing on the scheduler, direct gathers."""

    name = "distributed-tuned"
    config: ClassVar[dict[str, Any]] = {"distributed.scheduler.worker-saturation": float("inf")}
    client_options: ClassVar[dict[str, Any]] = {"direct_to_workers": True}


class Ray(Contender):
    """Ray as installed, without its dashboard: two workers, a raylet with the object store, a GCS.

    Dask collections go through `ray.util.dask`, whose `persist` has to be told so.
    """

    name = "ray"

    @classmethod
    def missing(cls) -> str | None:
        return next((name for name in ("ray", "grpc") if importlib.util.find_spec(name) is None), None)

    def load(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray
        import ray.util.dask

        self.ray = ray
        self.get = ray.util.dask.ray_dask_get
        self.functions: dict[Callable[..., Any], Any] = {}

    def start(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets are in it
        self.ray.init(
            address="local",
            num_cpus=N_WORKERS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=self.folder,
        )

    def wait_ready(self) -> None:
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

        self.gather(self.map(pid_after, [0.1] * N_WORKERS))
        # What Ray's own `ray memory` asks, for its sums alone; the public figures lag by 100 ms.
        [node] = self.ray.nodes()
        channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
        stub = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
        request = node_manager_pb2.GetNodeStatsRequest(include_memory_info=False)
        self.store_stats = lambda: stub.GetNodeStats(request, timeout=30).store_stats

    def stop(self) -> None:
        self.ray.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)

    def versions(self) -> dict[str, str]:
        return {"ray": self.ray.__version__}

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        remote = self.functions.get(function)
        if remote is None:
            remote = self.functions[function] = self.ray.remote(function)
        return remote.remote(*args)

    def map(self, function: Callable[..., Any], *iterables: Iterable[Any]) -> list[Any]:
        return [self.submit(function, *args) for args in zip(*iterables, strict=True)]

    def result(self, reference: Any) -> Any:
        return self.ray.get(reference)

    def gather(self, references: list[Any]) -> list[Any]:
        return self.ray.get(references)

    def wait(self, references: list[Any]) -> None:
        self.ray.wait(references, num_returns=len(references), fetch_local=False)

    def scatter(self, values: list[Any]) -> list[Any]:
        return [self.ray.put(value) for value in values]

    def compute(self, collection: Any) -> Any:
        return collection.compute(scheduler=self.get)

    def persist(self, collection: Any) -> Any:
        return collection.persist(scheduler=self.get, ray_persist=True)

    def count_left(self) -> int:
        stats = self.store_stats()
        return stats.num_local_objects or stats.object_store_bytes_used


def pid_after(seconds: float) -> int:
    """Long enough for one call on each worker, so that all of them must be there."""
    time.sleep(seconds)
    return os.getpid()


CONTENDERS: dict[str, type[Contender]] = {c.name: c for c in (CeleryMem, Distributed, DistributedTuned, Ray)}
