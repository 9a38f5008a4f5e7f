"""A deployment over four hosts: Redis and the coordinator on a, workers on b and c, the client on d."""

from __future__ import annotations

import gc
import secrets
import sys
from collections.abc import Sequence
from typing import Any, Self

from redis import Redis
from redis.exceptions import ConnectionError

from celery_mem import Client
from celery_mem.config import Settings
from celery_mem.local.redis import find_redis_server
from celery_mem.state.audit import audit, read
from celery_mem.state.store import Store
from tests.deployment import ROOT
from tests.hosts.network import Hosts
from tests.hosts.remote import At

PORT = 6379
SLOTS = 2
"""Of each worker."""


class Site:
    """The deployment, at work.

    Args:
        settings: `mem_*` settings of all processes, without the prefix.

    Attributes:
        hosts: what it runs on.
        url: the Redis; of use only on these hosts.
        client: the Python process on d; see `connect` for what it keeps.
    """

    def __init__(self, **settings: Any) -> None:
        self.hosts = Hosts("abcd")
        try:
            self._password = secrets.token_hex(16)
            self.url = f"redis://:{self._password}@{self.hosts['a'].address}:{PORT}/0"
            self._env = {f"CELERY_MEM_{k.upper()}": str(v) for k, v in {"url": self.url, **settings}.items()}
            self._start_redis()
            self.client = self.hosts.talk("d", self._env)
            self.hosts.wait_until(lambda: self.client(redis_answers, self.url), "Redis")
            self.client(connect)
            self.start_coordinator()
            self.start_workers("b", "c")
        except BaseException:
            self.hosts.close()
            raise

    def _start_redis(self) -> None:
        address = self.hosts["a"].address
        options = {"--bind": address, "--port": str(PORT), "--requirepass": self._password, "--dir": "/tmp"}
        options["--appendonly"] = "no"  # its folder is memory too
        command = [find_redis_server().path, str(ROOT / "worker_config" / "redis.conf")]
        self.hosts.start("a", "redis", command + [word for option in options.items() for word in option], {})

    def start_coordinator(self) -> None:
        """Start the coordinator on a."""
        self.hosts.start(
            "a", "coordinator", [sys.executable, "-m", "celery_mem.cli", "coordinator"], self._env
        )

    def start_workers(self, *hosts: str) -> None:
        """Start the worker of each host, `worker(host)`, and wait until it has joined as `node(host)`."""
        command = [sys.executable, "-m", "celery", "-A", "celery_mem.worker.app", "worker", "-c", str(SLOTS)]
        command += ["-P", "prefork", "-l", "INFO", "--without-gossip", "--without-mingle"]
        for host in hosts:
            self.hosts.start(host, worker(host), command, self._env)
        self.hosts.wait_until(lambda: self.nodes() >= set(map(node, hosts)), f"workers of {hosts} to join")

    def end_worker(self, host: str, number: int | None = None) -> None:
        """Wait until nothing is left of the worker of a host, after sending it a signal if one is given."""
        if number is not None:
            self.hosts.send(worker(host), number)
        self.hosts.wait_until(lambda: self.hosts[host].processes() == [], f"the worker of {host} to end")
        self.hosts.wait_until(lambda: node(host) not in self.nodes(), f"the node of {host} to leave")

    def nodes(self) -> set[str]:
        """Return the nodes that Redis knows."""
        return self.client(lambda at: set(at.client.info()["nodes"]))

    def violations(self) -> list[str]:
        """Return what the audit finds; all but a moment's is a fault."""
        return self.client(lambda at: [str(violation) for violation in audit(at.store)])

    def close(self) -> None:
        """End it all."""
        self.hosts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def worker(host: str) -> str:
    """Return the name of the worker process of a host."""
    return f"worker-{host}"


def node(host: str) -> str:
    """Return the node name of the worker of a host."""
    return f"celery@{host}"


# --- what the process on d runs ----------------------------------------------------------------------------


def redis_answers(at: At, url: str) -> bool:
    """Keep a plain connection to Redis as `at.redis`, and tell whether it answers."""
    at.redis = Redis.from_url(url, protocol=2)
    try:
        return bool(at.redis.ping())
    except ConnectionError:
        return False


def connect(at: At) -> None:
    """Keep a client as `at.client` and a store as `at.store`."""
    settings = Settings.load()
    at.store = Store.connect(settings)
    at.client = Client(settings.url, set_as_default=False)


def forget(at: At) -> None:
    """Drop all that tests kept here."""
    for name in set(vars(at)) - {"client", "redis", "store"}:
        delattr(at, name)
    gc.collect()
    for name in list(at.redis.scan_iter("runs:*", 1000)):
        at.redis.unlink(name)


def runs(at: At, names: Sequence[str]) -> list[int]:
    """Return how often each of `tests.hosts.tasks` ran, by the names that they were given."""
    return [at.redis.scard(f"runs:{name}") for name in names]


def leftovers(at: At) -> list[str]:
    """Return what is left in the namespace; nothing may be, once the client holds nothing."""
    contents = read(at.store)
    found = [f"{client} holds {keys}" for client, keys in contents.held.items()]
    found += [f"a record of {key}" for key in contents.records]
    return found + [f"{key} is to be settled" for key in contents.unsettled]
