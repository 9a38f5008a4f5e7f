"""Processes of a test: a Redis of its own, workers and coordinators, each started and ended by name."""

from __future__ import annotations

import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil
from redis import Redis

from celery_mem import Client
from celery_mem.config import Settings
from celery_mem.local.processes import Processes
from celery_mem.local.redis import PrivateRedis, find_redis_server
from celery_mem.memory.roots import remove_all_dead
from celery_mem.state.audit import audit, read
from celery_mem.state.store import Store

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60.0
"""Other work may keep the machine busy; a test that gets what it waits for takes a fraction of this."""


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for: {what}"
        time.sleep(0.01)
    return answer


def through_redis() -> dict[str, bool]:
    """Settings of a run whose results all go through Redis."""
    return {"node_memory": False} if os.environ.get("CELERY_MEM_NODE_MEMORY") == "false" else {}


class Deployment:
    """One namespace with all that works on it. The processes end when this does, or this process.

    Args:
        redis_args: further options of redis-server.
        settings: `mem_*` settings of all processes and clients, without the prefix.
    """

    def __init__(self, redis_args: Sequence[str] = (), **settings: Any) -> None:
        folder = tempfile.mkdtemp(prefix="celery-mem-")
        self._redis = PrivateRedis.place(folder)
        self._redis_args = redis_args
        self.url = self._redis.url
        self.options = {"url": self.url, "namespace": "mem", **through_redis(), **settings}
        env = {k: v for k, v in os.environ.items() if not k.startswith(("CELERY", "REDIS"))}
        env["PYTHONPATH"] = str(ROOT)
        self.processes = Processes(folder, env, grace_s=0.5)
        self.start_redis()
        self.redis = Redis.from_url(self.url, protocol=2)

    @property
    def settings(self) -> Settings:
        """What all processes are told."""
        return Settings(**self.options)

    # --- processes ---

    def start_redis(self) -> None:
        """Start the Redis, again if it was killed."""
        command = self._redis.command(find_redis_server(), self._redis_args)
        self.processes.start_and_wait("redis", command, self._redis.answers, PATIENCE_S)

    def start_worker(
        self,
        name: str = "w0",
        *options: str,
        pool: str = "prefork",
        slots: int = 1,
        app: str = "celery_mem.worker.app",
        env: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        """Start a worker, called `<name>@<host>`; `wait` until it has joined."""
        joined = self.redis.hget(self.key(f"node:{self.node(name)}"), "pid")
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-n", f"{name}@%h", "-P", pool]
        command += ["-c", str(slots), "-l", "INFO", "--without-gossip", "--without-mingle", *options]
        self.start(name, command, env)
        if wait:
            self.wait_until(
                lambda: self.redis.hget(self.key(f"node:{self.node(name)}"), "pid") not in (None, joined),
                f"worker {name} to join",
            )

    def start_coordinator(self, name: str = "c0", env: Mapping[str, str] | None = None) -> None:
        """Start a coordinator."""
        self.start(name, [sys.executable, "-m", "celery_mem.cli", "coordinator"], env)

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start any process with the settings of this deployment in its environment."""
        told = {f"CELERY_MEM_{k.upper()}": str(v) for k, v in self.options.items()} | dict(env or {})
        self.processes.start(name, ["env", *(f"{k}={v}" for k, v in told.items()), *command])
        self.processes.wait_until_started()

    def pid(self, name: str) -> int:
        """Return the process id of a running process."""
        return self.processes.pids()[name]

    def signal(self, name: str, number: int) -> None:
        """Send a signal to one process, not to its children."""
        os.kill(self.pid(name), number)

    def kill(self, name: str) -> None:
        """End one process as a crash would, and wait until it is gone."""
        self.signal(name, signal.SIGKILL)
        self.wait_gone(name)

    def wait_gone(self, name: str) -> None:
        """Wait until a process has ended."""
        assert self.processes.wait_for(lambda: name not in self.processes.pids(), PATIENCE_S), self.logs()

    def log(self, name: str, lines: int = 200) -> str:
        """Return the last lines that a process wrote."""
        return self.processes.log_tail(name, lines)

    def logs(self) -> str:
        """Return the ends of all logs."""
        return "\n".join(
            f"--- {p.stem}\n{self.log(p.stem, 40)}" for p in Path(self.processes.folder).glob("*.log")
        )

    def wait_until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait as `wait_until` does; if in vain, show the logs."""
        try:
            return wait_until(condition, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    # --- the namespace ---

    def key(self, name: str) -> str:
        """Return the Redis key of a name in this namespace."""
        return "{" + self.options["namespace"] + "}:" + name

    def node(self, name: str) -> str:
        """Return the node name of a worker."""
        return f"{name}@{os.uname().nodename}"

    def client(self, **settings: Any) -> Client:
        """Connect a client."""
        told = {**self.options, **settings}
        return Client(told.pop("url"), set_as_default=False, **told)

    def store(self, **settings: Any) -> Store:
        """Connect a store."""
        return Store.connect(Settings(**{**self.options, **settings}))

    def runs(self, prefix: str = "") -> dict[str, int]:
        """Return how often each task of `tests.tasks` ran, by the name that it was given."""
        names = {name.decode() for name in self.redis.scan_iter(f"runs:{prefix}*", 1000)}
        with self.redis.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.scard(name)
            return {name.removeprefix("runs:"): n for name, n in zip(names, pipeline.execute(), strict=True)}

    def forget_runs(self) -> None:
        """Begin to count anew."""
        for name in list(self.redis.scan_iter("runs:*", 1000)):
            self.redis.unlink(name)

    def check_empty(self) -> None:
        """Wait until no rule is broken and nothing is left in the namespace; no client may hold anything."""
        store = self.store()
        found: list[Any] = []

        def is_empty() -> bool:
            contents = read(store)
            found[:] = [*audit(store), *(f"{c} holds {keys}" for c, keys in contents.held.items())]
            return not (found or contents.records or contents.unsettled)

        try:
            self.wait_until(is_empty, "an empty namespace")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{found}\n{read(store)}") from None
        finally:
            store.link.close()

    # --- life ---

    def close(self) -> None:
        """End all processes; what those that were killed left in shared memory goes with them."""
        self.redis.close()
        self.processes.close()
        remove_all_dead("")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_until_ended(pid: int, timeout_s: float = PATIENCE_S) -> bool:
    """Wait until a process, of whomever, has ended; a zombie has."""
    try:
        watch = os.pidfd_open(pid)  # readable once the process has ended
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watch], [], [], timeout_s)[0])
    finally:
        os.close(watch)


def agents_of(pid: int) -> list[psutil.Process]:
    """The agents beside a worker, by the pid of its main process."""
    found = []
    for process in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):  # a zombie, say
            if "celery_mem.worker.agent" in process.cmdline():
                found.append(process)
    return found
