"""What tests on a whole cluster share: how to wait, how to hold up a task, and what tasks do."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable
from typing import Any

import redis

from celery_mem import LocalCluster
from celery_mem.state.keys import TASK
from celery_mem.state.records import state_of

LIMIT_S = 20


def until(condition: Callable[[], Any], timeout: float = LIMIT_S) -> bool:
    """Wait until a condition holds, that nobody announces; returns whether it came to that."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def server(cluster: LocalCluster) -> redis.Redis:
    return redis.Redis.from_url(cluster.url)


def task_keys(cluster: LocalCluster) -> list[str]:
    """The keys of all task records."""
    prefix = "{" + cluster.namespace + "}:t:"
    with server(cluster) as r:
        return sorted(name.decode().removeprefix(prefix) for name in r.scan_iter(prefix + "*", count=1000))


def field(cluster: LocalCluster, key: str, name: str) -> bytes | None:
    """One field of a task record, by its name in `keys.TASK`."""
    with server(cluster) as r:
        return r.hget("{" + cluster.namespace + "}:t:" + key, TASK[name])


def state(cluster: LocalCluster, key: str) -> str:
    """The state of a task, empty if it has no record."""
    return state_of(field(cluster, key, "core"))


class Gate:
    """A task that passes it says so and waits until it is open; picklable."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = f"gate:{uuid.uuid4().hex}"

    def pass_(self, value: Any = None) -> Any:
        """For tasks: wait, then return `value`."""
        with redis.Redis.from_url(self.url) as r:
            r.rpush(f"{self.name}:reached", str(value))
            r.expire(f"{self.name}:reached", 60)
            r.blpop(self.name, timeout=LIMIT_S)
        return value

    def open(self, n: int = 1_000) -> None:
        """Let `n` tasks pass."""
        with redis.Redis.from_url(self.url) as r:
            r.rpush(self.name, *["1"] * n)
            r.expire(self.name, 60)

    def next_reached(self) -> str:
        """Wait for the next task to reach the gate; returns its value as text."""
        with redis.Redis.from_url(self.url) as r:
            found = r.blpop(f"{self.name}:reached", timeout=LIMIT_S)
        assert found is not None, "no task reached the gate"
        return found[1].decode()


# --- tasks -------------------------------------------------------------------------------------------------


def inc(x: int) -> int:
    return x + 1


def add(x: Any, y: Any) -> Any:
    return x + y


def identity(x: Any) -> Any:
    return x


def fail(text: str = "as asked") -> None:
    raise ValueError(text)


def node_of_task(_: Any = None) -> str:
    """The name of the node that runs this."""
    from celery_mem.graph import inside

    assert inside.worker is not None
    return inside.worker.node


def count_call(gate: Gate, name: str) -> int:
    """How often this was called under `name`, this call included."""
    with redis.Redis.from_url(gate.url) as r:
        n = r.incr(f"{gate.name}:{name}")
        r.expire(f"{gate.name}:{name}", 60)
    return int(n)


def fail_until(gate: Gate, name: str, calls: int) -> int:
    """Fail in all but the last of so many calls."""
    n = count_call(gate, name)
    if n < calls:
        raise ValueError(f"call {n}")
    return n


@dataclasses.dataclass
class Box:
    content: Any


def unbox(box: Box) -> Any:
    """The result of the future in a box."""
    return box.content.result(timeout=LIMIT_S)
