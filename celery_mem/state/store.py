"""One typed method per script. Nothing else writes control keys."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from celery_mem.config import Settings
from celery_mem.errors import RedisUnavailableError
from celery_mem.state.keys import SCHEMA, Keys
from celery_mem.state.link import Command, Link
from celery_mem.state.loader import load_script

MIN_REDIS = (6, 2)


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


class NewData(NamedTuple):
    """Data that a client brings. `kind` is "v" for a value in `data`, "b" for the token of a blob."""

    key: str
    nbytes: int
    type: str
    kind: str
    data: bytes | str
    contains: Sequence[str] = ()


class Done(NamedTuple):
    """A completed attempt; fields as in `NewData`."""

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


class Input(NamedTuple):
    """A dependency of a taken task: kind "v" with its value, "b" with its blob's token, "-" if it is gone."""

    key: str
    kind: str
    data: bytes


class Taken(NamedTuple):
    """A task that a slot is to run."""

    key: str
    attempt: str
    function: str
    payload: bytes
    payload_blob: str
    inputs: list[Input]


class Step(NamedTuple):
    """What a step gave: tasks to run, keys whose report came too late, tickets to send."""

    taken: list[Taken]
    stale: list[str]
    tickets: Tickets


class Tickets(NamedTuple):
    """Tickets that the caller must send: ids, and the Celery queue (empty if the nodes named none)."""

    queue: str
    ids: list[str]


NO_TICKETS = Tickets("", [])


def _tickets(reply: Sequence[bytes]) -> Tickets:
    if not reply:
        return NO_TICKETS
    return Tickets(reply[0].decode(), [t.decode() for t in reply[1:]])


def _texts(reply: Iterable[bytes]) -> list[str]:
    return [item.decode() for item in reply]


class Store:
    """The task graph of one namespace.

    Args:
        link: the connection that all calls share.
        settings: limits and leases that the scripts are told.
        generation: birth id of the namespace this process joined.
        now_ms: a clock for tests; None asks Redis.
    """

    def __init__(self, link: Link, settings: Settings, generation: str, *, now_ms: int | None = None) -> None:
        self.link = link
        self.settings = settings
        self.keys = Keys(settings.namespace)
        self.generation = generation
        self.now_ms = now_ms
        self._meta = self.keys.fixed("meta")

    @classmethod
    def connect(cls, settings: Settings, link: Link | None = None) -> Store:
        """Join the namespace of `settings`, or begin it.

        Raises:
            RedisUnavailableError: nobody answers, the password is wrong, or Redis is older than 6.2.
            SchemaError: another version of this package made the namespace.
        """
        link = link or Link.connect(settings)
        _check_version(link)
        meta = Keys(settings.namespace).fixed("meta")
        generation = link.run(load_script("open"), 1, meta, secrets.token_hex(8), SCHEMA)
        return cls(link, settings, generation.decode())

    def twin(self) -> Store:
        """Return a store with a connection of its own."""
        return Store(self.link.twin(), self.settings, self.generation, now_ms=self.now_ms)

    def _run(self, name: str, *args: Any, **options: Any) -> Any:
        now = "" if self.now_ms is None else self.now_ms
        return self.link.run(load_script(name), 1, self._meta, self.generation, now, *args, **options)

    def _graph(self, name: str, *args: Any, **options: Any) -> Any:
        budget, lease = self.settings.sweep_budget, _ms(self.settings.ticket_lease)
        return self._run(name, budget, lease, *args, **options)

    # --- clients ---

    def renew_client(self, client: str, *, join: bool = False) -> None:
        """Give `client` its lease, or renew it. Raises UnknownClientError if it had run out."""
        self._run("renew_client", client, _ms(self.settings.client_lease), int(join))

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
        pairs = list(functions)
        args: list[Any] = [
            client,
            "" if generation is None else generation,
            self.settings.notice_limit,
            len(pairs),
        ]
        for pair in pairs:
            args += pair
        for key, function, payload, blob, deps, priority, order, retries, hold, own_epoch in tasks:
            held = (own_epoch or epoch) if hold else ""
            args += (key, function, payload, blob, priority, order, retries, held, len(deps))
            args += deps
        rank, tickets = self._graph("submit", *args, before=before)
        return rank, _tickets(tickets)

    def put(
        self, client: str, epoch: int, data: Iterable[NewData], *, before: Sequence[Command] = ()
    ) -> Tickets:
        """Put data that the client brings into the graph and hold it."""
        args: list[Any] = [client, epoch, self.settings.notice_limit]
        for d in data:
            args += (d.key, d.nbytes, d.type, d.kind, d.data, "\n".join(d.contains))
        return _tickets(self._graph("put", *args, before=before))

    def hold(self, client: str, epoch: int, keys: Iterable[str]) -> tuple[list[str], Tickets]:
        """Hold keys that exist; returns those that do not."""
        unknown, tickets = self._graph("hold", client, epoch, self.settings.notice_limit, *keys)
        return _texts(unknown), _tickets(tickets)

    def release(self, client: str, keys: Iterable[str]) -> Tickets:
        """Drop holds; what nobody wants any more is freed in the same call."""
        return _tickets(self._graph("release", client, *keys))

    def cancel(
        self, client: str, keys: Iterable[str], *, force: bool = False, reason: str = ""
    ) -> tuple[list[str], Tickets]:
        """Drop holds on keys and on what depends on them; returns the keys that the client held."""
        dropped, tickets = self._graph("cancel", client, int(force), reason, *keys)
        return _texts(dropped), _tickets(tickets)

    def retry(self, keys: Iterable[str]) -> Tickets:
        """Run erred tasks again."""
        return _tickets(self._graph("retry", *keys))

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
        before: Sequence[Command] = (),
    ) -> Step:
        """Report what was done and take what is next, in one round trip; see scripts/step.lua."""
        s = self.settings
        args: list[Any] = [slot, node, _ms(s.node_lease), ticket, mode, want, s.notice_limit]
        args += (len(done), len(failed), len(back))
        for key, attempt, nbytes, type_name, kind, data, contains in done:
            args += (key, attempt, nbytes, type_name, kind, data, "\n".join(contains) if contains else "")
        for f in failed:
            args += (f.key, f.attempt, f.error, int(f.may_retry))
        for pair in back:
            args += pair
        taken, stale, tickets = self._graph("step", *args, before=before, repeat=_repeat_step)
        return Step([_taken(t) for t in taken], _texts(stale), _tickets(tickets))

    def heartbeat(self, node: str, *, queue: str = "", **news: Any) -> list[str]:
        """Renew a node's lease; `news` are fields of the node hash. Returns its slots that run a ticket."""
        fields = [x for pair in news.items() for x in pair]
        return _texts(self._run("heartbeat", node, _ms(self.settings.node_lease), queue, *fields))

    def leave_node(self, node: str, *, fence: str = "") -> list[str]:
        """Take a node off the list; returns slots that must be abandoned first, then call again."""
        return _texts(self._run("leave_node", node, fence))

    def abandon_slot(self, slot: str, node: str, error: bytes) -> tuple[list[str], list[str], Tickets]:
        """Give up a slot that is gone; returns what it was running and what erred for it."""
        allowed = self.settings.allowed_failures
        keys, killed, tickets = self._graph("abandon_slot", slot, node, allowed, error)
        return _texts(keys), _texts(killed), _tickets(tickets)

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


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _repeat_step(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a step whose reply was lost: it asks again for what that gave."""
    mode = 10  # 4 that every script gets with KEYS, 2 of every script that changes the graph, then the step's
    return (*args[:mode], args[mode] + "r", *args[mode + 1 :])


def _taken(reply: Sequence[Any]) -> Taken:
    key, attempt, function, payload, blob, flat = reply
    inputs = (
        [Input(flat[i].decode(), flat[i + 1].decode(), flat[i + 2]) for i in range(0, len(flat), 3)]
        if flat
        else []
    )
    return Taken(key.decode(), attempt.decode(), function.decode(), payload, blob.decode(), inputs)


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
