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

from celery_mem.state.keys import ACTIVE, FIXED, FLAGS, META, PREFIXES, STATES, TASK
from celery_mem.state.link import Link
from celery_mem.state.records import Recipe, read_core, read_recipe, read_result
from celery_mem.state.store import OUTLIVE_NODES, REDIS, Store

RULES = {
    # what is kept, and why
    "unwanted data": "data stays while it has a holder or an unfinished dependent, or is others' lineage",
    "unwanted work": "a task waits or runs only while it has a holder or an unfinished dependent",
    "orphan record": "a record stays only while it has a holder or a dependent with a record",
    "not raised": "a released key that has a holder or an unfinished dependent is made again",
    "left over": "when no client holds anything, nothing is left",
    # what a record says
    "state": "a record has a known state and known fields; only data without function is lost",
    "data": "exactly a record in memory has data: a size, a type, and either a value or replicas",
    "payload": "a record with a function has either a payload or a payload blob",
    "flags": "a record has a flag if and only if it has the field; near or prefer, if it has a home",
    "durable": "what is durable has no lineage; undurable names what is in memory and is to be durable",
    "forgotten": "exactly a task that runs for nobody has the flag, and it has not ended",
    "replicas": "copies have a token and the result's size; some are there, each in Redis or on a live node",
    "copies index": "copies names the records that want more copies than any one",
    "blame": "exactly an erred record names a record to blame, which is itself if it has the error",
    "missing dependency": "every dependency of a record has a record",
    "waits for error": "a task that waits for an erred or lost one errs",
    # counts
    "waiting count": "waiting is the number of dependencies not in memory, 0 unless the task waits",
    "needed count": "needed is the number of dependents that wait, are ready or run",
    "inputs missing": "all dependencies of a ready task are in memory",
    "function count": "functions counts the records of each function",
    "constraint count": "constraints counts the records of each constraint; no other is known as unrunnable",
    # indexes
    "ready queue": "every ready task is in one queue, the one that its record names, under its priority",
    "node index": "the keys of a node are those of the records that name it as a place",
    "node lease": "a node with a record, keys, a queue, mail or tickets is alive, if only with an old lease",
    "slot index": "a running task has an owner and an attempt, and its slot's index says the same",
    "slot lease": "a slot that owns, idles, is woken or belongs to a node has a lease, if only an old one",
    "attempt": "attempt numbers come from one counter, and none was given twice",
    "dependents index": "the dependents of a key are the records that depend on it",
    "holders index": "the holders of a record and the keys of a holder say the same",
    "client lease": "what holds or hears has a lease, if only an old one, or an heir, or is a dataset",
    "names": "a name belongs to a client with a lease; who has an heir has no lease, but the heir does",
    "datasets": "every dataset has a holder of its own",
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

    @property
    def meaning(self) -> str:
        """What the rule says."""
        return RULES[self.rule]

    def __str__(self) -> str:
        return f"{self.rule}: {self.key!r} {self.text} ({self.meaning})"


def audit(store: Store) -> list[Violation]:
    """Check the namespace of `store`; an empty list means that every rule in `RULES` holds.

    Keys that wait in `unsettled` for the sweep are excused from the rules that it will enforce on them.
    """
    return violations(read(store))


def violations(contents: Contents) -> list[Violation]:
    """Check what was read of a namespace, as `audit` does."""
    return [violation for check in CHECKS for violation in check(contents)]


# --- reading ------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A task record without its bulk; missing fields are empty."""

    key: str
    fields: frozenset[str]  # names in TASK of the fields it has; unknown ones as they are
    state: str = ""  # what cannot be read has none
    function: str = ""
    payload_blob: str = ""
    deps: list[str] = field(default_factory=list)
    holders: dict[str, int] = field(default_factory=dict)
    priority: float = 0
    rank: str = ""
    waiting: int = 0
    needed: int = 0
    attempt: str = ""
    owner: str = ""
    flags: str = ""
    nbytes: str = ""
    token: str = ""
    maker: str = ""
    copy_nbytes: str = ""  # the size that `replicas` tells
    places: list[str] = field(default_factory=list)
    copies: int = 1
    copies_on: list[str] = field(default_factory=list)
    constraint: str = ""
    prefer: list[str] = field(default_factory=list)
    home: str = ""  # while ready: size class and node
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
    home_queues: dict[str, dict[str, float]] = field(default_factory=dict)
    picky: dict[str, dict[str, float]] = field(default_factory=dict)
    nodes: dict[str, float] = field(default_factory=dict)
    node_keys: dict[str, set[str]] = field(default_factory=dict)
    node_records: set[str] = field(default_factory=set)  # nodes with a hash
    mail: set[str] = field(default_factory=set)  # nodes with a mailbox
    node_tickets: set[str] = field(default_factory=set)  # nodes with tickets of their own
    copies: set[str] = field(default_factory=set)
    constraints: dict[str, float] = field(default_factory=dict)
    unrunnable: dict[str, float] = field(default_factory=dict)
    unsettled: set[str] = field(default_factory=set)
    owned: dict[str, dict[str, str]] = field(default_factory=dict)
    slots: dict[str, float] = field(default_factory=dict)
    idle: dict[str, float] = field(default_factory=dict)
    node_slots: dict[str, set[str]] = field(default_factory=dict)
    clients: dict[str, float] = field(default_factory=dict)
    notices: dict[str, int] = field(default_factory=dict)  # with its time to live, ms
    names: dict[str, str] = field(default_factory=dict)  # name -> client
    heirs: dict[str, str] = field(default_factory=dict)  # client that lost its name -> client
    datasets: dict[str, str] = field(default_factory=dict)  # name -> holder
    undurable: set[str] = field(default_factory=set)
    debris: set[str] = field(default_factory=set)
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

    def queues(self) -> dict[str, dict[str, float]]:
        """All ready queues, by what tells them apart."""
        found = {f"node {node}": entries for node, entries in self.home_queues.items()}
        found |= {f"constraint {signature}": entries for signature, entries in self.picky.items()}
        return {"shared": self.ready, **found}


TYPES = {
    **dict.fromkeys(("ready", "clients", "nodes", "slots", "idle", "tickets"), "zset"),
    **dict.fromkeys(("home_queue", "picky", "node_tickets", "watchers", "recordings"), "zset"),
    **dict.fromkeys(
        ("meta", "functions", "task", "dependents", "blob", "slot", "node", "constraints", "counts"), "hash"
    ),
    **dict.fromkeys(("jobs", "unrunnable", "names", "heirs", "datasets"), "hash"),
    **dict.fromkeys(("unsettled", "held", "node_slots", "node_keys", "copies", "undurable", "debris"), "set"),
    **dict.fromkeys(("leader", "function", "revoked"), "string"),
    **dict.fromkeys(("notices", "lines"), "stream"),
    **dict.fromkeys(("wake", "mail", "reply", "failures"), "list"),
}
_BULK = {"payload", "value", "error"}
_SMALL = [name for name in TASK if name not in _BULK]
_FIELD_NAMES = {short: name for name, short in TASK.items()}
_BATCH = 1000


def read(store: Store) -> Contents:
    """Read the whole namespace of `store`."""
    keys = _scan(store)
    types = [kind.decode() for kind in _batched(store.link, [("TYPE", key) for key in keys])]
    contents = Contents()
    asks: list[_Ask] = []
    for key, found in zip(keys, types, strict=True):
        kind, name = _kind_of(_text(key)[len(store.keys.prefix) :])
        if TYPES.get(kind) == found:
            asks += _asks(contents, kind, name, key)
        elif found != "none":  # it expired, or was deleted, since the scan
            contents.unknown[_text(key)] = found
    for start in range(0, len(asks), _BATCH):
        page = asks[start : start + _BATCH]
        for ask, reply in zip(page, store.link.batch([ask.command for ask in page]), strict=True):
            ask.into[ask.name] = ask.decode(reply)
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


class _Ask(NamedTuple):
    """A command, and where its decoded reply goes."""

    command: tuple[Any, ...]
    into: dict[str, Any]
    name: str
    decode: Callable[[Any], Any]


def _asks(contents: Contents, kind: str, name: str, key: bytes) -> Iterator[_Ask]:
    """What to ask for one key, so that the attribute of `contents` for its kind has it."""
    if kind == "task":
        fields: dict[str, Any] = {}
        yield _Ask(("HKEYS", key), fields, name, _texts)
        small = ("HMGET", key, *(TASK[name] for name in _SMALL))
        yield _Ask(small, contents.records, name, lambda reply: _row(name, fields[name], reply))
    elif kind in _READ_EACH:
        attribute, command, after, decode = _READ_EACH[kind]
        yield _Ask((command, key, *after), getattr(contents, attribute), name, decode)
    elif kind in _READ_ONE:
        command, after, decode = _READ_ONE[kind]
        yield _Ask((command, key, *after), vars(contents), kind, decode)
    elif kind in _READ_NAMES:
        getattr(contents, _READ_NAMES[kind]).add(name)


def _row(key: str, fields: Iterable[str], small: Sequence[bytes | None]) -> Row:
    raw = dict(zip(_SMALL, small, strict=True))
    text = {name: _text(value) if value is not None else "" for name, value in raw.items()}
    try:
        core = read_core(raw["core"] or b"")
        recipe = read_recipe(raw["recipe"]) or Recipe("", 0, "")
        result = read_result(raw["result"])
    except ValueError:
        return Row(key, frozenset(_FIELD_NAMES.get(name, name) for name in fields))
    token, maker, copy_nbytes, *places = text["replicas"].split("\n") if text["replicas"] else ("", "", "")
    return Row(
        key,
        frozenset(_FIELD_NAMES.get(name, name) for name in fields),
        state=core.state,
        function=recipe.function,
        payload_blob=text["payload_blob"],
        deps=_lines(text["deps"]),
        holders=dict(core.holders),
        priority=recipe.priority,
        rank=recipe.rank,
        waiting=core.waiting,
        needed=core.needed,
        attempt=core.attempt,
        owner=text["owner"],
        flags=core.flags,
        nbytes=str(result.nbytes) if result else "",
        token=token,
        maker=maker,
        copy_nbytes=copy_nbytes,
        places=places,
        copies=int(text["copies"] or 1),
        copies_on=_lines(text["copies_on"]),
        constraint=text["constraint"],
        prefer=_lines(text["prefer"]),
        home=text["home"] if core.state == "ready" else "",
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


def _holders(reply: Sequence[bytes]) -> dict[str, str]:
    """Name -> holder, of which the first line tells."""
    pairs = zip(reply[::2], reply[1::2], strict=True)
    return {_text(name): _text(content.partition(b"\n")[0]) for name, content in pairs}


def _numbers(reply: Sequence[bytes]) -> dict[str, float]:
    return {name: float(number) for name, number in _pairs(reply).items()}


_Decode = Callable[[Any], Any]
_ENTRIES: tuple[str, tuple[Any, ...], _Decode] = ("ZRANGE", (0, -1, "WITHSCORES"), _numbers)
_MEMBERS: tuple[str, tuple[Any, ...], _Decode] = ("SMEMBERS", (), _texts)

_READ_EACH: dict[str, tuple[str, str, tuple[Any, ...], _Decode]] = {
    "dependents": ("dependents", "HKEYS", (), _texts),
    "slot": ("owned", "HGETALL", (), _pairs),
    "blob": ("blobs", "PTTL", (), int),
    "notices": ("notices", "PTTL", (), int),
    "held": ("held", *_MEMBERS),
    "node_slots": ("node_slots", *_MEMBERS),
    "node_keys": ("node_keys", *_MEMBERS),
    "home_queue": ("home_queues", *_ENTRIES),
    "picky": ("picky", *_ENTRIES),
}
"""Kinds with a Redis key for each name -> attribute of Contents, command, its further arguments, decoder."""

_READ_NAMES = {
    "function": "code",
    "wake": "wake",
    "node": "node_records",
    "mail": "mail",
    "node_tickets": "node_tickets",
}
"""Kinds of which only the names count -> attribute of Contents."""

_READ_ONE: dict[str, tuple[str, tuple[Any, ...], _Decode]] = {
    "meta": ("HGETALL", (), _pairs),
    **dict.fromkeys(("functions", "constraints", "unrunnable"), ("HGETALL", (), _numbers)),
    **dict.fromkeys(("names", "heirs"), ("HGETALL", (), _pairs)),
    "datasets": ("HGETALL", (), _holders),
    **dict.fromkeys(("unsettled", "copies", "undurable", "debris"), _MEMBERS),
    **dict.fromkeys(("ready", "slots", "idle", "clients", "nodes"), _ENTRIES),
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
        if row.state == "memory" and not (is_cut(row) and dependents[key]):
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
        "queue entry": [entry for queue in c.queues().values() for entry in queue],
        "index of copies": [key for keys in c.node_keys.values() for key in keys] + sorted(c.copies),
        "constraint": c.constraints,
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
        data = row.fields & {"result", "value", "replicas", "contains"}
        if row.state == "memory":
            if "result" not in data or len(data & {"value", "replicas"}) != 1:
                yield Violation("data", key, f"is in memory with {sorted(data)}")
        elif data:
            yield Violation("data", key, f"is {row.state} with {sorted(data)}")
        yield from _check_flags(row)
        yield from _check_blame(c, row)


def _check_flags(row: Row) -> Iterator[Violation]:
    flagged = {name for name, letter in FLAGS.items() if letter in row.flags}
    fields = row.fields & FLAGS.keys() | ({"copies"} if "copies_on" in row.fields else set())
    if flagged - {"near", "known", "forgotten", "durable"} != fields:
        yield Violation("flags", row.key, f"has {sorted(fields)} and flags for {sorted(flagged)}")
    if row.home and not flagged & {"near", "prefer"}:  # the scripts would look for it in the shared queue
        yield Violation("flags", row.key, f"has home {row.home!r} and flags for {sorted(flagged)}")


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
        if row.state == "ready" and missing:  # a running one may have read them before they were lost
            yield Violation("inputs missing", key, f"is {row.state} with {missing} inputs not in memory")
        broken = [dep.key for dep in deps if dep.state in {"erred", "lost"}]
        if row.state == "waiting" and broken and key not in c.unsettled:
            yield Violation("waits for error", key, f"waits for {broken}")


def _check_queue(c: Contents) -> Iterator[Violation]:
    ready: dict[str, dict[str, float]] = defaultdict(dict)
    for key, row in c.records.items():
        if row.state != "ready":
            continue
        if row.constraint:
            ready[f"constraint {row.constraint}"][row.rank + key] = -row.priority
        elif row.home:
            ready[f"node {row.home[1:]}"][row.rank + row.home[0] + key] = -row.priority
        else:
            ready["shared"][row.rank + key] = -row.priority
    queues = c.queues()
    for name in sorted(ready.keys() | queues.keys()):
        queue = queues.get(name, {})
        for entry in sorted(ready[name].keys() | queue.keys()):
            expected, found = ready[name].get(entry, math.nan), queue.get(entry, math.nan)
            if expected != found:
                text = f"has score {found:g} in the queue {name} (nan: none), {expected:g} by its record"
                yield Violation("ready queue", entry[17 if name.startswith("node ") else 16 :], text)


def _check_copies(c: Contents) -> Iterator[Violation]:
    by_node: dict[str, set[str]] = defaultdict(set)
    for key, row in c.records.items():
        for place in row.places:
            if place not in OUTLIVE_NODES:
                by_node[place].add(key)
        if "replicas" not in row.fields:
            continue
        if not row.token or not row.places or len(set(row.places)) != len(row.places):
            yield Violation("replicas", key, f"has version {row.token!r} at {row.places}")
        if row.copy_nbytes != row.nbytes:
            yield Violation("replicas", key, f"has copies of {row.copy_nbytes!r} bytes, not {row.nbytes!r}")
        if gone := sorted(set(row.places) - OUTLIVE_NODES - c.nodes.keys()):
            yield Violation("replicas", key, f"has copies on {gone}, which are not alive")
    for node in sorted(by_node.keys() | c.node_keys.keys()):
        for key in sorted(by_node[node] ^ c.node_keys.get(node, set())):
            where = "only by its record" if key in by_node[node] else "only by the node's index"
            yield Violation("node index", key, f"is on {node} {where}")
    wanting = {key for key, row in c.records.items() if row.copies > 1 or row.copies_on}
    for key in sorted(wanting ^ c.copies):
        yield Violation("copies index", key, "wants copies " + ("unlisted" if key in wanting else "no more"))


def _check_nodes(c: Contents) -> Iterator[Violation]:
    users = dict.fromkeys(c.node_records, "has a record") | dict.fromkeys(c.node_keys, "has keys")
    users |= dict.fromkeys(c.home_queues, "has a queue") | dict.fromkeys(c.mail, "has mail")
    users |= dict.fromkeys(c.node_tickets, "has tickets")
    for node in sorted(users.keys() - c.nodes.keys()):
        yield Violation("node lease", node, f"{users[node]} without a lease")


def _check_constraints(c: Contents) -> Iterator[Violation]:
    counts = Counter(row.constraint for row in c.records.values() if row.constraint)
    for signature in sorted(counts.keys() | c.constraints.keys()):
        if counts[signature] != c.constraints.get(signature, 0):
            text = f"is counted {c.constraints.get(signature, 0):g} times, not {counts[signature]}"
            yield Violation("constraint count", signature, text)
    for signature in sorted(c.unrunnable.keys() - counts.keys() - {""}):
        yield Violation("constraint count", signature, "is known as unrunnable and no task has it")


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
    lasting = {"!", *c.datasets.values(), *c.heirs}
    for client in sorted((by_client.keys() | c.held.keys()) - c.clients.keys() - lasting):
        yield Violation("client lease", client, "holds without a lease")
    lasting = {client for client, ttl in c.notices.items() if ttl == -1}  # others are word of a restart
    for client in sorted(lasting - c.clients.keys() - c.heirs.keys()):
        yield Violation("client lease", client, "hears without a lease")


def _check_lifetimes(c: Contents) -> Iterator[Violation]:
    """Names, datasets, tasks that run for nobody, and what outlives the nodes."""
    for name, client in c.names.items():
        if client not in c.clients:
            yield Violation("names", name, f"belongs to {client}, which has no lease")
    for client, heir in c.heirs.items():
        if client in c.clients or heir not in c.clients:
            yield Violation("names", client, f"has the heir {heir}, and one of them the wrong lease")
    for name, holder in c.datasets.items():
        if not holder.startswith("#") or holder in c.clients:
            yield Violation("datasets", name, f"has the holder {holder!r}, which is none or has a lease")
    for key, row in c.records.items():
        runs = "!" in row.holders
        if runs != (FLAGS["forgotten"] in row.flags) or (runs and row.state not in {*ACTIVE, "released"}):
            yield Violation(
                "forgotten", key, f"is {row.state}, held by {sorted(row.holders)}, flags {row.flags!r}"
            )
        if row.function and is_durable(row):
            yield Violation("durable", key, "is durable and keeps its lineage")
        is_asked_for = row.state == "memory" and FLAGS["durable"] in row.flags and not is_durable(row)
        if is_asked_for != (key in c.undurable):
            yield Violation(
                "durable", key, f"is {row.state} at {row.places}, and wrongly or not among undurable"
            )
    for key in sorted(c.undurable - c.records.keys()):
        yield Violation("durable", key, "is among undurable and has no record")


def is_durable(row: Row) -> bool:
    """Tell whether a result that was to outlive all nodes does."""
    is_safe = "value" in row.fields or bool(OUTLIVE_NODES & set(row.places))
    return FLAGS["durable"] in row.flags and row.state == "memory" and is_safe


def is_cut(row: Row) -> bool:
    """Tell whether a durable result has given up its lineage, and is that of what depends on it."""
    return is_durable(row) and not row.function


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
    named = {f"{row.token}:{key}" for key, row in c.records.items() if REDIS in row.places}
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
    _check_copies,
    _check_nodes,
    _check_constraints,
    _check_slots,
    _check_attempts,
    _check_dependents,
    _check_holders,
    _check_lifetimes,
    _check_functions,
    _check_blobs,
    _check_unknown,
)
