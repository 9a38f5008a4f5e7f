"""The state machine in plain Python: the model that the scripts are checked against.

Written to be obviously right, not fast: whatever follows from the records (dependents, needed, wanted,
waiting, the ready queue, what a slot owns) is computed afresh on each question, and `settle` looks at all
records again until no rule applies to any. A script does the same on a short list of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from celery_mem.errors import UnknownDependencyError, UnknownNodeError
from celery_mem.state.placement import (
    Entry,
    Node,
    best_homes,
    cheapest,
    fair_share,
    fits,
    may_run_on,
    move_ms,
    needs_of,
    size_class,
    wait_ms,
)
from celery_mem.state.store import DURABLE, OUTLIVE_NODES, REDIS

WAITING, READY, PROCESSING = "waiting", "ready", "processing"
MEMORY, ERRED, RELEASED, LOST = "memory", "erred", "released", "lost"

ACTIVE = frozenset({WAITING, READY, PROCESSING})
BROKEN = frozenset({ERRED, LOST})  # a task that waits for one of these errs

TRANSITIONS: dict[str, frozenset[str]] = {
    RELEASED: frozenset({WAITING, MEMORY}),
    WAITING: frozenset({READY, ERRED, RELEASED, MEMORY}),
    READY: frozenset({PROCESSING, WAITING, ERRED, RELEASED, MEMORY}),
    PROCESSING: frozenset({MEMORY, WAITING, ERRED, RELEASED}),
    MEMORY: frozenset({RELEASED, LOST}),
    ERRED: frozenset({RELEASED, MEMORY}),
    LOST: frozenset({MEMORY}),
}
"""State -> the states that may follow it. Only a released, erred or lost record may be forgotten."""
LARGEST_GIVEN, MOST_GIVEN = 512, 4096
"""Bytes of one value that becomes part of a task, and of all of a task; as lib/given.lua has them."""


class Task(NamedTuple):
    """One task of a `submit`; `deps` are distinct keys, `order` is its place in the call's graph."""

    key: str
    function: str | None = None
    payload: bytes = b""
    deps: tuple[str, ...] = ()
    priority: float = 0
    order: int = 0
    retries: int = 0
    hold: bool = True
    epoch: int = 0  # of its hold, where it is not the call's
    constraint: str = ""
    prefer: tuple[str, ...] = ()


class Data(NamedTuple):
    """A result as its record tells it.

    Attributes:
        value: the bytes of a small result; None where there are copies of them.
        contains: keys of the futures inside, which live as long as the result does.
        token: names the version of the bytes where there are copies.
        place: where the first copy is.
    """

    nbytes: int
    type: str = "object"
    value: bytes | None = None
    contains: tuple[str, ...] = ()
    token: str = ""
    place: str = REDIS


class Done(NamedTuple):
    """A completion; `data` is None where its blob has vanished, so that the task must run again."""

    key: str
    attempt: int
    data: Data | None


class Failed(NamedTuple):
    key: str
    attempt: int
    error: bytes
    retryable: bool = True


class Back(NamedTuple):
    key: str
    attempt: int


class Missing(NamedTuple):
    """An attempt that found no input; `lost` are the copies that were not there, as key, token and place."""

    key: str
    attempt: int
    lost: tuple[tuple[str, str, str], ...]


class Claim(NamedTuple):
    key: str
    attempt: int


class StepReply(NamedTuple):
    """`stale`: keys of reports that came too late; `claimed`: what the slot is to run now, in order."""

    stale: list[str]
    claimed: list[Claim]


class Notice(NamedTuple):
    """What a holder is told; codes: m value, M in memory, e error, p pending again, c cancelled, l lost."""

    client: str
    key: str
    epoch: int
    code: str


@dataclass
class Record:
    """One task record; what can be derived from other records is not stored here."""

    key: str
    state: str
    function: str | None = None
    payload: bytes = b""
    deps: tuple[str, ...] = ()
    priority: float = 0
    rank: str = ""
    retries: int = 0  # what is left of them
    deaths: int = 0  # slots that died while they ran this task
    attempt: int = 0  # the current or last one, 0 if data came without one
    owner: str | None = None  # Invariant: a slot while processing, else None
    data: Data | None = None  # Invariant: given exactly in state memory
    maker: str = ""  # slot that made the data, where there are copies of it
    places: set[str] = field(default_factory=set)  # Invariant: some exactly in state memory without a value
    copies: int = 1  # wanted number of nodes with a copy
    copies_on: tuple[str, ...] = ()  # nodes that are to have one
    given: dict[int, tuple[str, bytes]] = field(default_factory=dict)  # place among the inputs -> key, value
    constraint: str = ""
    prefer: tuple[str, ...] = ()
    home: str = ""  # while ready, the node in whose queue it is; empty: another queue
    letter: str = ""  # size class of its inputs at home
    homes: set[str] = field(default_factory=set)  # nodes that might have been its home
    is_placed: bool = False  # whether the three above are up to date, while ready
    error: bytes | None = None  # Invariant: given exactly while erred and to blame for it
    blame: str | None = None  # Invariant: given exactly while erred
    durable: bool = False  # it is to outlive all nodes
    # client -> epoch of its hold; "@key", see Data; "#token" is a dataset, "!" a task that runs for nobody
    holders: dict[str, int] = field(default_factory=dict)


def is_client(holder: str) -> bool:
    """Tell whether a holder is a client, and no result, dataset, or task that runs for nobody."""
    return not holder.startswith(("@", "#", "!"))


class Model:
    """A namespace. Every operation settles to the end, and can be repeated without harm."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.nodes: dict[str, Node] = {}  # live ones
        self.slots: dict[str, str] = {}  # slot that runs a ticket -> its node
        self.mail: list[tuple[str, str]] = []  # node, message
        self.last_attempt = 0
        self.choices: dict[str, str] = {}  # key -> which of several nodes is to be its home
        self.notices: list[Notice] = []
        self.names: dict[str, str] = {}  # name -> client
        self.datasets: dict[str, str] = {}  # name -> holder
        self.failures: list[tuple[str, str]] = []  # key, blame
        self.debris: list[str] = []  # tokens of durable files

    # --- what follows from the records ----------------------------------------------------------------------

    def dependents(self, key: str) -> list[str]:
        return [k for k, record in self.records.items() if key in record.deps]

    def needed(self, key: str) -> int:
        return sum(self.records[k].state in ACTIVE for k in self.dependents(key))

    def wanted(self, key: str) -> bool:
        return bool(self.records[key].holders) or self.needed(key) > 0

    def waiting(self, key: str) -> int:
        return sum(self.records[d].state != MEMORY for d in self.records[key].deps)

    def in_state(self, *states: str) -> list[Record]:
        return [record for record in self.records.values() if record.state in states]

    def queue(self, home: str = "", constraint: str = "") -> list[Entry]:
        """The queue of a node, that of a constraint, or else the shared one; first to run comes first."""
        here = [r for r in self.in_state(READY) if (r.home, r.constraint) == (home, constraint)]
        return sorted(Entry(-r.priority, r.rank + r.letter + r.key, r.key, r.letter) for r in here)

    def free_resources(self, node: str) -> dict[str, float]:
        """What a node has, less what the tasks of its slots use."""
        free = dict(self.nodes[node].resources) if node in self.nodes else {}
        for record in self.in_state(PROCESSING):
            if self.slots.get(record.owner or "") == node:
                for name, amount in needs_of(record.constraint).items():
                    free[name] = free.get(name, 0) - amount
        return free

    def unrunnable(self) -> dict[str, int]:
        """Constraint -> ready tasks that no live node may run, not even later."""
        found: dict[str, int] = {}
        for r in self.in_state(READY):
            able = (
                node.may_take
                and may_run_on(r.constraint, name)
                and fits(needs_of(r.constraint), node.resources)
                for name, node in self.nodes.items()
            )
            if not r.home and not any(able):
                found[r.constraint] = found.get(r.constraint, 0) + 1
        return found

    def may_have_erred(self, key: str) -> bool:
        """Whether it is a matter of timing that a key is released or erred: nobody wants it, and it inherits.

        What needs it and cannot be had may err first; then nobody looks at it any more.
        """
        record = self.records[key]
        is_lineage = record.state in (RELEASED, ERRED) and not self.wanted(key)
        return is_lineage and record.error is None and bool(self.blames(key))

    def blames(self, key: str) -> set[str]:
        """Keys that an error of `key` may be blamed on: which of several is a matter of timing."""
        return {self._blame_of(d) for d in self.records[key].deps if self.records[d].state in BROKEN}

    # --- operations: one script each ------------------------------------------------------------------------

    def submit(self, client: str, epoch: int, generation: int, tasks: Sequence[Task]) -> None:
        """Add records for `tasks` and hold those that say so; an existing record is kept as it is.

        Raises:
            UnknownDependencyError: a dependency is neither a record nor earlier in `tasks`; nothing changed.
        """
        known = set(self.records)
        for task in tasks:
            for dep in task.deps:
                if dep not in known:
                    raise UnknownDependencyError("submit", f"{task.key} depends on {dep}")
            known.add(task.key)
        stale_errors = []
        for task in tasks:
            if (record := self.records.get(task.key)) is None:
                record = self._create(task, generation, {t.key for t in tasks})
            if not record.holders and record.state == ERRED:
                stale_errors.append(record)
            if task.hold:
                record.holders[client] = task.epoch or epoch
        for record in stale_errors:
            if record.state == ERRED and not self._erred_dependents(record.key):
                self._reset([record.key])
        self._tell_state(client, [(task.key, task.epoch or epoch) for task in tasks if task.hold])
        self.settle()

    def put(self, client: str, epoch: int, key: str, data: Data) -> None:
        """Hold `key` with `data`, given by the client instead of a run; data that is there already stays.

        Raises:
            UnknownNodeError: the copy is on a node that is not alive; nothing changed.
        """
        if data.value is None and not self._is_place(data.place):
            raise UnknownNodeError("put", data.place)
        record = self.records.get(key)
        if record is None:
            record = self.records[key] = Record(key, RELEASED)
        record.holders[client] = epoch
        if record.state == MEMORY:
            self._tell_state(client, [(key, epoch)])
            if data.value is None and not self._has_copy(record, data.token, data.place):
                self._mail_drop(data.place, data.token)
        else:
            taken_down = list(self._erred_dependents(key)) if record.state in (ERRED, LOST) else []
            self._remember(record, data)
            record.attempt = 0  # a run that ends later comes too late
            self._reset(taken_down)
        self.settle()

    def hold(self, client: str, epoch: int, keys: Sequence[str]) -> list[str]:
        """Hold `keys`; return those without a record."""
        known = [key for key in keys if key in self.records]
        for key in known:
            self.records[key].holders[client] = epoch
        self._tell_state(client, [(key, epoch) for key in known])
        self.settle()
        return [key for key in keys if key not in known]

    def hold_again(self, client: str, holds: Sequence[tuple[str, int]]) -> list[str]:
        """Hold keys, each under a number of its own; return those without a record."""
        known = [(key, epoch) for key, epoch in holds if key in self.records]
        for key, epoch in known:
            self.records[key].holders[client] = epoch
        self._tell_state(client, known)
        self.settle()
        return [key for key, _ in holds if key not in self.records]

    def release(self, client: str, keys: Iterable[str]) -> None:
        """Drop the client's holds on `keys`."""
        for key in keys:
            if key in self.records:
                self.records[key].holders.pop(client, None)
        self.settle()

    def cancel(self, client: str, keys: Iterable[str], force: bool = False) -> list[str]:
        """Drop holds on `keys` and on all that depends on them, as far as nobody else holds it.

        What may have been stopped so while it runs, its agent gets word of.

        Args:
            force: drop the holds of other clients as well; they are told. What a result contains, it keeps.
        Returns: the keys on which `client` had a hold that it lost.
        """
        dropped = []
        queue = [key for key in keys if key in self.records]
        visited: set[str] = set()
        while queue:
            key = queue.pop(0)
            if key in visited:
                continue
            visited.add(key)
            record = self.records[key]
            if record.holders.pop(client, None) is not None:
                dropped.append(key)
            if force:
                self._tell(record, "c")
                record.holders = {h: epoch for h, epoch in record.holders.items() if h.startswith("@")}
            if force or not record.holders:
                self._mail_stop(record)
                queue += self.dependents(key)
        self.settle()
        return dropped

    def retry(self, client: str, keys: Iterable[str]) -> list[str]:
        """Forget the errors of `keys`, those they come from and those that came from them, and run again.

        Returns those of them that the client holds.
        """
        held = [key for key in self._reset(keys) if client in self.records[key].holders]
        self.settle()
        return held

    def step(
        self,
        slot: str,
        done: Iterable[Done] = (),
        failed: Iterable[Failed] = (),
        back: Iterable[Back] = (),
        missing: Iterable[Missing] = (),
        want: int = 0,
        mode: str = "",
        node: str = "node",
        idle: Iterable[str] = (),
    ) -> StepReply:
        """Report what became of attempts, then take up to `want` ready tasks.

        Args:
            mode: letters: r give first what the slot owns already, as its last call may have gone unheard;
                l leave if there is nothing to take; q leave in any case and take nothing; p take nothing new.
            node: the slot's node.
            idle: slots that wait for work.
        """
        self.slots[slot] = node
        stale: list[str] = []
        for d in done:
            if record := self._current(d.key, d.attempt, stale):
                self._complete(record, d.data, slot, stale)
        for f in failed:
            if record := self._current(f.key, f.attempt, stale):
                self._fail(record, f)
        for b in back:
            if record := self._current(b.key, b.attempt, stale):
                self._become(record, WAITING)
        for m in missing:
            for key, token, place in m.lost:
                self._lose_copy(key, token, place)
            if record := self._current(m.key, m.attempt, stale):
                self._become(record, WAITING)
        were_ready = {r.key for r in self.in_state(READY)}
        self.settle()
        fresh = {r.key for r in self.in_state(READY)} - were_ready
        claimed = self._take(slot, want, mode, fresh, set(idle))
        if "q" in mode or ("l" in mode and not claimed):
            del self.slots[slot]
        return StepReply(stale, claimed)

    def abandon_slot(self, slot: str, allowed: int, error: bytes) -> tuple[list[str], list[str]]:
        """Give up a slot that is gone: what it ran is ready again, or errs after more than `allowed` deaths.

        Returns: the keys that it ran, and those of them that erred.
        """
        lost = [r for r in self.in_state(PROCESSING) if r.owner == slot]
        for record in lost:
            record.deaths += 1
            if record.deaths > allowed:
                self._err(record, record.key, error)
            else:
                self._become(record, WAITING)
        self.slots.pop(slot, None)
        self.settle()
        return [r.key for r in lost], [r.key for r in lost if r.deaths > allowed]

    def expire_client(self, client: str) -> None:
        """Release all that `client` holds."""
        self.names = {name: owner for name, owner in self.names.items() if owner != client}
        self.release(client, list(self.records))

    # --- results that need no client

    def take_over(self, client: str, name: str, epoch: int) -> None:
        """`client` gets a name, and the holds of the one that had it."""
        before = self.names.get(name, client)
        self.names[name] = client
        for key, record in self.records.items():
            if (
                before != client
                and record.holders.pop(before, None) is not None
                and client not in record.holders
            ):
                record.holders[client] = epoch
                self._tell_state(client, [(key, epoch)])
        self.settle()

    def publish(self, name: str, holder: str, keys: Sequence[str], override: bool) -> bool:
        """A dataset holds `keys`, if it may in the place of one of that name; tell whether it is there."""
        for key in keys:
            if key in self.records:
                self.records[key].holders[holder] = 1
        before = self.datasets.get(name)
        if before is not None and not override:
            self.release(holder, keys)
            return False
        self.datasets[name] = holder
        if before is not None:
            self.release(before, list(self.records))
        self.settle()
        return True

    def unpublish(self, name: str) -> None:
        """A dataset holds nothing any more."""
        self.release(self.datasets.pop(name, ""), list(self.records))

    def entrust(self, keys: Iterable[str]) -> list[str]:
        """Tasks run to their end though nobody holds them; return the keys without a record."""
        unknown = []
        for key in keys:
            record = self.records.get(key)
            if record is None:
                unknown.append(key)
            elif record.state in ACTIVE | {RELEASED}:
                record.holders["!"] = 0
            elif record.state == ERRED:
                self.failures.append((key, record.blame or key))
        self.settle()
        return unknown

    def make_durable(self, keys: Iterable[str]) -> list[str]:
        """Results are to outlive all nodes; return the keys without a record."""
        unknown = []
        for key in keys:
            if record := self.records.get(key):
                record.durable = True
                self._ask_for_durable_copy(record)
            else:
                unknown.append(key)
        self.settle()
        return unknown

    def heartbeat(self, node: str, **fields: Any) -> None:
        """A node lives; `fields` are what it tells of itself."""
        known = self.nodes.setdefault(node, Node(slots=0))
        for name, value in fields.items():
            setattr(known, name, value)

    def leave_node(self, node: str) -> None:
        """A node is gone: its copies are lost, what was in its queue goes to others."""
        for record in self.in_state(MEMORY):
            if record.data:
                self._lose_copy(record.key, record.data.token, node)
        self.nodes.pop(node, None)
        self.mail = [(to, message) for to, message in self.mail if to != node]
        for record in self.in_state(READY):
            if record.home == node:
                record.is_placed = False
        self.settle()

    # --- copies

    def gain(self, place: str, items: Iterable[tuple[str, str]], *, is_there: bool = True) -> list[str]:
        """Copies, as key and token, were made at `place`; return the keys of those that must be dropped."""
        refused = []
        for key, token in items:
            record = self.records.get(key)
            if record and self._names(record, token) and self._is_place(place) and is_there:
                record.places.add(place)
                self._ask_for_durable_copy(record)
            else:
                refused.append(key)
        self.settle()
        return refused

    def lose(self, place: str, items: Iterable[tuple[str, str]]) -> None:
        """Copies, as key and token, are not at `place` any more."""
        for key, token in items:
            self._lose_copy(key, token, place)
        self.settle()

    def shed(self, place: str, items: Iterable[tuple[str, str]]) -> list[str]:
        """Drop copies, as key and token, where enough are left; return the keys of those dropped."""
        dropped = []
        for key, token in items:
            record = self.records.get(key)
            if record is None or not self._has_copy(record, token, place) or place in record.copies_on:
                continue
            left = record.places - {place}
            if record.durable and place in OUTLIVE_NODES and not left & OUTLIVE_NODES:
                continue
            enough = len(left - OUTLIVE_NODES) >= record.copies
            if left and (record.copies == 1 or place in OUTLIVE_NODES or enough):
                record.places = left
                self._mail_drop(place, token)
                dropped.append(key)
        return dropped

    def want_copies(self, keys: Iterable[str], n: int, nodes: Sequence[str] = ()) -> list[str]:
        """Want copies on `n` nodes and on each of `nodes` while the key is wanted; return unknown keys."""
        unknown = []
        for key in keys:
            if record := self.records.get(key):
                record.copies, record.copies_on = n, tuple(nodes)
            else:
                unknown.append(key)
        self.settle()
        return unknown

    def refuse(self, constraint: str, error: bytes) -> None:
        """Err the ready tasks that no live node may run under `constraint`."""
        if constraint in self.unrunnable():
            for entry in self.queue(constraint=constraint):
                self._err(self.records[entry.key], entry.key, error)
        self.settle()

    # --- the rules ------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Apply the local rule to every record until it changes none."""
        while sum(self._settle_one(key) for key in list(self.records)):
            pass
        for record in self.in_state(READY):
            if not record.is_placed:
                self._place(record)

    def _settle_one(self, key: str) -> bool:
        """Apply the local rule to `key` once; tell whether it changed anything."""
        if key not in self.records:  # forgotten meanwhile
            return False
        record = self.records[key]
        if record.function is not None and self._is_durable(record):  # nobody needs its lineage any more
            record.function, record.payload, record.deps, record.given = None, b"", (), {}
            record.constraint, record.prefer, record.rank, record.priority = "", (), "", 0
            return True
        return self._settle_wanted(record) if self.wanted(key) else self._settle_unwanted(record)

    def _settle_unwanted(self, record: Record) -> bool:
        record.copies, record.copies_on = 1, ()
        if record.state in ACTIVE:
            self._become(record, RELEASED)
        elif record.function is None and self._is_durable(record) and self.dependents(record.key):
            for place in record.places - OUTLIVE_NODES:  # what depends on it has no other lineage
                self._mail_drop(place, record.data.token if record.data else "")
            changed = bool(record.places - OUTLIVE_NODES)
            record.places &= OUTLIVE_NODES
            return changed
        elif record.state == MEMORY:
            self._become(record, RELEASED if record.function is not None else LOST)
        elif not self.dependents(record.key):
            del self.records[record.key]
        else:
            return False  # it stays as lineage
        return True

    def _settle_wanted(self, record: Record) -> bool:
        broken = [d for d in record.deps if self.records[d].state in BROKEN]
        if record.state == RELEASED:
            self._become(record, WAITING)
        elif record.state == WAITING and broken:
            self._err(record, self._blame_of(broken[-1]))
        elif record.state == WAITING and self.waiting(record.key) == 0:
            self._become(record, READY)
        else:
            return False
        return True

    def _become(self, record: Record, state: str) -> None:
        """Change the state; what belonged to the old one is gone, and a running attempt is void with it."""
        assert state in TRANSITIONS[record.state], f"{record.key}: {record.state} -> {state}"
        for inner in self._inside(record):
            inner.holders.pop(f"@{record.key}", None)
        for place in record.places:
            self._mail_drop(place, record.data.token if record.data else "")
        record.state = state
        record.owner, record.data, record.error, record.blame = None, None, None, None
        record.maker, record.places = "", set()
        record.home, record.letter, record.homes, record.is_placed = "", "", set(), False

    def _create(self, task: Task, generation: int, new: set[str]) -> Record:
        rank = f"{generation:010x}{task.order:06x}"
        given = self._give(task.deps, new)
        deps = tuple(key for place, key in enumerate(task.deps, 1) if place not in given)
        record = Record(
            task.key, RELEASED, task.function, task.payload, deps, task.priority, rank, task.retries
        )
        record.given = given
        record.constraint, record.prefer = task.constraint, task.prefer
        self.records[task.key] = record
        return record

    def _give(self, keys: Sequence[str], new: set[str]) -> dict[int, tuple[str, bytes]]:
        """Inputs that become part of a task: those that are there, small, hold nothing, and are not `new`."""
        given: dict[int, tuple[str, bytes]] = {}
        room = MOST_GIVEN
        for place, key in enumerate(keys, 1):
            data = self.records[key].data
            if key in new or data is None or data.value is None or data.contains:
                continue
            if len(data.value) <= min(LARGEST_GIVEN, room):
                given[place] = key, data.value
                room -= len(data.value)
        return given

    def _remember(self, record: Record, data: Data, maker: str = "") -> None:
        self._become(record, MEMORY)
        record.data = data
        if data.value is None:
            record.maker, record.places = maker, {data.place}
        for inner in self._inside(record):
            inner.holders[f"@{record.key}"] = 0
        self._ask_for_durable_copy(record)
        self._tell(record, self._code(record))
        record.holders.pop("!", None)

    def _err(self, record: Record, blame: str, error: bytes | None = None) -> None:
        self._become(record, ERRED)
        record.blame, record.error = blame, error
        self._tell(record, self._code(record))
        if record.holders.pop("!", None) is not None:
            self.failures.append((record.key, blame))

    def _reset(self, keys: Iterable[str]) -> list[str]:
        """Release the erred among `keys`, erred dependencies above them and all erred below any of these."""
        above = self._closure(keys, lambda key: self.records[key].deps)
        found = self._closure(above, self._erred_dependents)
        for key in found:
            self._become(self.records[key], RELEASED)
            self._tell(self.records[key], "p")
        return found

    def _is_place(self, place: str) -> bool:
        return place in OUTLIVE_NODES or place in self.nodes

    def _is_durable(self, record: Record) -> bool:
        """Tell whether a result that was to outlive all nodes does."""
        if not record.durable or record.data is None:
            return False
        return record.data.value is not None or bool(record.places & OUTLIVE_NODES)

    def _ask_for_durable_copy(self, record: Record) -> None:
        if record.durable and record.data is not None and not self._is_durable(record):
            self.mail.append((min(record.places), f"k {record.data.token} {record.key}"))

    def _names(self, record: Record, token: str) -> bool:
        """Tell whether this version is the one of which there are copies."""
        return record.data is not None and record.data.value is None and record.data.token == token

    def _has_copy(self, record: Record, token: str, place: str) -> bool:
        return self._names(record, token) and place in record.places

    def _mail_stop(self, record: Record) -> None:
        """Its agent looks when the attempt is void, and stops it."""
        node = (record.owner or "").rpartition("|")[0]
        if record.state == PROCESSING and node in self.nodes:
            self.mail.append((node, f"x {record.owner} {record.attempt} {record.key}"))

    def _mail_drop(self, place: str, token: str) -> None:
        if place == DURABLE:
            self.debris.append(token)
        elif place != REDIS:
            self.mail.append((place, f"d {token}"))

    def _lose_copy(self, key: str, token: str, place: str) -> None:
        """A copy is gone; with the last one so is the result, and what was ready to read it waits again."""
        record = self.records.get(key)
        if record is None or not self._has_copy(record, token, place):
            return
        record.places.discard(place)
        if place != DURABLE or not record.places:  # else it is written again under that name
            self._mail_drop(place, token)
        if record.places:
            self._ask_for_durable_copy(record)
        else:
            self._become(record, RELEASED if record.function is not None else LOST)
            self._tell(record, "p" if record.function is not None else "l")
            for name in self.dependents(key):
                if self.records[name].state == READY:
                    self._become(self.records[name], WAITING)

    def _place(self, record: Record) -> None:
        """Choose the queue of a ready task."""
        record.is_placed = True
        record.home, record.letter, record.homes = "", "", set()
        if record.constraint:
            return
        bytes_at: dict[str, int] = {}
        for dep in (self.records[d] for d in record.deps):
            for place in dep.places:
                if place in self.nodes and self.nodes[place].takes and dep.data:
                    bytes_at[place] = bytes_at.get(place, 0) + dep.data.nbytes
        preferred = [n for n in record.prefer if n in self.nodes and self.nodes[n].takes]
        record.homes = best_homes(bytes_at, preferred)
        if record.homes:
            choice = self.choices.get(record.key)
            record.home = choice if choice in record.homes else min(record.homes)
            record.letter = size_class(bytes_at.get(record.home, 0))

    def _choose(self, slot: str, want: int, fresh: set[str]) -> list[str]:
        """The next tasks for a slot, by priority, from the queues that it shares: its node's comes first.

        Args:
            fresh: keys that became ready by its own report: in its node's queue they come before others.
        """
        node = self.slots[slot]
        here = sum(n == node for n in self.slots.values())
        own = self.queue(home=node)
        found = [(e.score, 0, e.text, e.key) for e in own if e.key in fresh]
        found += [
            (e.score, 1, e.text, e.key) for e in own[: fair_share(len(own), here)] if e.key not in fresh
        ]
        free = self.free_resources(node)
        for constraint in {r.constraint for r in self.in_state(READY)} - {""}:
            needs = needs_of(constraint)
            if may_run_on(constraint, node) and fits(needs, free):
                queue = self.queue(constraint=constraint)
                share = 1 if needs else fair_share(len(queue), len(self.slots))
                found += [(e.score, 1, e.text, e.key) for e in queue[:share]]
        shared = self.queue()
        found += [(e.score, 2, e.text, e.key) for e in shared[: fair_share(len(shared), len(self.slots))]]
        chosen: list[str] = []
        uses_resources = False
        for _, _, _, key in sorted(found):
            needs = needs_of(self.records[key].constraint)
            if len(chosen) < want and not (needs and uses_resources):
                uses_resources = uses_resources or bool(needs)
                chosen.append(key)
        return chosen

    def _steal(self, slot: str, idle: set[str]) -> list[str]:
        """The task of another node's queue that is cheapest to move, if to wait there costs more."""
        thief = self.slots[slot]
        homes = {r.home for r in self.in_state(READY)} - {"", thief}
        for home in sorted(homes, key=lambda h: (-len(self.queue(home=h)), h)):
            queue = self.queue(home=home)
            entry = cheapest(queue)
            idles = any(self.slots.get(s) == home for s in idle)
            if entry and wait_ms(self.nodes.get(home), len(queue), has_idle_slots=idles) > move_ms(
                entry.letter
            ):
                return [entry.key]
        return []

    def _complete(self, record: Record, data: Data | None, slot: str, stale: list[str]) -> None:
        """Take the result of the current attempt; without it, or its node, the task runs again."""
        if data is not None and (data.value is not None or self._is_place(data.place)):
            self._remember(record, data, slot)
            return
        self._become(record, WAITING)
        if data is not None:
            stale.append(record.key)  # the slot is to drop the copy

    def _fail(self, record: Record, failed: Failed) -> None:
        if failed.retryable and record.retries > 0:
            record.retries -= 1
            self._become(record, WAITING)
        else:
            self._err(record, record.key, failed.error)

    def _take(self, slot: str, want: int, mode: str, fresh: set[str], idle: set[str]) -> list[Claim]:
        """What a step gives its slot; see `step` and `_choose`."""
        owned = [r for r in self.in_state(PROCESSING) if r.owner == slot] if "r" in mode and want > 0 else []
        claimed = [Claim(r.key, r.attempt) for r in owned]
        if not {"q", "p"} & set(mode) and (n := want - len(owned)) > 0:
            chosen = self._choose(slot, n, fresh) or ([] if owned else self._steal(slot, idle))
            claimed += [self._claim(slot, key) for key in chosen]
        return claimed

    def _claim(self, slot: str, key: str) -> Claim:
        record = self.records[key]
        self._become(record, PROCESSING)
        self.last_attempt += 1
        record.attempt, record.owner = self.last_attempt, slot
        return Claim(key, record.attempt)

    def _closure(self, keys: Iterable[str], neighbours: Callable[[str], Iterable[str]]) -> list[str]:
        """The erred records among `keys`, and all erred ones that `neighbours` leads to from them."""
        found: dict[str, None] = {}
        queue = list(keys)
        while queue:
            key = queue.pop(0)
            if key in self.records and self.records[key].state == ERRED and key not in found:
                found[key] = None
                queue += neighbours(key)
        return list(found)

    def _current(self, key: str, attempt: int, stale: list[str]) -> Record | None:
        """The record of `key` if it is processing under `attempt`.

        Else the report comes too late and its key goes to `stale`; but not if the result of `attempt` is
        there: then the report was heard before.
        """
        record = self.records.get(key)
        found = (record.state, record.attempt) if record else None
        if found == (PROCESSING, attempt):
            return record
        if found != (MEMORY, attempt):
            stale.append(key)
        return None

    def _inside(self, record: Record) -> list[Record]:
        """Records of the futures inside the data of `record`."""
        return [self.records[k] for k in (record.data.contains if record.data else ()) if k in self.records]

    def _erred_dependents(self, key: str) -> list[str]:
        return [k for k in self.dependents(key) if self.records[k].state == ERRED]

    def _blame_of(self, key: str) -> str:
        return self.records[key].blame or key

    def _code(self, record: Record) -> str:
        if record.data is not None:
            return "M" if record.data.value is None else "m"
        if (
            record.state == ERRED
            and record.blame is not None
            and self.records[record.blame].error is not None
        ):
            return "e"
        return "l"

    def _tell(self, record: Record, code: str) -> None:
        for client, epoch in record.holders.items():
            if is_client(client):
                self.notices.append(Notice(client, record.key, epoch, code))

    def _tell_state(self, client: str, holds: Iterable[tuple[str, int]]) -> None:
        """Tell a client that took holds, as key and epoch, what it would never hear otherwise."""
        for key, epoch in holds:
            if self.records[key].state in {MEMORY, ERRED, LOST}:
                self.notices.append(Notice(client, key, epoch, self._code(self.records[key])))

    # --- what tests look at ---------------------------------------------------------------------------------

    def take_notices(self) -> list[Notice]:
        """Return the notices since the last call."""
        taken, self.notices = self.notices, []
        return taken

    def take_mail(self) -> list[tuple[str, str]]:
        """Return node and message of the mail since the last call."""
        taken, self.mail = self.mail, []
        return taken

    def snapshot(self) -> dict[str, Any]:
        """The whole state as plain dicts and lists, derived fields and indexes included."""
        records = {
            key: {
                "state": r.state,
                "function": r.function,
                "payload": r.payload,
                "deps": list(r.deps),
                "given": r.given,
                "priority": r.priority,
                "rank": r.rank,
                "retries": r.retries,
                "deaths": r.deaths,
                "waiting": self.waiting(key) if r.state == WAITING else 0,
                "needed": self.needed(key),
                "attempt": r.attempt,
                "owner": r.owner,
                "nbytes": r.data.nbytes if r.data else None,
                "type": r.data.type if r.data else None,
                "value": r.data.value if r.data else None,
                "token": r.data.token if r.data and r.data.value is None else "",
                "maker": r.maker,
                "places": sorted(r.places),
                "copies": r.copies,
                "copies_on": list(r.copies_on),
                "constraint": r.constraint,
                "prefer": list(r.prefer),
                "home": r.home,
                "contains": list(r.data.contains) if r.data else [],
                "error": r.error,
                "blame": r.blame,
                "durable": r.durable,
            }
            for key, r in sorted(self.records.items())
        }
        clients: dict[str, list[str]] = {}
        owned: dict[str, dict[str, int]] = {}
        functions: dict[str, int] = {}
        constraints: dict[str, int] = {}
        node_keys: dict[str, list[str]] = {}
        for key, r in sorted(self.records.items()):
            for client in r.holders:
                if not client.startswith("@"):
                    clients.setdefault(client, []).append(key)
            if r.owner is not None:
                owned.setdefault(r.owner, {})[key] = r.attempt
            if r.function is not None:
                functions[r.function] = functions.get(r.function, 0) + 1
            if r.constraint:
                constraints[r.constraint] = constraints.get(r.constraint, 0) + 1
            for node in r.places - OUTLIVE_NODES:
                node_keys.setdefault(node, []).append(key)
        return {
            "records": records,
            "holders": {key: dict(r.holders) for key, r in sorted(self.records.items()) if r.holders},
            "dependents": {key: sorted(d) for key in sorted(self.records) if (d := self.dependents(key))},
            "ready": [entry.key for entry in self.queue()],
            "homes": {
                home: [entry.text for entry in self.queue(home=home)]
                for home in {r.home for r in self.in_state(READY)} - {""}
            },
            "picky": {
                constraint: [entry.key for entry in self.queue(constraint=constraint)]
                for constraint in {r.constraint for r in self.in_state(READY)} - {""}
            },
            "clients": clients,
            "owned": owned,
            "functions": functions,
            "constraints": constraints,
            "node_keys": node_keys,
            "copies": [key for key, r in sorted(self.records.items()) if r.copies > 1 or r.copies_on],
            "undurable": [
                key
                for key, r in sorted(self.records.items())
                if r.durable and r.state == MEMORY and not self._is_durable(r)
            ],
            "names": dict(self.names),
            "datasets": dict(self.datasets),
            "last_attempt": self.last_attempt,
        }

    def check(self) -> None:
        """Assert what holds between operations; the numbers are those of the design's rules of state."""
        attempts = [r.attempt for r in self.in_state(PROCESSING)]
        assert len(set(attempts)) == len(attempts), "rule 4: an attempt number was given twice"
        assert self.snapshot()["clients"] or not self.records, "rule 7: records, and no client holds any"
        for key, r in self.records.items():
            assert all(d in self.records for d in r.deps), f"rule 2: {key} depends on a forgotten record"
            assert r.holders or self.dependents(key), f"rule 2: nobody knows {key}"
            states = {self.records[d].state for d in r.deps}
            if self.wanted(key):
                assert r.state != RELEASED, f"rule 3: {key} is wanted and nobody makes it"
            elif not (r.function is None and self._is_durable(r) and self.dependents(key)):
                assert r.state not in ACTIVE | {MEMORY}, f"rule 1: {key} is {r.state} and nobody wants it"
            if r.state == WAITING:
                assert self.waiting(key) > 0, f"rule 6: {key} waits for nothing"
                assert states <= ACTIVE | {MEMORY}, f"rule 3: {key} waits for what nobody makes"
            if r.state == READY:  # while it runs, the slot finds out
                assert states <= {MEMORY}, f"rule 6: {key} is ready without its dependencies"
                assert not r.home or r.home in self.nodes, f"{key} is in the queue of {r.home}, which is gone"
            assert (r.owner is not None) == (r.state == PROCESSING), f"rule 6: owner of {key}"
            assert (r.data is not None) == (r.state == MEMORY), f"data of {key}, which is {r.state}"
            assert r.function is None or not self._is_durable(r), f"{key} is durable and keeps its lineage"
            assert "!" not in r.holders or r.state in ACTIVE, f"{key} is {r.state} and runs for nobody"
            assert r.places <= {*OUTLIVE_NODES, *self.nodes}, (
                f"rule 7: {key} has a copy on a node that is gone"
            )
            assert bool(r.places) == (r.data is not None and r.data.value is None), f"copies of {key}"
            assert (r.blame is not None) == (r.state == ERRED), f"blame of {key}, which is {r.state}"
            assert (r.error is not None) == (r.blame == key), f"error bytes of {key}, blamed on {r.blame}"
