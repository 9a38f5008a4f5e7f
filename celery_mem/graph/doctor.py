"""What is wrong with a deployment, and what to set: rules over facts, each rule one function.

An error makes work impossible or loses it; a warning costs something, or will.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from celery_mem.config import Settings
from celery_mem.memory.seal import is_local, seal_of
from celery_mem.state.store import MIN_REDIS, Store

ERROR, WARNING = "error", "warning"
PACKAGES = ("celery-mem", "celery", "dask", "numpy")
MUST_AGREE = ("python", "dask")
"""Functions and arguments do not travel between different versions of these."""
FULL = 0.85
"""Part of a limit beyond which it will be met soon."""
HEADROOM = 20
"""Connections that should be left: a worker takes about ten, a client four."""
LEAST_SHM = 256 << 20
CLOCK_S = 30.0
LEAST_VISIBILITY_S = 60.0


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
        level: "error" or "warning".
        rule: its name.
        text: what is so, and what follows from it.
        advice: what to do.
    """

    level: str
    rule: str
    text: str
    advice: str


@dataclass(frozen=True)
class Facts:
    """What the rules look at; what could not be found out is missing or None.

    Attributes:
        redis: INFO of the server.
        hash_limit: largest value, bytes, for which Redis keeps a hash compact; None if it does not tell.
        clock_s: seconds by which the clock of Redis is ahead of this host's.
        nodes: what the nodes say of themselves.
        leader: id of the coordinator that leads, or empty.
        versions: of this host.
        is_signed: whether there is a key for signatures.
        is_local: whether only this host reaches Redis.
    """

    redis: dict[str, str] = field(default_factory=dict)
    hash_limit: int | None = None
    clock_s: float = 0.0
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    leader: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    is_signed: bool = False
    is_local: bool = False

    def number(self, name: str) -> int:
        """Return a figure of INFO, 0 if it is not there."""
        text = self.redis.get(name, "")
        return int(text) if text.isdigit() else 0


def own_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter, of this process."""
    import platform

    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def gather_facts(store: Store, settings: Settings) -> Facts:
    """Ask Redis. Raises RedisUnavailableError if it cannot be reached."""
    link = store.link
    info: dict[str, str] = {}
    for section in ("server", "memory", "clients", "persistence"):
        try:
            lines = link.call("INFO", section).decode().splitlines()
        except ResponseError:
            continue  # not permitted
        info |= dict(line.split(":", 1) for line in lines if ":" in line)
    hash_limit = None
    for name in ("hash-max-listpack-value", "hash-max-ziplist-value"):
        try:
            found = link.call("CONFIG", "GET", name)
        except ResponseError:
            break  # managed servers refuse it
        if found:
            hash_limit = int(found[1])
            break
    leader = link.call("GET", store.keys.fixed("leader"))
    return Facts(
        redis=info,
        hash_limit=hash_limit,
        clock_s=store.server_ms() / 1000 - time.time(),
        nodes=store.node_infos(),
        leader="" if leader is None else leader.decode(),
        versions=own_versions(),
        is_signed=seal_of(settings).is_on,
        is_local=is_local(settings.url),
    )


def examine(facts: Facts) -> list[Finding]:
    """Return all that is wrong, errors first."""
    found = [finding for rule in RULES for finding in rule(facts)]
    return sorted(found, key=lambda finding: finding.level != ERROR)


# --- rules: Redis -------------------------------------------------------------------------------------------


def redis_version(f: Facts) -> Iterator[Finding]:
    text = f.redis.get("redis_version", "")
    if text and tuple(int(n) for n in text.split(".")[:2]) < MIN_REDIS:
        yield Finding(ERROR, "version", f"Redis is version {text}", "use 6.2 or newer, or Valkey")


def eviction(f: Facts) -> Iterator[Finding]:
    policy = f.redis.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys"):
        text = f"Redis has maxmemory-policy {policy}: when it is full it deletes what is in use"
        yield Finding(ERROR, "eviction", text, "set maxmemory-policy noeviction")
    elif policy != "noeviction" and f.number("maxmemory"):
        text = f"Redis has maxmemory-policy {policy}: when it is full it deletes what is being written"
        yield Finding(WARNING, "eviction", text, "set maxmemory-policy noeviction")


def memory(f: Facts) -> Iterator[Finding]:
    used, limit = f.number("used_memory"), f.number("maxmemory")
    if limit and used > FULL * limit:
        text = (
            f"Redis uses {used / 1e6:.0f} MB of its {limit / 1e6:.0f} MB; when it is full new work is refused"
        )
        yield Finding(WARNING, "memory", text, "raise maxmemory, or hold fewer results")


def persistence(f: Facts) -> Iterator[Finding]:
    if f.redis.get("aof_enabled") == "0":
        text = (
            "Redis keeps no append-only file: after its restart clients send again what they know how to make"
        )
        yield Finding(WARNING, "persistence", text, "set appendonly yes, if a restart must lose nothing")
    if f.redis.get("rdb_last_bgsave_status") == "err" or f.redis.get("aof_last_write_status") == "err":
        text = "the last save of Redis failed; it may refuse every write until one succeeds (MISCONF)"
        yield Finding(ERROR, "persistence", text, "look into the log of Redis: is its disk full?")


def connections(f: Facts) -> Iterator[Finding]:
    limit, used = f.number("maxclients"), f.number("connected_clients")
    if limit and limit - used < HEADROOM:
        text = f"{used} of the {limit} connections of Redis are in use"
        yield Finding(
            WARNING, "connections", text, "a larger plan, or fewer processes: a worker takes about ten"
        )


def compact_records(f: Facts) -> Iterator[Finding]:
    if f.hash_limit is not None and f.hash_limit < 512:
        text = f"Redis keeps hashes compact up to {f.hash_limit} bytes a value: records take twice the memory"
        yield Finding(
            WARNING, "records", text, "set hash-max-listpack-value 1024 (before Redis 7: -ziplist-)"
        )


def clock(f: Facts) -> Iterator[Finding]:
    if abs(f.clock_s) > CLOCK_S:
        text = f"the clock of this host and that of Redis differ by {abs(f.clock_s):.0f} s"
        yield Finding(
            WARNING, "clock", text, "run a time service; leases go by Redis' clock, logs and Celery do not"
        )


def signatures(f: Facts) -> Iterator[Finding]:
    if not (f.is_signed or f.is_local):
        text = "nothing is signed: whoever can write to Redis can run code in every client and worker"
        yield Finding(WARNING, "signatures", text, "set mem_secret_key; `celery-mem keygen` makes a key")


# --- rules: who is there ------------------------------------------------------------------------------------


def coordinator(f: Facts) -> Iterator[Finding]:
    if not f.leader:
        text = "no coordinator leads: nothing is freed after a death, lost tickets are not replaced"
        yield Finding(WARNING, "coordinator", text, "start `celery-mem coordinator`, better two of them")


def workers(f: Facts) -> Iterator[Finding]:
    if not f.nodes:
        yield Finding(
            WARNING, "workers", "no worker has joined: tasks wait", "start one, with this namespace"
        )


def versions(f: Facts) -> Iterator[Finding]:
    for node, info in sorted(f.nodes.items()):
        theirs = info.get("versions") or {}
        for name, own in f.versions.items():
            other = theirs.get(name, own)
            if other == own:
                continue
            level = ERROR if name in MUST_AGREE else WARNING
            text = f"{node} has {name} {other}, this host has {own}"
            yield Finding(level, "versions", text, "install the same versions everywhere")


def shared_memory(f: Facts) -> Iterator[Finding]:
    for node, info in sorted(f.nodes.items()):
        if "shm" not in info:
            continue
        free = int(info["shm"])
        if not info.get("dir"):
            text = f"{node} has no shared memory for results ({free / 1e6:.0f} MB free): all go through Redis"
        elif free < LEAST_SHM:
            text = f"{node} had {free / 1e6:.0f} MB of shared memory free when it began"
        else:
            continue
        yield Finding(WARNING, "shared memory", text, "Docker: shm_size; Kubernetes: an emptyDir in memory")


def hash_seed(f: Facts) -> Iterator[Finding]:
    seeds = {str(info.get("hashseed", "")) for info in f.nodes.values()}
    slots = sum(int(info.get("slots") or 0) for info in f.nodes.values())
    if f.nodes and (len(seeds) > 1 or (seeds <= {"", "random"} and slots > 1)):
        text = "PYTHONHASHSEED is not the same for all workers: dask.bag sends equal texts apart"
        yield Finding(WARNING, "hash seed", text, "set PYTHONHASHSEED=0 for all workers, if you shuffle bags")


def visibility(f: Facts) -> Iterator[Finding]:
    for node, info in sorted(f.nodes.items()):
        seconds = info.get("visibility")
        if seconds is not None and float(seconds) < LEAST_VISIBILITY_S:
            text = (
                f"{node} has a visibility_timeout of {float(seconds):g} s: longer tasks of Celery run twice"
            )
            yield Finding(
                WARNING, "visibility timeout", text, "set it above your longest task; 3600 is the default"
            )


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    redis_version,
    eviction,
    memory,
    persistence,
    connections,
    compact_records,
    clock,
    signatures,
    coordinator,
    workers,
    versions,
    shared_memory,
    hash_seed,
    visibility,
)
