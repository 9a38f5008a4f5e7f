"""What a person or a monitor wants to know of a namespace, by plain reads; nothing is unpickled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from celery_mem.state.keys import COUNTS, META, NODE, REPLICAS, TASK, node_of
from celery_mem.state.link import Link
from celery_mem.state.records import read_core, read_given, read_recipe, read_result, state_of
from celery_mem.state.store import REDIS, Store

_PAGE = 1_000
"""Keys per round trip."""


class TaskRow(NamedTuple):
    """What a reading of the whole namespace tells of one task.

    Attributes:
        key: key text.
        state: one of `keys.STATES`.
        holders: ids.
        nbytes: size of its result, 0 if there is none.
        queue: a constraint; else the node that runs it, or in whose queue it is; else "", the shared queue.
    """

    key: str
    state: str
    holders: list[str]
    nbytes: int
    queue: str


def namespace_status(store: Store, see: Callable[[TaskRow], None] | None = None) -> dict[str, Any]:
    """Count and measure a namespace.

    Not one moment's picture: it is read in several steps while work goes on. Costs a scan over all keys of
    the server, in pages that hold up nobody.

    Args:
        see: is called with every task, so that who wants to know more need not scan again.

    Returns:
        namespace, generation, queue, leader (coordinator id or None), clock (server time, s), and
        - redis: version, used_memory, used_memory_human, maxmemory, maxmemory_policy
        - nodes: name -> slots, busy (slots that run a task), pid, pool, hostname, lease (s left)
        - queues: ready (that any node may take; `tasks` counts all), unsettled (left for the sweep), tickets
          (on their way), idle (slots that wait)
        - tasks: state -> count
        - nbytes: size of all results in memory
        - clients: id -> keys (held), lease (s left)
        - datasets: the names of those that are published
        - forgotten: number of tasks that run though nobody holds them
        - counts: what happened since the namespace began: all of `keys.COUNTS` by name, and the fields that
          `counts.histogram` reads
    """
    fixed, of, link = store.keys.fixed, store.keys.of, store.link
    meta, now, leader, nodes, clients, datasets, counts, *sizes = link.batch(
        [
            ("HMGET", fixed("meta"), META["generation"], META["queue"]),
            ("TIME",),
            ("GET", fixed("leader")),
            ("ZRANGE", fixed("nodes"), 0, -1, "WITHSCORES"),
            ("ZRANGE", fixed("clients"), 0, -1, "WITHSCORES"),
            ("HKEYS", fixed("datasets")),
            ("HGETALL", fixed("counts")),
            ("ZCARD", fixed("ready")),
            ("SCARD", fixed("unsettled")),
            ("ZCARD", fixed("tickets")),
            ("ZCARD", fixed("idle")),
        ]
    )
    now_s = int(now[0]) + int(now[1]) / 1e6
    client_leases = _leases(clients, now_s)
    held = _paged(link, [("SCARD", of("held", client)) for client in client_leases])
    tasks, nbytes = _count_tasks(store, see)
    return {
        "namespace": store.keys.namespace,
        "generation": _text(meta[0]),
        "queue": _text(meta[1]),
        "leader": _text(leader),
        "clock": now_s,
        "redis": server_facts(link),
        "nodes": {name: _node(store, name, lease) for name, lease in _leases(nodes, now_s).items()},
        "queues": dict(zip(("ready", "unsettled", "tickets", "idle"), sizes, strict=True)),
        "tasks": tasks,
        "nbytes": nbytes,
        "datasets": sorted(map(str, map(_text, datasets))),
        "forgotten": link.call("SCARD", of("held", "!")),
        "counts": _counts(counts),
        "clients": {
            client: {"keys": keys, "lease": lease}
            for (client, lease), keys in zip(client_leases.items(), held, strict=True)
        },
    }


def describe_task(store: Store, key_text: str) -> dict[str, Any] | None:
    """Tell all that the record of one key says; None if there is no record.

    Returns:
        key, state, priority, rank, attempt and owner (of the current or last attempt), waiting, needed,
        retries (left), deaths, function (hash), payload_nbytes (None if it is a blob), nbytes, type,
        places (nodes, and "@redis" for a small value or a blob), copies (number wanted), copies_on (nodes
        that are to have one), blame (key of the task that raised the error), error (bytes), and
        - given: keys of inputs that were there and small when it was submitted, and are part of it
        - dependencies, dependents: key -> state, in order; a state of None means that there is no record
        - holders: client id -> epoch; "@key" is the result of `key`, which contains a future
        - contains: keys of the futures inside the result
    """
    of, link = store.keys.of, store.link
    record = of("task", key_text)
    small = [name for name in TASK if name not in {"payload", "value", "error"}]
    values, payload, value, dependents = link.batch(
        [
            ("HMGET", record, *(TASK[name] for name in small)),
            ("HSTRLEN", record, TASK["payload"]),
            ("HEXISTS", record, TASK["value"]),
            ("HKEYS", of("dependents", key_text)),
        ]
    )
    found = dict(zip(small, values, strict=True))
    if found["core"] is None:
        return None
    core, recipe, result = (
        read_core(found["core"]),
        read_recipe(found["recipe"]),
        read_result(found["result"]),
    )
    row = {name: _text(value) for name, value in found.items()}
    blame = row["blame"]
    return {
        "key": key_text,
        "state": core.state,
        "priority": recipe.priority if recipe else 0.0,
        "rank": recipe.rank if recipe else None,
        "attempt": _number(core.attempt),
        "owner": row["owner"],
        "waiting": core.waiting,
        "needed": core.needed,
        "retries": int(row["retries"] or 0),
        "deaths": int(row["deaths"] or 0),
        "function": recipe.function if recipe else None,
        "payload_nbytes": payload or None,
        "nbytes": result.nbytes if result else None,
        "type": result.type if result else None,
        "places": [REDIS] if value else (row["replicas"] or "").split("\n")[len(REPLICAS) :],
        "copies": int(row["copies"] or 1),
        "copies_on": _lines(row["copies_on"]),
        "blame": blame,
        "error": link.call("HGET", of("task", blame), TASK["error"]) if blame else None,
        "given": [key for key, _ in read_given(found["given"]).values()],
        "dependencies": _states(store, _lines(row["deps"])),
        "dependents": _states(store, sorted(dep.decode() for dep in dependents)),
        "holders": dict(core.holders),
        "contains": _lines(row["contains"]),
    }


def neighbourhood(store: Store, key_text: str, most: int) -> dict[str, Any] | None:
    """Walk from a key along its dependencies and dependents, nearest first; None if it has no record.

    Returns:
        key, is_cut (whether there is more), states (key -> state, at most `most`) and edges (pairs of a
        dependency and its dependent, both among them)
    """
    of, link = store.keys.of, store.link
    states: dict[str, str] = {}
    edges: set[tuple[str, str]] = set()
    front, is_cut = [key_text], False
    while front:
        wanted = front[: most - len(states)]
        is_cut = is_cut or len(wanted) < len(front)
        commands: list[tuple[Any, ...]] = []
        for key in wanted:
            commands.append(("HMGET", of("task", key), TASK["core"], TASK["deps"]))
            # Of very many, only some are fetched.
            commands.append(("HSCAN", of("dependents", key), 0, "COUNT", most))
        replies = link.batch(commands) if commands else []
        front = []
        for key, (core, deps), (_, pairs) in zip(wanted, replies[::2], replies[1::2], strict=True):
            if not core:
                continue
            states[key] = state_of(core)
            for dep in _lines(_text(deps)):
                edges.add((dep, key))
                front.append(dep)
            for name in pairs[::2]:
                edges.add((key, _text(name) or ""))
                front.append(_text(name) or "")
        front = [key for key in dict.fromkeys(front) if key not in states]
    if not states:
        return None
    shown = sorted(edge for edge in edges if edge[0] in states and edge[1] in states)
    return {"key": key_text, "is_cut": is_cut, "states": states, "edges": shown}


def _count_tasks(store: Store, see: Callable[[TaskRow], None] | None) -> tuple[dict[str, int], int]:
    """Return the number of tasks by state, and the size of all results."""
    states: Counter[str] = Counter()
    nbytes = 0
    for row in _task_rows(store):
        states[row.state] += 1
        nbytes += row.nbytes
        if see is not None:
            see(row)
    return dict(sorted(states.items())), nbytes


def _task_rows(store: Store) -> Iterator[TaskRow]:
    prefix = store.keys.of("task", "")
    names = [TASK[name] for name in ("core", "result", "constraint", "home", "owner")]
    for page in _scan(store, store.keys.of("task", "*")):
        rows = store.link.batch([("HMGET", name, *names) for name in page])
        for name, (raw, size, *places) in zip(page, rows, strict=True):
            if raw:
                core, result = read_core(raw), read_result(size)
                key = name.decode(errors="replace").removeprefix(prefix)
                holders = [holder for holder, _ in core.holders]
                queue = _queue_of(core.state, *(_text(place) or "" for place in places))
                yield TaskRow(key, core.state, holders, result.nbytes if result else 0, queue)


def _queue_of(state: str, constraint: str, home: str, owner: str) -> str:
    if constraint:
        return constraint
    if state == "processing":
        return node_of(owner)
    return home[1:] if state == "ready" else ""  # before the node stands the size class


def _scan(store: Store, pattern: str) -> Any:
    """Yield pages of keys; a key may come twice only while Redis rehashes, so what was seen is left out."""
    seen: set[bytes] = set()
    cursor: Any = 0
    while True:
        cursor, page = store.link.call("SCAN", cursor, "MATCH", pattern, "COUNT", _PAGE)
        if new := [name for name in dict.fromkeys(page) if name not in seen]:
            seen.update(new)
            yield new
        if int(cursor) == 0:
            return


def _node(store: Store, name: str, lease: float) -> dict[str, Any]:
    of, link = store.keys.of, store.link
    names = ("slots", "pid", "pool", "hostname")
    fields, running = link.batch(
        [("HMGET", of("node", name), *(NODE[n] for n in names)), ("SMEMBERS", of("node_slots", name))]
    )
    slots, pid, pool, hostname = map(_text, fields)
    owned = _paged(link, [("HLEN", of("slot", slot.decode())) for slot in running])
    return {
        "slots": int(slots or 0),
        "busy": sum(n > 0 for n in owned),
        "pid": _number(pid),
        "pool": pool,
        "hostname": hostname,
        "lease": lease,
    }


def server_facts(link: Link) -> dict[str, Any]:
    """Return version, used_memory, used_memory_human, maxmemory and maxmemory_policy; None where unknown."""
    info: dict[str, str] = {}
    for section in ("server", "memory"):
        try:
            lines = link.call("INFO", section).decode().splitlines()
        except ResponseError:
            continue  # not permitted, or a stand-in without INFO
        info |= dict(line.split(":", 1) for line in lines if ":" in line)
    return {
        "version": info.get("redis_version"),
        "used_memory": _number(info.get("used_memory")),
        "used_memory_human": info.get("used_memory_human"),
        "maxmemory": _number(info.get("maxmemory")),
        "maxmemory_policy": info.get("maxmemory_policy"),
    }


def server_warnings(facts: dict[str, Any]) -> list[str]:
    """Return what in the server's configuration would lose work."""
    policy = facts["maxmemory_policy"]
    if facts["maxmemory"] and policy not in (None, "noeviction"):
        return [
            f"Redis has maxmemory-policy {policy} and so drops task records when it is full; set noeviction"
        ]
    return []


def _counts(reply: Sequence[bytes]) -> dict[str, int]:
    found = {reply[i].decode(): int(reply[i + 1]) for i in range(0, len(reply), 2)}
    return {name: found.pop(field, 0) for name, field in COUNTS.items()} | found


def _states(store: Store, keys: Sequence[str]) -> dict[str, str | None]:
    replies = _paged(store.link, [("HGET", store.keys.of("task", key), TASK["core"]) for key in keys])
    return {key: state_of(core) or None for key, core in zip(keys, replies, strict=True)}


def _leases(reply: Sequence[bytes], now_s: float) -> dict[str, float]:
    return {reply[i].decode(): round(float(reply[i + 1]) / 1000 - now_s, 3) for i in range(0, len(reply), 2)}


def _paged(link: Link, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    replies: list[Any] = []
    for start in range(0, len(commands), _PAGE):
        replies += link.batch(commands[start : start + _PAGE])
    return replies


def _lines(text: str | None) -> list[str]:
    return [line for line in (text or "").split("\n") if line]


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode(errors="replace")


def _number(text: str | None) -> int | None:
    return None if not text else int(text)
