"""LocalCluster: what `Client()` starts when it is given no address."""

from __future__ import annotations

import html
import os
import secrets
import shutil
import site
import sys
import sysconfig
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from celery_mem.config import KEY_FILE, Settings, mask_url
from celery_mem.errors import ConfigError
from celery_mem.local.processes import LocalClusterError, Processes
from celery_mem.local.redis import PrivateRedis, find_redis_server
from celery_mem.memory.limits import memory_limit
from celery_mem.memory.roots import remove_all_dead

POOLS = ("prefork", "threads", "solo")
REDIS_START_TIMEOUT_S = 20.0

ONE_THREAD_EACH = {
    # A task is the unit of parallelism here: a library's own threads would only fight over the processors.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": "65536",  # freed results go back to the system at once
}
FOREIGN_CELERY_VARIABLES = ("APP", "BROKER_URL", "RESULT_BACKEND", "LOADER", "CONFIG_MODULE", "SKIP_CHECKS")
"""The celery command takes options from these, and from every `CELERY_*`."""


def make_key_file(path: str) -> None:
    """Write a new key for signatures to a file that only this user can read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32) + "\n")


class LocalCluster:
    """A private Redis, Celery workers and a coordinator on this machine, for as long as this object lives.

    Returns as soon as Redis answers; workers join while the first tasks are being submitted. The processes
    end with `close()`, with the `with` block, when the object is collected, and when this process ends in
    any way, SIGKILL included.

    Args:
        n_workers: number of worker nodes; None means one per processor and `threads_per_worker`.
        threads_per_worker: tasks that a node runs at the same time: pool children with `pool="prefork"`,
            threads with `pool="threads"`, always 1 with `pool="solo"`.
        pool: the Celery pool: "prefork", "threads" or "solo".
        coordinators: number of coordinator processes; the second and further ones stand by.
        redis_args: further command-line options of redis-server, for example `("--maxmemory", "1gb")`.
        namespace: prefix of all keys.
        env: further environment variables of workers and coordinators.
        silence: keep the output of the processes in files; False lets it through to standard error.
        app: the Celery app that the workers run, as `celery -A` takes it.
        restart: start a worker or coordinator that died again, with growing delays.
        grace: seconds that processes get to end in good order before they are killed.

    Attributes:
        url: address of the private Redis.
        namespace: as given.
        n_workers: number of worker nodes that were started.

    Raises:
        NoRedisServerError: no server program is installed; the text says what to install.
        LocalClusterError: Redis did not start; the text ends with its log.
    """

    def __init__(
        self,
        n_workers: int | None = None,
        threads_per_worker: int = 1,
        *,
        pool: str = "prefork",
        coordinators: int = 1,
        redis_args: Sequence[str] = (),
        namespace: str = "mem",
        env: Mapping[str, str] | None = None,
        silence: bool = True,
        app: str = "celery_mem.worker.app",
        restart: bool = False,
        grace: float = 0.5,
    ) -> None:
        _check(n_workers, threads_per_worker, pool, coordinators)
        Settings(namespace=namespace)  # refuses a bad one
        server = find_redis_server()
        self.namespace = namespace
        self.threads_per_worker = threads_per_worker
        self.n_workers = _default_workers(threads_per_worker) if n_workers is None else n_workers
        self.pool = pool
        folder = tempfile.mkdtemp(prefix="celery-mem-")
        try:
            redis = PrivateRedis.place(folder)
            if redis.socket_path is not None:
                make_key_file(os.path.join(folder, KEY_FILE))  # whoever finds the socket finds it too
            environ = _environment(redis.url, namespace, env, self.n_workers)
            self._processes = Processes(folder, environ, grace_s=grace, to_stderr=not silence)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.url = redis.url
        self._finalizer = weakref.finalize(self, _close, self._processes, environ)
        try:
            command = redis.command(server, redis_args)
            self._processes.start_and_wait("redis", command, redis.answers, REDIS_START_TIMEOUT_S)
            for i in range(self.n_workers):
                self._processes.start(f"worker-{i}", self._worker_command(app, i), restart=restart)
            for i in range(coordinators):
                command = [sys.executable, "-m", "celery_mem.cli", "coordinator"]
                self._processes.start(f"coordinator-{i}", command, restart=restart)
            self._processes.wait_until_started()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop all processes and remove their files; returns when nothing is left. Harmless when repeated."""
        self._finalizer()

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or the cluster belongs to the process that forked this one."""
        return not self._finalizer.alive or self._processes.is_over()

    def pids(self) -> dict[str, int]:
        """Return the process ids of those that live, by name: redis, worker-0, ..., coordinator-0, ..."""
        return self._processes.pids()

    def check(self) -> None:
        """Raise an error if a process that should run has died.

        Raises:
            LocalClusterError: names each, with the end of its log.
        """
        if troubles := self._processes.troubles():
            raise LocalClusterError("\n".join(troubles))

    def log_tail(self, name: str, lines: int = 30) -> str:
        """Return the last lines that a process wrote; empty if `silence=False`.

        Args:
            name: as in `pids`.
            lines: how many.
        """
        return self._processes.log_tail(name, lines)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the cluster is over: closed, or its Redis gone.

        Args:
            timeout: seconds; None waits without end.
        Returns:
            False if the time was over first.
        """
        return self._processes.wait_for(
            lambda: self.closed or self._processes.trouble("redis") is not None, timeout
        )

    def _worker_command(self, app: str, number: int) -> list[str]:
        return [
            *(sys.executable, "-m", "celery", "-A", app, "worker"),
            *("-n", f"worker-{number}@%h", "-P", self.pool, "-c", str(self.threads_per_worker), "-l", "INFO"),
            # Workers of one cluster need to know nothing of each other; mingle would cost a second.
            *("--without-gossip", "--without-mingle"),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<LocalCluster: closed>"
        return (
            f"<LocalCluster {mask_url(self.url)!r}: {self.n_workers} workers"
            f" with {self.threads_per_worker} slots each, namespace {self.namespace!r}>"
        )

    def _repr_html_(self) -> str:
        rows = {"address": "closed" if self.closed else mask_url(self.url), "namespace": self.namespace}
        rows |= {"workers": f"{self.n_workers}, {self.threads_per_worker} slots each, {self.pool} pool"}
        cells = "".join(
            f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items()
        )
        return f"<table><caption>LocalCluster</caption>{cells}</table>"


def _check(n_workers: int | None, threads_per_worker: int, pool: str, coordinators: int) -> None:
    if pool not in POOLS:
        raise ConfigError(f"pool must be one of {', '.join(POOLS)}, not {pool!r}")
    if threads_per_worker < 1 or (pool == "solo" and threads_per_worker > 1):
        raise ConfigError(f"threads_per_worker={threads_per_worker!r} does not go with the {pool} pool")
    if (n_workers is not None and n_workers < 0) or coordinators < 0:
        raise ConfigError("n_workers and coordinators must not be negative")


def _default_workers(threads_per_worker: int) -> int:
    try:
        processors = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        processors = os.cpu_count() or 1
    return max(1, processors // threads_per_worker)


def _close(processes: Processes, environ: Mapping[str, str]) -> None:
    processes.close()
    # Those that had to be killed could not remove their results.
    remove_all_dead(environ.get("CELERY_MEM_SHM_FOLDER", ""))


def _environment(url: str, namespace: str, extra: Mapping[str, str] | None, n_workers: int) -> dict[str, str]:
    """Build the environment of the processes: this one's, without what would lead them elsewhere."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in FOREIGN_CELERY_VARIABLES
        and (not name.startswith("CELERY_") or name.startswith("CELERY_MEM_"))
    }
    env = ONE_THREAD_EACH | env
    # What a function was imported from here must be found there.
    env["PYTHONPATH"] = os.pathsep.join(_own_import_paths())
    # Workers on one machine share its memory.
    env.setdefault("CELERY_MEM_MEMORY_LIMIT", str(memory_limit(0, n_workers)))
    env |= extra or {}
    return env | {"CELERY_MEM_URL": url, "CELERY_MEM_NAMESPACE": namespace}


def _own_import_paths() -> list[str]:
    """Return the folders that this process imports from, but those that the same Python has anyway."""
    common = {*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages()}
    common |= {os.path.join(folder, "lib-dynload") for folder in common}
    paths = (os.path.abspath(path) for path in sys.path)
    return list(dict.fromkeys(path for path in paths if path not in common and os.path.exists(path)))
