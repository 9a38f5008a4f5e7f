"""Checks a whole namespace against the rules of state, by plain reads.

It reads key after key, so on a namespace at work it sees no single moment: there, only what two audits in a
row name is a fault. Costs a scan of all keys of the server and memory for every record but its bulk.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from celery_mem.state.keys import ACTIVE, FIXED, META, PREFIXES, STATES, TASK
from celery_mem.state.link import Link
from celery_mem.state.store import Store

RULES = {
    # what is kept, and why
    "unwanted data": "data stays only while it has a holder or an unfinished dependent",
    "unwanted work": "a task waits or runs only while it has a holder or an unfinished dependent",
    "orphan record": "a record stays only while it has a holder or a dependent with a record",
    "not raised": "a released key that has a holder or an unfinished dependent is made again",
    "left over": "when no client holds anything, nothing is left",
    # what a record says
    "state": "a record has a known state and known fields; only data without function is lost",
    "data": "exactly a record in memory has data: a size, a type, and either a value or a blob",
    "payload": "a record with a function has either a payload or a payload blob",
    "blame": "exactly an erred record names a record to blame, which is itself if it has the error",
    "missing dependency": "every dependency of a record has a record",
    "waits for error": "a task that waits for an erred or lost one errs",
    # counts
    "waiting count": "waiting is the number of dependencies not in memory, 0 unless the task waits",
    "needed count": "needed is the number of dependents that wait, are ready or run",
    "inputs missing": "all dependencies of a ready or running task are in memory",
    "function count": "functions counts the records of each function",
    # indexes
    "ready queue": "the queue has every ready task once, under its priority, and nothing else",
    "slot index": "a running task has an owner and an attempt, and its slot's index says the same",
    "slot lease": "a slot that owns, idles, is woken or belongs to a node has a lease, if only an old one",
    "attempt": "attempt numbers come from one counter, and none was given twice",
    "dependents index": "the dependents of a key are the records that depend on it",
    "holders index": "the holders of a record and the keys of a holder say the same",
    "client lease": "what holds or hears has a lease, if only an old one",
    # bulk
    "function code": "code is stored for every function in use, and for no other",
    "blob missing": "the blob that a record names exists",
    "blob lease": "a blob has no time to live if and only if a record names it",
    "unknown key": "the namespace has no keys of other names or types",
}
"""Every rule that `audit` checks, by the name that its violations carry."""


class Violation(NamedTuple):
    """One broken rule.

    Attributes:
        rule: name in `RULES`.
        key: what breaks it: the key text of a task, or the id of a client, slot, function or blob.
        text: what was found.
    """

    rule: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.key!r} {self.text} ({RULES[self.rule]})"


def audit(store: Store) -> list[Violation]:
    """Check the namespace of `store`; an empty list means that every rule in `RULES` holds.

    Keys that wait in `unsettled` for the sweep are excused from the rules that it will enforce on them.
    """
    contents = read(store)
    return [violation for check in CHECKS for violation in check(contents)]


# --- reading ------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A task record without its bulk; missing fields are empty."""

    key: str
    fields: frozenset[str]  # names in TASK of the fields it has; unknown ones as they are
    state: str = ""
    function: str = ""
    payload_blob: str = ""
    deps: list[str] = field(default_factory=list)
    holders: dict[str, str] = field(default_factory=dict)
    priority: float = 0
    rank: str = ""
    waiting: int = 0
    needed: int = 0
    attempt: str = ""
    owner: str = ""
    blob: str = ""
    contains: list[str] = field(default_factory=list)
    blame: str = ""


@dataclass
class Contents:
    """All that a namespace holds, decoded, without payloads, results and errors."""

    meta: dict[str, str] = field(default_factory=dict)
    records: dict[str, Row] = field(default_factory=dict)
    dependents: dict[str, set[str]] = field(default_factory=dict)
    held: dict[str, set[str]] = field(default_factory=dict)
    ready: dict[str, float] = field(default_factory=dict)
    unsettled: set[str] = field(default_factory=set)
    owned: dict[str, dict[str, str]] = field(default_factory=dict)
    slots: dict[str, float] = field(default_factory=dict)
    idle: dict[str, float] = field(default_factory=dict)
    node_slots: dict[str, set[str]] = field(default_factory=dict)
    clients: dict[str, float] = field(default_factory=dict)
    notices: set[str] = field(default_factory=set)
    functions: dict[str, float] = field(default_factory=dict)
    code: set[str] = field(default_factory=set)
    blobs: dict[str, int] = field(default_factory=dict)  # <token>:<key> -> time to live in ms, -1 without
    wake: set[str] = field(default_factory=set)  # slots with a wake-up
    unknown: dict[str, str] = field(default_factory=dict)  # Redis key -> its type

    def known_dependents(self) -> dict[str, set[str]]:
        """Key -> dependents, as the records themselves say."""
        found: dict[str, set[str]] = defaultdict(set)
        for row in self.records.values():
            for dep in row.deps:
                found[dep].add(row.key)
        return found

    def count_active(self, keys: Iterable[str]) -> int:
        return sum(self.records[key].state in ACTIVE for key in keys)


TYPES = {
    **dict.fromkeys(("ready", "clients", "nodes", "slots", "idle", "tickets"), "zset"),
    **dict.fromkeys(("meta", "functions", "task", "dependents", "blob", "slot", "node"), "hash"),
    **dict.fromkeys(("unsettled", "held", "node_slots"), "set"),
    **dict.fromkeys(("leader", "function"), "string"),
    "notices": "stream",
    "wake": "list",
}
ATTACHED = {"blob", "payload_blob", "contains"}
_BULK = {"payload", "value", "error"}
_SMALL = [name for name in TASK if name not in _BULK]
_FIELD_NAMES = {short: name for name, short in TASK.items()}
_BATCH = 1000


def read(store: Store) -> Contents:
    """Read the whole namespace of `store`."""
    keys = _scan(store)
    types = [kind.decode() for kind in _batched(store.link, [("TYPE", key) for key in keys])]
    contents = Contents()
    by_kind: dict[str, list[tuple[str, bytes]]] = defaultdict(list)
    for key, found in zip(keys, types, strict=True):
        kind, name = _kind_of(_text(key)[len(store.keys.prefix) :])
        if TYPES.get(kind) == found:
            by_kind[kind].append((name, key))
        elif found != "none":  # it expired, or was deleted, since the scan
            contents.unknown[_text(key)] = found
    for kind, named in by_kind.items():
        _read_kind(contents, store.link, kind, named)
    return contents


def _scan(store: Store) -> list[bytes]:
    found: dict[bytes, None] = {}
    cursor: Any = 0
    while True:
        cursor, page = store.link.call("SCAN", cursor, "MATCH", store.keys.prefix + "*", "COUNT", _BATCH)
        found.update(dict.fromkeys(page))
        if int(cursor) == 0:
            return list(found)


def _kind_of(rest: str) -> tuple[str, str]:
    for kind, text in FIXED.items():
        if rest == text:
            return kind, ""
    head, colon, name = rest.partition(":")
    for kind, text in PREFIXES.items():
        if head + colon == text:
            return kind, name
    return "", rest


def _read_kind(contents: Contents, link: Link, kind: str, named: Sequence[tuple[str, bytes]]) -> None:
    """Read all keys of one kind into the attribute of `contents` that has them."""
    names = [name for name, _ in named]
    if kind == "task":
        fields = _batched(link, [("HKEYS", key) for _, key in named])
        values = _batched(link, [("HMGET", key, *(TASK[name] for name in _SMALL)) for _, key in named])
        contents.records = {row.key: row for row in map(_row, names, fields, values)}
    elif kind in _READ_EACH:
        attribute, command, decode = _READ_EACH[kind]
        replies = _batched(link, [(command, key) for _, key in named])
        setattr(contents, attribute, dict(zip(names, map(decode, replies), strict=True)))
    elif kind in _READ_ONE:
        command, after, decode = _READ_ONE[kind]
        setattr(contents, kind, decode(link.call(command, named[0][1], *after)))
    elif kind in _READ_NAMES:
        setattr(contents, _READ_NAMES[kind], set(names))


def _row(key: str, fields: Iterable[bytes], small: Sequence[bytes | None]) -> Row:
    text = {
        name: _text(value) if value is not None else "" for name, value in zip(_SMALL, small, strict=True)
    }
    return Row(
        key,
        frozenset(_FIELD_NAMES.get(name, name) for name in map(_text, fields)),
        state=text["state"],
        function=text["function"],
        payload_blob=text["payload_blob"],
        deps=_lines(text["deps"]),
        holders={holder: epoch for holder, _, epoch in (x.rpartition(" ") for x in _lines(text["holders"]))},
        priority=float(text["priority"] or 0),
        rank=text["rank"],
        waiting=int(text["waiting"] or 0),
        needed=int(text["needed"] or 0),
        attempt=text["attempt"],
        owner=text["owner"],
        blob=text["blob"],
        contains=_lines(text["contains"]),
        blame=text["blame"],
    )


def _batched(link: Link, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    replies: list[Any] = []
    for start in range(0, len(commands), _BATCH):
        replies += link.batch(commands[start : start + _BATCH])
    return replies


def _text(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")


def _lines(text: str) -> list[str]:
    return text.split("\n") if text else []


def _texts(reply: Iterable[bytes]) -> set[str]:
    return {_text(item) for item in reply}


def _pairs(reply: Sequence[bytes]) -> dict[str, str]:
    return {_text(reply[i]): _text(reply[i + 1]) for i in range(0, len(reply), 2)}


def _numbers(reply: Sequence[bytes]) -> dict[str, float]:
    return {name: float(number) for name, number in _pairs(reply).items()}


_READ_EACH: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "dependents": ("dependents", "HKEYS", _texts),
    "slot": ("owned", "HGETALL", _pairs),
    "held": ("held", "SMEMBERS", _texts),
    "node_slots": ("node_slots", "SMEMBERS", _texts),
    "blob": ("blobs", "PTTL", int),
}
"""Kinds with a Redis key for each name -> attribute of Contents, command, decoder of its reply."""

_READ_NAMES = {"notices": "notices", "function": "code", "wake": "wake"}
"""Kinds of which only the names count -> attribute of Contents."""

_READ_ONE: dict[str, tuple[str, tuple[Any, ...], Callable[[Any], Any]]] = {
    "meta": ("HGETALL", (), _pairs),
    "functions": ("HGETALL", (), _numbers),
    "unsettled": ("SMEMBERS", (), _texts),
    **dict.fromkeys(("ready", "slots", "idle", "clients"), ("ZRANGE", (0, -1, "WITHSCORES"), _numbers)),
}
"""Kinds with one Redis key, named like their attribute -> command, its further arguments, decoder."""


# --- checking -----------------------------------------------------------------------------------------------


def _check_reasons(c: Contents) -> Iterator[Violation]:
    """What is kept has a reason, and what has a reason is made."""
    dependents = c.known_dependents()
    for key, row in c.records.items():
        if key in c.unsettled:
            continue
        if row.holders or c.count_active(dependents[key]):
            if row.state == "released":
                yield Violation("not raised", key, "is released and wanted")
            continue
        if row.state == "memory":
            yield Violation("unwanted data", key, "is in memory, without holder or unfinished dependent")
        elif row.state in ACTIVE:
            yield Violation("unwanted work", key, f"is {row.state}, without holder or unfinished dependent")
        if not dependents[key]:
            yield Violation("orphan record", key, f"is {row.state}, without holder or dependent")


def _check_left_over(c: Contents) -> Iterator[Violation]:
    if c.unsettled or any(c.held.values()):
        return
    kinds: dict[str, Iterable[str]] = {
        "record": c.records,
        "dependents": c.dependents,
        "queue entry": c.ready,
        "slot index": c.owned,
        "function": c.functions,
        "code": c.code,
        "blob": [name for name, ttl in c.blobs.items() if ttl == -1],
    }
    for kind, names in kinds.items():
        for name in names:
            yield Violation("left over", name, f"is a {kind} that is left while no client holds anything")


def _check_records(c: Contents) -> Iterator[Violation]:
    for key, row in c.records.items():
        if row.state not in STATES:
            yield Violation("state", key, f"is in state {row.state!r}")
        if strange := sorted(row.fields - TASK.keys()):
            yield Violation("state", key, f"has unknown fields {strange}")
        if row.state == "lost" and row.function:
            yield Violation("state", key, "is lost but has a function")
        if row.function and len(row.fields & {"payload", "payload_blob"}) != 1:
            yield Violation("payload", key, f"has {sorted(row.fields & {'payload', 'payload_blob'})}")
        data = row.fields & {"nbytes", "type", "value", "blob", "contains"}
        if row.state == "memory":
            if not data >= {"nbytes", "type"} or len(data & {"value", "blob"}) != 1:
                yield Violation("data", key, f"is in memory with {sorted(data)}")
        elif data:
            yield Violation("data", key, f"is {row.state} with {sorted(data)}")
        if row.fields & ATTACHED and "attached" not in row.fields:
            yield Violation("data", key, f"has {sorted(row.fields & ATTACHED)} and is not marked as attached")
        yield from _check_blame(c, row)


def _check_blame(c: Contents, row: Row) -> Iterator[Violation]:
    has_error = "error" in row.fields
    if row.state != "erred":
        if row.blame or has_error:
            yield Violation("blame", row.key, f"is {row.state} with an error blamed on {row.blame!r}")
    elif row.blame not in c.records:
        yield Violation("blame", row.key, f"blames {row.blame!r}, which has no record")
    elif has_error != (row.blame == row.key):
        yield Violation("blame", row.key, f"blames {row.blame!r} and has {'an' if has_error else 'no'} error")


def _check_dependencies(c: Contents) -> Iterator[Violation]:
    dependents = c.known_dependents()
    for key, row in c.records.items():
        deps = [c.records[dep] for dep in row.deps if dep in c.records]
        if len(deps) < len(row.deps):
            gone = [dep for dep in row.deps if dep not in c.records]
            yield Violation("missing dependency", key, f"depends on {gone}")
        missing = sum(dep.state != "memory" for dep in deps) + len(row.deps) - len(deps)
        waiting = missing if row.state == "waiting" else 0
        if row.waiting != waiting or (row.state == "waiting" and waiting == 0):
            yield Violation("waiting count", key, f"is {row.state} and counts {row.waiting}, not {waiting}")
        needed = c.count_active(dependents[key])
        if row.needed != needed:
            yield Violation("needed count", key, f"counts {row.needed}, not {needed}")
        if row.state in {"ready", "processing"} and missing:
            yield Violation("inputs missing", key, f"is {row.state} with {missing} inputs not in memory")
        broken = [dep.key for dep in deps if dep.state in {"erred", "lost"}]
        if row.state == "waiting" and broken and key not in c.unsettled:
            yield Violation("waits for error", key, f"waits for {broken}")


def _check_queue(c: Contents) -> Iterator[Violation]:
    ready = {row.rank + key: -row.priority for key, row in c.records.items() if row.state == "ready"}
    for entry in sorted(ready.keys() | c.ready.keys()):
        expected, found = ready.get(entry, math.nan), c.ready.get(entry, math.nan)
        if expected != found:
            text = f"has score {found:g} in the queue (nan: none), {expected:g} by its record"
            yield Violation("ready queue", entry[16:], text)


def _check_slots(c: Contents) -> Iterator[Violation]:
    by_record: dict[str, dict[str, str]] = defaultdict(dict)
    for key, row in c.records.items():
        if row.state == "processing":
            by_record[row.owner][key] = row.attempt
            if not row.owner or not row.attempt:
                yield Violation("slot index", key, f"runs for {row.owner!r} under attempt {row.attempt!r}")
    for slot in sorted(by_record.keys() | c.owned.keys()):
        yield from _differences("slot index", by_record.get(slot, {}), c.owned.get(slot, {}), f"slot {slot}")
    users = dict.fromkeys(c.wake, "has a wake-up")
    users |= dict.fromkeys(c.idle, "idles") | dict.fromkeys(by_record, "owns tasks")
    users |= {slot: f"belongs to node {node}" for node, slots in c.node_slots.items() for slot in slots}
    for slot, what in users.items():
        if slot not in c.slots:
            yield Violation("slot lease", slot, f"{what} without a lease")


def _check_attempts(c: Contents) -> Iterator[Violation]:
    last = int(c.meta.get(META["attempts"], 0))
    uses = Counter(row.attempt for row in c.records.values() if row.attempt)
    for key, row in c.records.items():
        if row.attempt and (uses[row.attempt] > 1 or not 0 < int(row.attempt) <= last):
            yield Violation(
                "attempt", key, f"has attempt {row.attempt}, given twice or never; last was {last}"
            )


def _check_dependents(c: Contents) -> Iterator[Violation]:
    known = c.known_dependents()
    for key in sorted(known.keys() | c.dependents.keys()):
        expected = dict.fromkeys(known.get(key, ()), "")
        found = dict.fromkeys(c.dependents.get(key, ()), "")
        yield from _differences("dependents index", expected, found, f"dependents of {key!r}")


def _check_holders(c: Contents) -> Iterator[Violation]:
    by_client: dict[str, set[str]] = defaultdict(set)
    for key, row in c.records.items():
        for holder in row.holders:
            if not holder.startswith("@"):
                by_client[holder].add(key)
            elif (outer := c.records.get(holder[1:])) is None or key not in outer.contains:
                yield Violation("holders index", key, f"is held by the result {holder[1:]!r} without it")
    for client in sorted(by_client.keys() | c.held.keys()):
        expected, found = by_client.get(client, set()), c.held.get(client, set())
        for key in sorted(expected ^ found):
            where = "only by its record" if key in expected else "only by the client's index"
            yield Violation("holders index", key, f"is held by {client} {where}")
    for client in sorted((by_client.keys() | c.held.keys() | c.notices) - c.clients.keys()):
        yield Violation("client lease", client, "holds or hears without a lease")


def _check_functions(c: Contents) -> Iterator[Violation]:
    counts = Counter(row.function for row in c.records.values() if row.function)
    for name in sorted(counts.keys() | c.functions.keys()):
        if counts[name] != c.functions.get(name, 0):
            text = f"is counted {c.functions.get(name, 0):g} times, not {counts[name]}"
            yield Violation("function count", name, text)
    for name in sorted(counts.keys() ^ c.code):
        text = "is in use without code" if name in counts else "has code and no use"
        yield Violation("function code", name, text)


def _check_blobs(c: Contents) -> Iterator[Violation]:
    named = {f"{row.blob}:{key}" for key, row in c.records.items() if row.blob}
    named |= {f"{row.payload_blob}:{key}" for key, row in c.records.items() if row.payload_blob}
    for name in sorted(named - c.blobs.keys()):
        yield Violation("blob missing", name, "is named by a record and does not exist")
    for name, ttl in c.blobs.items():
        if name in named and ttl != -1:
            yield Violation("blob lease", name, f"is named by a record and would vanish in {ttl} ms")
        if name not in named and ttl == -1:
            yield Violation("blob lease", name, "would stay for ever and no record names it")


def _check_unknown(c: Contents) -> Iterator[Violation]:
    for name, kind in c.unknown.items():
        yield Violation("unknown key", name, f"is a {kind}")


def _differences(
    rule: str, expected: Mapping[str, str], found: Mapping[str, str], where: str
) -> Iterator[Violation]:
    """Compare an index with what the records say of it."""
    for key in sorted(expected.keys() | found.keys()):
        want, have = expected.get(key), found.get(key)
        if want != have:
            yield Violation(rule, key, f"is {have!r} in {where}, {want!r} by its record (None: not there)")


CHECKS = (
    _check_reasons,
    _check_left_over,
    _check_records,
    _check_dependencies,
    _check_queue,
    _check_slots,
    _check_attempts,
    _check_dependents,
    _check_holders,
    _check_functions,
    _check_blobs,
    _check_unknown,
)
