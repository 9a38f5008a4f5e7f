"""One typed method per script. Nothing else writes control keys."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from celery_mem.config import Settings
from celery_mem.errors import NamespaceResetError, RedisUnavailableError, RestartingError
from celery_mem.state.clearing import clear
from celery_mem.state.keys import META, SCHEMA, TASK, Keys
from celery_mem.state.link import Command, Link, Repeat
from celery_mem.state.loader import load_script
from celery_mem.state.records import read_result, state_of

MIN_REDIS = (6, 2)
PAGE = 1000
"""Keys that one read asks for."""
LOOK_S = 0.02
HELP_AFTER_S = 0.5
"""Whoever meets a restart that takes longer helps: who began it may be dead."""


WATCH_S = 30.0
"""How long nodes and slots go on for a watcher that died."""

REDIS = "@redis"
"""The place of a copy that is a blob in Redis."""
DURABLE = "@durable"
"""The place of a copy that is a file under `mem_durable_url`; every other place is the name of a node."""
OUTLIVE_NODES = frozenset({REDIS, DURABLE})


class NewTask(NamedTuple):
    """A task as it is submitted.

    Attributes:
        key: key text.
        function: hash of the stored function.
        payload: pickled arguments, or empty where `payload_blob` says where they are.
        payload_blob: token of a blob written beforehand.
        deps: key texts, each once.
        priority: user priority, higher runs first.
        order: place within the submission, 0 to 2**24 - 1.
        retries: how often a failure is tried again.
        hold: whether the submitting client holds it.
        epoch: the client's number for that hold, where calls with numbers of their own are sent together; 0
            takes the number of the submission.
        constraint: which nodes may run it, as canonical JSON (graph/constraints.py); empty for any.
        prefer: nodes that should run it, one a line; others may once these are busy.
    """

    key: str
    function: str
    payload: bytes
    payload_blob: str = ""
    deps: Sequence[str] = ()
    priority: float = 0
    order: int = 0
    retries: int = 0
    hold: bool = True
    epoch: int = 0
    constraint: str = ""
    prefer: str = ""


class NewData(NamedTuple):
    """Data that a client brings.

    Attributes:
        key: key text.
        nbytes: size of the result.
        type: name of its type.
        kind: "v" for a value in `data`; "b" for a blob in Redis, "n" for a copy in the memory of a node:
            then `data` is the token that names this version of the bytes, file-safe text never given twice.
        data: see `kind`.
        contains: keys of the futures inside.
        place: the node that has the copy of kind "n".
    """

    key: str
    nbytes: int
    type: str
    kind: str
    data: bytes | str
    contains: Sequence[str] = ()
    place: str = ""


class Done(NamedTuple):
    """A completed attempt, as in `NewData`; a copy of kind "n" is on the node of the slot."""

    key: str
    attempt: str
    nbytes: int
    type: str
    kind: str
    data: bytes | str
    contains: Sequence[str] = ()


class Failed(NamedTuple):
    """A failed attempt with its pickled error."""

    key: str
    attempt: str
    error: bytes
    may_retry: bool = True


class Missing(NamedTuple):
    """An attempt that could not begin, as inputs were not where Redis says.

    Attributes:
        key: the task, which waits for its inputs again; the attempt is void, retries are left as they were.
        attempt: its attempt.
        lost: dependency, token and place of every copy that was not there; each counts as `Store.lose`.
    """

    key: str
    attempt: str
    lost: Sequence[tuple[str, str, str]]


class Input(NamedTuple):
    """A dependency of a taken task.

    Attributes:
        key: key text.
        kind: "v" for a value; "r" for copies elsewhere; "-" if it is gone.
        data: the value; or of copies the lines token, slot that made it (empty if a client brought it),
            nbytes, place, place...
    """

    key: str
    kind: str
    data: bytes


class Taken(NamedTuple):
    """A task that a slot is to run; `function` is empty where its record is unreadable."""

    key: str
    attempt: str
    function: str
    payload: bytes
    payload_blob: str
    inputs: list[Input]


class Step(NamedTuple):
    """What a step gave.

    Attributes:
        taken: tasks to run.
        stale: keys whose report came too late, or whose copy is not wanted: drop what was kept of them.
        tickets: to be sent.
        ticket_age_ms: since the ticket that the step took up was reserved; -1 if it was given up before,
            None without one.
        recordings: ids of those that are to know of what was taken; see `Store.watch`.
    """

    taken: list[Taken]
    stale: list[str]
    tickets: Tickets
    ticket_age_ms: int | None = None
    recordings: tuple[str, ...] = ()


class Ticket(NamedTuple):
    """A ticket that the caller must send: the Celery queue (empty if the nodes named none), and its id."""

    queue: str
    id: str


Tickets = list[Ticket]


class Leave(NamedTuple):
    """How far a node is gone.

    Attributes:
        slots: slots that still run a ticket and must be abandoned first; nothing else was done.
        left: replicas and queued tasks that are still its own; call again.
        tickets: to be sent.
    """

    slots: list[str]
    left: int
    tickets: Tickets

    @property
    def is_over(self) -> bool:
        """Whether the node is gone."""
        return not self.slots and not self.left


class Location(NamedTuple):
    """Where the copies of a key are.

    Attributes:
        key: key text.
        state: its state; unless it is "memory" there are no copies.
        nbytes: size of the result.
        token: names the version of its bytes; empty for a value inside its record.
        owner: slot that made it; empty if a client brought it.
        places: nodes that have a copy, and `REDIS`.
        copies: wanted number of nodes with a copy.
        copies_on: nodes of which each is to have a copy.
    """

    key: str
    state: str
    nbytes: int = 0
    token: str = ""
    owner: str = ""
    places: tuple[str, ...] = ()
    copies: int = 1
    copies_on: tuple[str, ...] = ()


def _tickets(reply: Sequence[bytes]) -> Tickets:
    return [Ticket(reply[i].decode(), reply[i + 1].decode()) for i in range(0, len(reply), 2)]


def _texts(reply: Iterable[bytes]) -> list[str]:
    return [item.decode() for item in reply]


class Store:
    """The task graph of one namespace.

    Args:
        link: the connection that all calls share.
        settings: limits and leases that the scripts are told.
        generation: birth id of the namespace this process joined.
        now_ms: a clock for tests; None asks Redis.

    Attributes:
        adopts: where another server took over, go on by oneself; else raise NamespaceResetError, for a caller
            that has to see first what became of its own.
        n_rejoined: how often that happened; what this process knows of the namespace may be ahead of it.
    """

    def __init__(self, link: Link, settings: Settings, generation: str, *, now_ms: int | None = None) -> None:
        self.link = link
        self.settings = settings
        self.keys = Keys(settings.namespace)
        self.generation = generation
        self.now_ms = now_ms
        self.adopts = True
        self.n_rejoined = 0
        self._meta = self.keys.fixed("meta")

    @classmethod
    def connect(cls, settings: Settings, link: Link | None = None) -> Store:
        """Join the namespace of `settings`, or begin it.

        Raises:
            RedisUnavailableError: nobody answers, the password is wrong, or Redis is older than 6.2.
            SchemaError: another version of this package made the namespace.
        """
        link = link or Link.connect(settings)
        meta = Keys(settings.namespace).fixed("meta")
        link.meta = link.meta or meta
        _check_version(link)
        return cls(link, settings, _open(link, meta))

    def twin(self) -> Store:
        """Return a store with a connection of its own."""
        return Store(self.link.twin(), self.settings, self.generation, now_ms=self.now_ms)

    def rejoin(self) -> bool:
        """Join the namespace as it is now, or begin it.

        Returns:
            whether it is the one that was joined before, if perhaps without its last writes.
        """
        before, self.generation = self.generation, _open(self.link, self._meta)
        self.n_rejoined += 1
        return birth_of(before) == birth_of(self.generation)

    def follow(self) -> bool:
        """Take over the generation if another server took over; returns whether the namespace is the same."""
        found = self.link.call("HGET", self._meta, META["generation"])
        return found == self.generation.encode() or self._adopt()

    def check_generation(self) -> bool:
        """Return whether somebody looks at the memory of nodes; see `watch`. A plain read.

        Raises:
            NamespaceResetError: the namespace is not the one that was joined.
        """
        found, is_watched = self.link.batch(
            [("HGET", self._meta, META["generation"]), ("EXISTS", self.keys.fixed("watchers"))]
        )
        if found is None or birth_of(found.decode()) != birth_of(self.generation):
            raise NamespaceResetError("check", "the namespace is not the one joined")
        return bool(is_watched)

    def restart(self, reason: str) -> None:
        """Give up all that the namespace holds, and join its next life.

        Raises:
            NamespaceResetError: somebody else did so before.
        """
        born = secrets.token_hex(8)
        try:
            self._run("restart", born, reason)
        except NamespaceResetError:
            found = self.link.call("HGET", self._meta, META["generation"]) or b""
            if found.lstrip(b"~") != born.encode():  # else this one's reply was lost
                raise
        clear(self.link, self._meta, f"~{born}")
        self.rejoin()

    def why_restarted(self) -> str:
        """Return why the namespace was restarted, empty if its life did not begin so. A plain read."""
        found = self.link.call("HGET", self._meta, META["restarted"])
        return "" if found is None else found.decode()

    def _run(self, name: str, *args: Any, repeat: Repeat | None = None, **options: Any) -> Any:
        told = (*self._head(), *args)
        try:
            return self.link.run(load_script(name), *told, repeat=repeat, **options)
        except NamespaceResetError:
            if not (self.adopts and self._adopt()):
                raise
            if repeat is not None:
                told = repeat(told)  # what was given, or applied, may be among what is missing
            told = (*told[:2], self.generation, *told[3:])
            return self.link.run(load_script(name), *told, repeat=repeat, **options)

    def _adopt(self) -> bool:
        """Take over the generation that there is since another server took over; not after a reset."""
        found = self.link.call("HGET", self._meta, META["generation"])
        if found is None or birth_of(found.decode()) != birth_of(self.generation):
            return False
        self.generation = found.decode()
        self.n_rejoined += 1
        return True

    def _graph(self, name: str, *args: Any, **options: Any) -> Any:
        return self._run(name, *self._limits(), *args, **options)

    def _head(self) -> tuple[Any, ...]:
        return 1, self._meta, self.generation, "" if self.now_ms is None else self.now_ms

    def _limits(self) -> tuple[int, int]:
        return self.settings.sweep_budget, _ms(self.settings.ticket_lease)

    # --- clients ---

    def renew_client(self, client: str, *, join: bool = False, lease_s: float | None = None) -> None:
        """Give `client` its lease, or renew it. Raises UnknownClientError if it had run out."""
        lease = self.settings.client_lease if lease_s is None else lease_s
        self._run("renew_client", client, _ms(lease), int(join))

    def claim_name(self, client: str, name: str, lease_s: float) -> list[str]:
        """Give `client` a name and a lease; returns the clients whose holds it is to `inherit`."""
        return _texts(self._run("claim_name", client, name, _ms(lease_s)))

    def owner_of_name(self, name: str) -> str:
        """Return the client that has a name now; empty if nobody has. A plain read."""
        found = self.link.call("HGET", self.keys.fixed("names"), name)
        return "" if found is None else found.decode()

    def inherit(self, client: str, epoch: int, *, most: int = 500) -> tuple[int, Tickets]:
        """Take over holds of those that lost their names to `client`; returns how many are left."""
        left, tickets = self._graph("inherit", client, epoch, self.settings.notice_limit, most)
        return left, _tickets(tickets)

    def held_by(self, holder: str) -> list[str]:
        """Return the keys that a client, a dataset or "!" holds. Plain reads, in pages."""
        return self._members(self.keys.of("held", holder))

    def expire_client(self, client: str, *, fence: str = "", most: int = 500) -> tuple[int, Tickets]:
        """Release up to `most` holds of a client that closed or whose lease is over; returns holds left."""
        left, tickets = self._graph("expire_client", client, fence, most)
        return left, _tickets(tickets)

    def submit(
        self,
        client: str,
        epoch: int,
        tasks: Iterable[NewTask],
        functions: Iterable[tuple[str, bytes]] = (),
        *,
        generation: int | None = None,
        before: Sequence[Command] = (),
    ) -> tuple[int, Tickets]:
        """Add a chunk of tasks, at most some 500; returns the submission's rank for further chunks.

        Raises:
            UnknownDependencyError: a task depends on a key without a record; nothing was written.
            UnknownFunctionError: a hash came without code and no record uses it any more; send the code.
            UnknownClientError: the client's lease ran out.
        """
        args = self._submit_args(client, epoch, tasks, functions, generation)
        rank, tickets = self._graph("submit", *args, before=before)
        return rank, _tickets(tickets)

    def launch_submit(
        self,
        client: str,
        epoch: int,
        tasks: Iterable[NewTask],
        functions: Iterable[tuple[str, bytes]] = (),
        *,
        generation: int | None = None,
    ) -> Callable[[], tuple[int, Tickets]]:
        """Do as `submit` without waiting; what is returned waits for the reply, and returns or raises so."""
        args = self._submit_args(client, epoch, tasks, functions, generation)
        flight = self.link.launch(load_script("submit"), *self._head(), *self._limits(), *args)

        def land() -> tuple[int, Tickets]:
            try:
                rank, tickets = flight.land()
            except NamespaceResetError:  # the ordinary way follows where the namespace goes on
                return self.submit(client, epoch, tasks, functions, generation=generation)
            return rank, _tickets(tickets)

        return land

    def _submit_args(
        self,
        client: str,
        epoch: int,
        tasks: Iterable[NewTask],
        functions: Iterable[tuple[str, bytes]],
        generation: int | None,
    ) -> list[Any]:
        pairs = list(functions)
        kinds: dict[tuple[Any, ...], int] = {}
        told: list[Any] = []
        for task in tasks:
            (
                key,
                function,
                payload,
                blob,
                deps,
                priority,
                order,
                retries,
                hold,
                own_epoch,
                constraint,
                prefer,
            ) = task
            held = (own_epoch or epoch) if hold else ""
            kind = (function, priority, retries, held, constraint, prefer)
            number = kinds.setdefault(kind, len(kinds) + 1)
            told += (key, number, payload, blob, order, len(deps), *deps)
        rank = "" if generation is None else generation
        return [
            *(client, rank, self.settings.notice_limit, len(pairs), len(kinds)),
            *(part for pair in pairs for part in pair),
            *(part for kind in kinds for part in kind),
            *told,
        ]

    def put(
        self, client: str, epoch: int, data: Iterable[NewData], *, before: Sequence[Command] = ()
    ) -> Tickets:
        """Put data that the client brings into the graph and hold it."""
        args: list[Any] = [client, epoch, self.settings.notice_limit]
        for d in data:
            args += (d.key, d.nbytes, d.type, d.kind, d.data, "\n".join(d.contains), d.place)
        return _tickets(self._graph("put", *args, before=before))

    def hold(self, client: str, epoch: int, keys: Iterable[str]) -> tuple[list[str], Tickets]:
        """Hold keys that exist; returns those that do not."""
        unknown, tickets = self._graph("hold", client, epoch, self.settings.notice_limit, *keys)
        return _texts(unknown), _tickets(tickets)

    def hold_again(
        self,
        client: str,
        holds: Sequence[tuple[str, int]],
        *,
        begin: bool = False,
        lease_s: float | None = None,
    ) -> tuple[list[str], Tickets]:
        """Take holds that a client had, as key and number; returns keys without a record.

        Args:
            lease_s: the client's lease, if it has one of its own.
            begin: first give the client its lease, and drop the notices that it has not read.
        """
        flat = [x for pair in holds for x in pair]
        lease, limit = _ms(lease_s or self.settings.client_lease), self.settings.notice_limit
        unknown, tickets = self._graph("hold_again", client, lease, limit, int(begin), *flat)
        return _texts(unknown), _tickets(tickets)

    def release(self, client: str, keys: Iterable[str]) -> Tickets:
        """Drop holds; what nobody wants any more is freed in the same call."""
        return _tickets(self._graph("release", client, *keys))

    def launch_release(self, client: str, keys: Sequence[str]) -> Callable[[], Tickets | None]:
        """Do as `release` without waiting; what is returned waits for the reply, and returns the tickets.

        It returns None if Redis refused, or may not have got it. It does not repeat the call by itself: by
        then the client may hold some of the keys again.
        """
        flight = self.link.launch(load_script("release"), *self._head(), *self._limits(), client, *keys)

        def land() -> Tickets | None:
            reply = flight.wait()
            return None if reply is None or isinstance(reply, ResponseError) else _tickets(reply)

        return land

    def cancel(
        self, client: str, keys: Iterable[str], *, force: bool = False, reason: str = ""
    ) -> tuple[list[str], Tickets]:
        """Drop holds on keys and on what depends on them; returns the keys that the client held."""
        dropped, tickets = self._graph("cancel", client, int(force), reason, *keys)
        return _texts(dropped), _tickets(tickets)

    def retry(self, client: str, keys: Iterable[str]) -> tuple[list[str], Tickets]:
        """Run erred tasks again; returns those keys that lost their error and that the client holds."""
        held, tickets = self._graph("retry", client, *keys)
        return _texts(held), _tickets(tickets)

    # --- results that need no client ---

    def entrust(self, keys: Sequence[str]) -> list[str]:
        """Have tasks run to their end though nobody holds them any more; returns keys that do not exist."""
        return _texts(self._graph("entrust", *keys))

    def make_durable(self, keys: Sequence[str]) -> tuple[list[str], Tickets]:
        """Have results outlive all nodes as soon as they are there; returns keys that do not exist."""
        unknown, tickets = self._graph("make_durable", *keys)
        return _texts(unknown), _tickets(tickets)

    def undurable_keys(self) -> list[str]:
        """Return keys in memory that are to be durable and are not yet. Plain reads, in pages."""
        return self._members(self.keys.fixed("undurable"))

    def publish(self, name: str, holder: str, content: bytes, *, override: bool = False) -> str:
        """Give a dataset its name; `holder` joined as a client before and holds its keys.

        Returns the holder of the dataset that had the name, which is to be expired; empty if none had it.

        Raises:
            NameTakenError: a dataset has the name, and is not to be overridden.
            UnknownClientError: the holder's lease ran out.
        """
        found: bytes = self._run("publish", name, holder, int(override), content)
        return found.decode()

    def unpublish(self, name: str) -> str:
        """Take a dataset back; returns its holder, which is to be expired, or an empty text."""
        found: bytes = self._run("unpublish", name)
        return found.decode()

    def dataset(self, name: str) -> tuple[str, bytes] | None:
        """Return holder and content of a dataset; None if there is none. A plain read."""
        found = self.link.call("HGET", self.keys.fixed("datasets"), name)
        if found is None:
            return None
        holder, _, content = found.partition(b"\n")
        return holder.decode(), content

    def dataset_names(self) -> list[str]:
        """Return the names of all datasets. A plain read."""
        return _texts(self.link.call("HKEYS", self.keys.fixed("datasets")))

    def log_failures(
        self, fence: str = "", *, logged: int = 0, most: int = 100
    ) -> list[tuple[str, str, bytes]]:
        """Drop failures that were logged; returns the next ones: key, key to blame, pickled error."""
        found = self._run("log_failures", fence, logged, most)
        entries = (entry.split(b"\n", 2) for entry in found)
        return [(key.decode(), blame.decode(), error) for key, blame, error in entries]

    def debris(self) -> list[str]:
        """Return tokens of durable files that no record names any more. Plain reads, in pages."""
        return self._members(self.keys.fixed("debris"))

    def clear_debris(self, tokens: Sequence[str], *, fence: str = "") -> int:
        """Note that durable files are deleted; returns how many are not yet."""
        left: int = self._run("clear_debris", fence, *tokens)
        return left

    # --- slots and nodes ---

    def step(
        self,
        slot: str,
        node: str,
        *,
        ticket: str = "",
        mode: str = "",
        want: int = 1,
        done: Sequence[Done] = (),
        failed: Sequence[Failed] = (),
        back: Sequence[tuple[str, str]] = (),
        missing: Sequence[Missing] = (),
        lines: Sequence[tuple[str, bytes]] = (),
        pace_ms: float | None = None,
        counts: Mapping[str, int] | None = None,
        before: Sequence[Command] = (),
    ) -> Step:
        """Report what was done and take what is next, in one round trip; see scripts/step.lua.

        Args:
            slot: name of the slot.
            node: the node it belongs to.
            ticket: the ticket that this call takes up.
            mode: letters: i it was idle, l leave if there is nothing to take, q leave in any case and take
                nothing, r give again what it owns, p its node is paused and takes nothing new, m it keeps
                large results on its node and takes nothing while that is not alive.
            want: most tasks to take.
            done: completions.
            failed: failures.
            back: tasks handed back, as key and attempt.
            missing: attempts whose inputs were not there.
            lines: recordings, and what each is to know of what ran.
            pace_ms: how long a task takes on this node, on average; None where nothing is new.
            counts: what is added to the namespace's, by field (counts.py); lost if the reply is.
            before: plain commands to send ahead.
        """
        s = self.settings
        args: list[Any] = [slot, node, _ms(s.node_lease), ticket, mode, want, s.notice_limit]
        args += (len(done), len(failed), len(back), len(missing), "" if pace_ms is None else pace_ms)
        args.append(" ".join(f"{name} {n}" for name, n in counts.items()) if counts else "")
        args.append(len(lines))
        for key, attempt, nbytes, type_name, kind, data, contains in done:
            args += (key, attempt, nbytes, type_name, kind, data, "\n".join(contains) if contains else "")
        for f in failed:
            args += (f.key, f.attempt, f.error, int(f.may_retry))
        for pair in back:
            args += pair
        for m in missing:
            args += (m.key, m.attempt, len(m.lost))
            for copy in m.lost:
                args += copy
        for line in lines:
            args += line
        taken, stale, tickets, age, *more = self._graph("step", *args, before=before, repeat=_repeat_step)
        return Step(
            [_taken(t) for t in taken],
            _texts(stale),
            _tickets(tickets),
            None if age == b"" else int(age),
            tuple(_texts(more[0])) if more else (),
        )

    def heartbeat(self, node: str, *, queue: str = "", **news: Any) -> list[str]:
        """Renew a node's lease; `news` are fields of the node hash. Returns its slots that run a ticket."""
        fields = [x for pair in news.items() for x in pair]
        return _texts(self._run("heartbeat", node, _ms(self.settings.node_lease), queue, *fields))

    def leave_node(self, node: str, *, fence: str = "", most: int = 500) -> Leave:
        """Take a node off the list, and its replicas, at most `most` in a call; call until it is over."""
        slots, left, tickets = self._graph("leave_node", node, fence, most)
        return Leave(_texts(slots), left, _tickets(tickets))

    def abandon_slot(
        self, slot: str, node: str, death: str, errors: Mapping[str, bytes]
    ) -> tuple[list[str], list[str], Tickets]:
        """Give up a slot that is gone; returns what it was running and what erred for it.

        Args:
            death: how it ended, one line.
            errors: of its tasks those that err for it, with the pickled error; the others run again.
        """
        keys, killed, tickets = self._graph("abandon_slot", slot, node, death, *_flat(list(errors.items())))
        return _texts(keys), _texts(killed), _tickets(tickets)

    # --- copies ---

    def gain(self, place: str, items: Sequence[tuple[str, str]]) -> list[str]:
        """Record copies that were made at `place`, as key and token; returns keys whose copy must be dropped.

        Those are keys whose record does not name that token (any more), and all if `place` is no live node.
        A blob that a copy at `REDIS` names must be there.
        """
        return _texts(self._graph("gain", place, *_flat(items)))

    def lose(self, place: str, items: Sequence[tuple[str, str]]) -> Tickets:
        """Record that copies at `place`, as key and token, are not there any more.

        With the last copy the result is gone: it is made again, and so first are those of its inputs that are
        gone too; what waited or was ready for it waits again, and its holders are told that it is pending.
        What cannot be made is lost: what waits for it errs, and its holders are told so.
        """
        return _tickets(self._graph("lose", place, *_flat(items)))

    def shed(self, place: str, items: Sequence[tuple[str, str]]) -> list[str]:
        """Drop copies at `place`, as key and token, where enough others are left; returns the keys shed.

        Enough is one, or as many on nodes as `want_copies` asked for; a node that it named keeps its copy.
        A node learns by its mailbox what it is to drop.
        """
        return _texts(self._graph("shed", place, *_flat(items)))

    def want_copies(self, keys: Sequence[str], n: int, nodes: Sequence[str] = ()) -> list[str]:
        """Ask for copies on `n` nodes, and on each of `nodes`; 1 and none takes that back.

        It stays in force for as long as anybody wants the key, through losses as well. Returns unknown keys.
        """
        return _texts(self._graph("want_copies", n, "\n".join(nodes), *keys))

    def on_node(self, node: str) -> list[str]:
        """Return the keys that have a replica on `node`. Plain reads, in pages that hold up nobody."""
        return self._members(self.keys.of("node_keys", node))

    def copied_keys(self) -> list[str]:
        """Return the keys for which `want_copies` is in force. Plain reads, in pages that hold up nobody."""
        return self._members(self.keys.fixed("copies"))

    def _members(self, name: str) -> list[str]:
        found: dict[bytes, None] = {}
        cursor = b"0"
        while True:
            cursor, page = self.link.call("SSCAN", name, cursor, "COUNT", PAGE)
            found.update(dict.fromkeys(page))
            if int(cursor) == 0:
                return _texts(found)

    def locate(self, keys: Sequence[str]) -> list[Location | None]:
        """Tell where the copies of keys are; None for a key without a record. Plain reads."""
        fields = [TASK[name] for name in ("core", "result", "replicas", "copies", "copies_on")]
        found: list[Location | None] = []
        for start in range(0, len(keys), PAGE):
            page = keys[start : start + PAGE]
            rows = self.link.batch([("HMGET", self.keys.of("task", key), *fields) for key in page])
            found += [_location(key, *row) for key, row in zip(page, rows, strict=True)]
        return found

    def mail(self, node: str, *messages: str) -> bool:
        """Put messages into the mailbox of a node's agent; returns False, and does not, if it is not alive.

        `celery_mem.state.letters` writes the messages.
        """
        return bool(self._run("mail", node, *messages))

    # --- jobs ---

    def post_job(self, job: str, progress: dict[str, Any], *, fence: str = "") -> None:
        """Ask the coordinator for a job, or tell how far it is."""
        self._run("job", job, json.dumps(progress), fence)

    def end_job(self, job: str, *, fence: str = "") -> None:
        """Take a job off the list."""
        self._run("job", job, "", fence)

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Return all jobs by id, as they were last told of."""
        reply = self.link.call("HGETALL", self.keys.fixed("jobs"))
        return {reply[i].decode(): json.loads(reply[i + 1]) for i in range(0, len(reply), 2)}

    # --- nodes, as anyone may see them ---

    def node_infos(self) -> dict[str, dict[str, Any]]:
        """Return what the live nodes say of themselves, by name: the fields of `NODE`, JSON decoded.

        Numbers are numbers; a field that a node never told is missing.
        """
        names = _texts(self.link.call("ZRANGE", self.keys.fixed("nodes"), 0, -1))
        replies = self.link.batch([("HGETALL", self.keys.of("node", n)) for n in names]) if names else []
        return {name: _node_info(reply) for name, reply in zip(names, replies, strict=True)}

    def unrunnable(self) -> dict[str, tuple[int, int]]:
        """Return the constraints of ready tasks that no live node may run: number of tasks, and since when.

        That time is by the server's clock, in ms, and the moment of the first such call that found it so. The
        constraint "" stands for tasks without one, which run nowhere only while there are no nodes.
        """
        reply = self._run("unrunnable")
        return {reply[i].decode(): (reply[i + 1], int(reply[i + 2])) for i in range(0, len(reply), 3)}

    def refuse(
        self, constraint: str, error: bytes, *, fence: str = "", most: int = 500
    ) -> tuple[int, Tickets]:
        """Err up to `most` tasks under `constraint` that no live node may run; returns how many stay."""
        left, tickets = self._graph("refuse", constraint, error, fence, most)
        return left, _tickets(tickets)

    # --- those who look ---

    def watch(self, watcher: str, *, records: bool) -> bool:
        """Have nodes tell of their memory often, and slots of what they run, for `WATCH_S` from now on.

        Args:
            watcher: an id of the caller's own, never given twice.
            records: also what runs; read it with `read_lines`.

        Returns:
            whether it was so already; if not, what ran before is not known.
        """
        return bool(self._run("watch", watcher, _ms(WATCH_S), int(records)))

    def end_watch(self, watcher: str) -> None:
        """End what `watch` began; what was not read is gone."""
        self._run("watch", watcher, 0, 0)

    def read_lines(self, watcher: str, after: str, *, most: int = 500) -> tuple[list[bytes], str]:
        """Return what slots wrote for a recording, and the id to go on after; drops what was read before."""
        stream = self.keys.of("lines", watcher)
        commands: list[Command] = [("XREAD", "COUNT", most, "STREAMS", stream, after)]
        if after != "0":
            ms, _, seq = after.partition("-")
            commands.insert(0, ("XTRIM", stream, "MINID", f"{ms}-{int(seq) + 1}"))
        reply = self.link.batch(commands)[-1]
        if not reply:
            return [], after
        entries = reply[0][1]
        return [fields[1] for _, fields in entries if fields[1]], entries[-1][0].decode()

    # --- coordinator ---

    def lead(self, coordinator: str, *, resign: bool = False) -> tuple[bool, str, int]:
        """Become or stay the leader; returns whether it leads, its term, and ms left of the lease."""
        lease = 0 if resign else _ms(self.settings.leader_lease)
        leads, term, left = self._run("lead", coordinator, lease)
        return bool(leads), term.decode(), left

    def sweep(self, fence: str, *, most: int = 500) -> tuple[int, Tickets]:
        """Go on with unsettled keys; returns how many are left."""
        left, tickets = self._graph("sweep", fence, most)
        return left, _tickets(tickets)

    def call_tickets(self, fence: str = "") -> Tickets:
        """Reserve tickets for ready work that nobody is about to take."""
        return _tickets(self._run("call_tickets", fence, _ms(self.settings.ticket_lease)))

    def overdue(self, name: str) -> list[str]:
        """Return the clients or nodes (`name` of a lease set) whose lease is over by the server's clock."""
        now = self.now_ms if self.now_ms is not None else self.server_ms()
        return _texts(self.link.call("ZRANGEBYSCORE", self.keys.fixed(name), "-inf", now))

    def server_ms(self) -> int:
        """Return the server's time in ms."""
        seconds, micros = self.link.call("TIME")
        return int(seconds) * 1000 + int(micros) // 1000


def birth_of(generation: str) -> str:
    """Return the part of a generation id that stays the same when another server takes over."""
    return generation.partition(".")[0]


def _open(link: Link, meta: str) -> str:
    link.call("PING")  # the link knows whom it speaks to once it is connected
    patience = time.monotonic() + HELP_AFTER_S
    while True:
        try:
            born = secrets.token_hex(8)
            generation: bytes = link.run(load_script("open"), 1, meta, born, SCHEMA, link.run_id)
            return generation.decode()
        except RestartingError as error:
            if time.monotonic() < patience:
                time.sleep(LOOK_S)
            else:
                clear(link, meta, error.detail)


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _location(
    key: str,
    core: bytes | None,
    result: bytes | None,
    replicas: bytes | None,
    copies: bytes | None,
    copies_on: bytes | None,
) -> Location | None:
    if core is None:
        return None
    about = read_result(result)
    token, maker, _, *places = replicas.decode().split("\n") if replicas else ("", "", "")
    wanted_on = copies_on.decode().split("\n") if copies_on else ()
    return Location(
        key,
        state_of(core),
        about.nbytes if about else 0,
        token,
        maker,
        tuple(places),
        int(copies or 1),
        tuple(wanted_on),
    )


def _flat(pairs: Sequence[tuple[str, Any]]) -> list[Any]:
    return [x for pair in pairs for x in pair]


def _node_info(reply: Sequence[bytes]) -> dict[str, Any]:
    """Decode a node hash: numbers and JSON objects as such, all else as text."""
    info: dict[str, Any] = {}
    for i in range(0, len(reply), 2):
        name, text = reply[i].decode(), reply[i + 1].decode(errors="replace")
        info[name] = json.loads(text) if text[:1] in {"{", "["} else _as_number(text)
    return info


def _as_number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _repeat_step(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a step whose reply was lost: it asks again for what that gave."""
    mode = 10  # 4 that every script gets with KEYS, 2 of every script that changes the graph, then the step's
    return (*args[:mode], args[mode] + "r", *args[mode + 1 :])


def _taken(reply: Sequence[Any]) -> Taken:
    try:
        key, attempt, function, payload, blob, flat = reply
        inputs = [_input(*flat[i : i + 3]) for i in range(0, len(flat), 3)] if flat else []
        return Taken(key.decode(), attempt.decode(), function.decode(), payload, blob.decode(), inputs)
    except (ValueError, TypeError, AttributeError):
        # An altered record. The slot owns the task and those that came with it, so it is to fail by itself.
        key, attempt, *_ = reply
        return Taken(key.decode(errors="surrogateescape"), attempt.decode(), "", b"", "", [])


def _input(key: bytes, kind: bytes, data: bytes) -> Input:
    return Input(key.decode(), kind.decode(), data)


def _check_version(link: Link) -> None:
    try:
        info = link.call("INFO", "server")
    except ResponseError:
        return  # not permitted, or a stand-in without INFO: the scripts will tell
    found = {}
    for line in info.decode().splitlines():
        name, _, value = line.partition(":")
        found[name] = value
    version = found.get("redis_version", "")
    if version and tuple(int(n) for n in version.split(".")[:2]) < MIN_REDIS:
        raise RedisUnavailableError(
            f"Redis at {link.address} is version {version}; celery-mem needs 6.2 or newer"
        )


def node_news(**fields: Any) -> dict[str, str]:
    """Return fields of a node hash in the form `heartbeat` takes: texts as they are, the rest as JSON."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in fields.items()}
