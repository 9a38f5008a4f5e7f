"""One model, two machines: random events go to the model and to the scripts, which must agree after each.

A seed that fails becomes a test at the end of this file.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from celery_mem.config import Settings
from celery_mem.errors import (
    NamespaceResetError,
    NameTakenError,
    UnknownClientError,
    UnknownDependencyError,
    UnknownFunctionError,
    UnknownNodeError,
)
from celery_mem.state import store as scripts
from celery_mem.state.audit import Contents, audit, read, violations
from celery_mem.state.keys import FLAGS, META, TASK
from celery_mem.state.link import Command, Link
from celery_mem.state.loader import load_script
from celery_mem.state.model import (
    ERRED,
    LARGEST_GIVEN,
    MEMORY,
    MOST_GIVEN,
    PROCESSING,
    READY,
    RELEASED,
    Back,
    Claim,
    Data,
    Done,
    Failed,
    Missing,
    Model,
    Task,
)
from celery_mem.state.records import read_deaths, read_given, read_result
from celery_mem.state.store import DURABLE, REDIS, Store, birth_of
from tests.conftest import NOW_MS, delete_namespace, fake_link

EFFORT = int(os.environ.get("CELERY_MEM_TEST_EFFORT", "1"))  # 1 takes half a minute; more finds more
ENOUGH = 100_000  # a budget that no call here spends
CLIENTS = ("alice", "bob")
SLOTS = {"a@one|1.1": "a@one", "b@two|2.1": "b@two", "b@two|3.1": "b@two"}  # slot -> its node
NODES = {"a@one": {}, "b@two": {"GPU": 1, "TPU": 2}, "c@two": {}}  # node -> its resources
PLACES = [REDIS, DURABLE, *NODES]
CONSTRAINTS = [
    '{"workers":["a@one"]}',
    '{"resources":{"GPU":1}}',
    '{"resources":{"TPU":1},"workers":["two"]}',
]
FUNCTIONS = {"f": b"code of f", "g": b"code of g"}
TASKS = [f"k{i:02}" for i in range(10)]  # each may depend on those before it
SCATTERED = ["d0", "d1"]  # comes without a function, from clients
KEYS = SCATTERED + TASKS

_namespaces = itertools.count()


def new_store(link: Link, budget: int) -> Store:
    """A store on a fresh namespace with a clock that stands still; both clients have joined."""
    config = Settings(
        url="redis://not-used",
        namespace=f"machine{next(_namespaces)}",
        sweep_budget=budget,
        notice_limit=1000,
        allowed_failures=1,
    )
    store = Store.connect(config, link)
    store.now_ms = NOW_MS
    for client in CLIENTS:
        store.renew_client(client, join=True)
    for node in NODES:
        join(store, node)
    return store


def join(store: Store, node: str) -> None:
    news = scripts.node_news(slots="2", resources=NODES[node], status="running", pace="5")
    store.heartbeat(node, **news)


class Twins:
    """A model and a store that get the same events, and must give the same answers.

    Args:
        budget: visits after which a script leaves work for the sweep, which then goes on to the end.
    """

    def __init__(self, link: Link, budget: int = ENOUGH) -> None:
        self.store = new_store(link, budget)
        self.model = Model()
        for node, resources in NODES.items():
            self.model.heartbeat(node, slots=2, resources=resources, status="running", pace_ms=5)
        self.agree = True
        self.is_lazy = budget < ENOUGH
        self.idle: set[str] = set()  # slots that got nothing when they last asked
        self.claims: list[tuple[str, str, int]] = []  # slot, key, attempt, of all times
        self.tokens = map(str, itertools.count())

    # --- events, each for both; `times` repeats the call as a broken connection would -----------------------

    def submit(self, client: str, epoch: int, generation: int, tasks: list[Task], times: int = 1) -> None:
        new = [as_new(t) for t in tasks]
        code = [(name, FUNCTIONS[name]) for name in sorted({t.function for t in tasks if t.function})]

        def refused(call: Callable[[], object]) -> bool:
            try:
                call()
            except UnknownDependencyError:
                return True
            return False

        for _ in range(times):
            before = snapshot(self.store)
            expected = refused(lambda: self.model.submit(client, epoch, generation, tasks))
            found = refused(lambda: self.store.submit(client, epoch, new, code, generation=generation))
            assert found == expected
            if found:
                assert snapshot(self.store) == before, "a refused submission wrote"
            self.compare()

    def put(self, client: str, epoch: int, key: str, data: Data, times: int = 1) -> None:
        data, kind, value, before = self.as_stored(key, data)
        for _ in range(times):
            new = scripts.NewData(key, data.nbytes, data.type, kind, value, data.contains, data.place)
            if data.value is None and data.place not in (REDIS, *self.model.nodes):
                with pytest.raises(UnknownNodeError):
                    self.model.put(client, epoch, key, data)
                with pytest.raises(UnknownNodeError):
                    self.store.put(client, epoch, [new], before=before)
            else:
                self.model.put(client, epoch, key, data)
                self.store.put(client, epoch, [new], before=before)
            self.compare()

    def hold(self, client: str, epoch: int, keys: list[str], times: int = 1) -> None:
        for _ in range(times):
            assert self.store.hold(client, epoch, keys)[0] == self.model.hold(client, epoch, keys)
            self.compare()

    def hold_again(self, client: str, holds: list[tuple[str, int]], times: int = 1) -> None:
        for _ in range(times):
            expected = self.model.hold_again(client, holds)
            assert self.store.hold_again(client, holds, begin=True)[0] == expected
            self.compare()

    def lose_client(self, client: str) -> None:
        """A client's lease runs out; it comes back, and holds again what it held."""
        holds = [(key, r.holders[client]) for key, r in self.model.records.items() if client in r.holders]
        while self.store.expire_client(client, most=3)[0]:
            self.drain()
        self.model.expire_client(client)
        self.compare(but_notices_of=client)
        self.hold_again(client, holds)

    def release(self, client: str, keys: list[str], times: int = 1) -> None:
        for _ in range(times):
            self.store.release(client, keys)
            self.model.release(client, keys)
            self.compare()

    def cancel(self, client: str, keys: list[str], force: bool = False, times: int = 1) -> None:
        for _ in range(times):
            dropped, _tickets = self.store.cancel(client, keys, force=force, reason="why")
            assert sorted(dropped) == sorted(self.model.cancel(client, keys, force))
            self.compare()

    def retry(self, client: str, keys: list[str], times: int = 1) -> None:
        for _ in range(times):
            held, _tickets = self.store.retry(client, keys)
            assert sorted(held) == sorted(self.model.retry(client, keys))
            self.compare()

    def expire_client(self, client: str) -> None:
        while self.store.expire_client(client, most=3)[0]:
            self.drain()
        self.model.expire_client(client)
        self.compare(but_notices_of=client)
        self.store.renew_client(client, join=True)

    def step(
        self,
        slot: str,
        done: Sequence[Done] = (),
        failed: Sequence[Failed] = (),
        back: Sequence[Back] = (),
        missing: Sequence[Missing] = (),
        want: int = 0,
        mode: str = "",
        times: int = 1,
    ) -> list[str]:
        """A slot reports and takes; returns the keys taken, with mode r also those owned before.

        A completion's place that is no node's but the slot's is the slot's.
        """
        if self.is_lazy and (done or failed or back or missing):
            want = 0  # what it would take depends on what its own report left for the sweep
        done, new, before = self.as_reported(slot, done)
        taken: list[str] = []
        for call in range(times):
            if want > 0 and call > 0:
                mode += "r"  # it did not hear what it was given
            owned = {r.key for r in self.model.in_state(PROCESSING) if r.owner == slot}
            idle = self.idle_slots() - {slot}
            found = self.store.step(
                slot,
                SLOTS[slot],
                want=want,
                mode=self.mode(slot) + mode,
                done=new,
                failed=[scripts.Failed(f.key, str(f.attempt), f.error, f.retryable) for f in failed],
                back=[(b.key, str(b.attempt)) for b in back],
                missing=[scripts.Missing(m.key, str(m.attempt), m.lost) for m in missing],
                before=before,
            )
            self.model.choices = self.homes()
            expected = self.model.step(
                slot, done, failed, back, missing, want, mode, node=SLOTS[slot], idle=idle
            )
            assert found.stale == expected.stale
            taken = self.check_taken(slot, found.taken, expected.claimed, owned, mode)
            if want > 0 and not taken and slot in self.model.slots and "p" not in mode:
                self.idle.add(slot)
            self.compare()
        return taken

    def take(self, slot: str, want: int, mode: str = "") -> list[str]:
        """A step that reports nothing."""
        return self.step(slot, want=want, mode=mode)

    def as_reported(
        self, slot: str, done: Sequence[Done]
    ) -> tuple[list[Done], list[scripts.Done], list[Command]]:
        """Completions for the model and for the store, and commands that write their blobs."""
        told, new, before = [], [], []
        for d in done:
            data = d.data
            if data is not None and data.place != REDIS:
                data = data._replace(place=SLOTS[slot])
            data, kind, value, blob = self.as_stored(d.key, data)
            told.append(d._replace(data=data if d.data is not None else None))
            new.append(
                scripts.Done(d.key, str(d.attempt), data.nbytes, data.type, kind, value, data.contains)
            )
            before += blob
        return told, new, before

    def check_taken(
        self, slot: str, found: list[scripts.Taken], expected: list[Claim], owned: set[str], mode: str
    ) -> list[str]:
        """Compare what a step gave; those of `owned`, and no others, may be given again."""
        taken = {t.key: int(t.attempt) for t in found}
        assert len(taken) == len(found)
        if "r" in mode:
            assert taken.keys() == {c.key for c in expected}
        else:
            assert list(taken) == [c.key for c in expected]
        last = max([0, *(attempt for _, _, attempt in self.claims)])
        for t in found:
            record = self.model.records[t.key]
            assert (t.function, t.payload, t.payload_blob) == (record.function, record.payload, "")
            given = record.given
            for place, i in enumerate(t.inputs, 1):
                if place in given:
                    assert i == scripts.Input(given[place][0], "v", given[place][1])
                else:
                    self.check_input(i)
            assert [i.key for p, i in enumerate(t.inputs, 1) if p not in given] == list(record.deps)
            if "r" in mode and t.key in owned and taken[t.key] <= last:
                assert taken[t.key] == record.attempt
            else:
                assert taken[t.key] > last
                record.attempt = taken[t.key]  # numbers may be left out
                self.claims.append((slot, t.key, record.attempt))
        self.model.last_attempt = max([self.model.last_attempt, *taken.values()])
        return list(taken)

    def homes(self) -> dict[str, str]:
        """The home that each record tells, if only of the last time that its task was ready."""
        names = list(self.model.records)
        asked = [("HGET", self.store.keys.of("task", key), TASK["home"]) for key in names]
        homes = self.store.link.batch(asked) if asked else []
        return {key: home[1:].decode() for key, home in zip(names, homes, strict=True) if home}

    def check_input(self, i: scripts.Input) -> None:
        record = self.model.records[i.key]
        if record.data is None:
            assert i.kind == "-"  # lost since the task was given out
        elif record.data.value is not None:
            assert (i.kind, i.data) == ("v", record.data.value)
        else:
            token, maker, nbytes, *places = i.data.decode().split("\n")
            assert i.kind == "r"
            assert (token, maker, int(nbytes)) == (record.data.token, record.maker, record.data.nbytes)
            assert sorted(places) == sorted(record.places)

    def new_run(self) -> None:
        """Another server took over, which lacks nothing: who joined before is refused once."""
        store = self.store
        before = store.generation
        script = load_script("new_run")
        run = f"run{next(self.tokens)}"
        meta = store.keys.fixed("meta")
        store.link.call("HSETNX", meta, META["run"], "first")
        for _ in range(2):
            after = store.link.call("EVAL", script.source, 1, meta, run).decode()
            assert after != before
            assert birth_of(after) == birth_of(before)
        store.adopts = False
        with pytest.raises(NamespaceResetError):
            store.retry("alice", [])
        store.adopts = True
        self.retry("alice", [])
        assert store.generation == after

    def abandon_slot(self, slot: str) -> None:
        self.idle.discard(slot)
        keys, killed, _ = give_up(self.store, slot)
        expected = self.model.abandon_slot(slot, self.store.settings.allowed_failures, b"killed")
        assert (sorted(keys), sorted(killed)) == tuple(map(sorted, expected))
        self.compare()

    # --- results that need no client

    def take_over(self, client: str, other: str, epoch: int) -> None:
        """`client` gets the name that `other` had, in calls that are repeated; `other` joins again."""
        store, name = self.store, "a name"
        if self.model.names.get(name) != other:
            store.claim_name(other, name, 60)
            self.take_over_rest(other, epoch)
            self.model.take_over(other, name, epoch)
            self.compare()
        for _ in range(2):
            assert store.claim_name(client, name, 60) == [other]
        assert audit(store) == []
        assert store.expire_client(other)[0] == 0  # it signs off, and has nothing any more
        self.take_over_rest(client, epoch)
        store.renew_client(other, join=True)
        self.model.take_over(client, name, epoch)
        self.compare()

    def take_over_rest(self, client: str, epoch: int) -> None:
        while self.store.inherit(client, epoch, most=2)[0]:
            self.drain()
        if self.is_lazy:
            self.drain()

    def publish(self, name: str, keys: list[str], override: bool, times: int = 1) -> None:
        holder = f"#{next(self.tokens)}"
        self.store.renew_client(holder, join=True)
        self.store.hold(holder, 1, keys)
        if self.is_lazy:
            self.drain()
        is_new = self.model.publish(name, holder, keys, override)
        for _ in range(times):
            try:
                before = self.store.publish(name, holder, b"a\nb", override=override)
            except NameTakenError:
                assert not is_new
                before = holder
            if before:
                self.expire_holder(before)
        assert self.store.dataset(name) == (self.model.datasets[name], b"a\nb")
        self.compare()

    def unpublish(self, name: str, times: int = 1) -> None:
        for _ in range(times):
            if holder := self.store.unpublish(name):
                self.expire_holder(holder)
            self.model.unpublish(name)
            self.compare()

    def expire_holder(self, holder: str) -> None:
        while self.store.expire_client(holder, fence="", most=2)[0]:
            self.drain()
        if self.is_lazy:
            self.drain()

    def entrust(self, keys: list[str], times: int = 1) -> None:
        for _ in range(times):
            assert self.store.entrust(keys) == self.model.entrust(keys)
            self.compare()

    def make_durable(self, keys: list[str], times: int = 1) -> None:
        for _ in range(times):
            assert self.store.make_durable(keys)[0] == self.model.make_durable(keys)
            self.compare()

    # --- copies and nodes

    def gain(
        self, place: str, items: list[tuple[str, str]], *, is_there: bool = True, times: int = 1
    ) -> None:
        """Copies, as key and token, come to a place; to Redis without the blob if not `is_there`."""
        is_there = is_there or place != REDIS
        for _ in range(times):
            if place == REDIS and is_there:
                for key, token in items:
                    self.store.link.batch(self.blob(token, key))
            expected = self.model.gain(place, items, is_there=is_there)
            assert self.store.gain(place, items) == expected
            self.compare()

    def lose(self, place: str, items: list[tuple[str, str]], times: int = 1) -> None:
        for _ in range(times):
            self.store.lose(place, items)
            self.model.lose(place, items)
            self.compare()

    def shed(self, place: str, items: list[tuple[str, str]], times: int = 1) -> None:
        for _ in range(times):
            assert self.store.shed(place, items) == self.model.shed(place, items)
            self.compare()

    def want_copies(self, keys: list[str], n: int, nodes: tuple[str, ...], times: int = 1) -> None:
        for _ in range(times):
            expected = self.model.want_copies(keys, n, nodes)
            assert self.store.want_copies(keys, n, nodes) == expected
            self.compare()

    def heartbeat(self, node: str, status: str) -> None:
        """A node lives, perhaps again."""
        join(self.store, node)
        self.store.heartbeat(node, status=status)
        self.model.heartbeat(node, slots=2, resources=NODES[node], status=status, pace_ms=5)
        self.compare()

    def leave_node(self, node: str) -> None:
        for slot, its_node in SLOTS.items():
            if its_node == node and slot in self.model.slots:
                self.abandon_slot(slot)
        while not self.store.leave_node(node, most=2).is_over:
            self.drain()
        self.model.leave_node(node)
        self.compare()

    def refuse(self, constraint: str) -> None:
        while self.store.refuse(constraint, b"refused", most=2)[0]:
            self.drain()
        self.model.refuse(constraint, b"refused")
        self.compare()

    def idle_slots(self) -> set[str]:
        """Slots that nobody has woken since they found nothing."""
        slots = self.store.link.call("ZRANGE", self.store.keys.fixed("idle"), 0, -1)
        return {slot.decode() for slot in slots}

    def mode(self, slot: str) -> str:
        """The letter that a slot must say if it was idle; it is so no longer."""
        was_idle = slot in self.idle
        self.idle.discard(slot)
        return "i" if was_idle else ""

    def as_stored(self, key: str, data: Data | None) -> tuple[Data, str, bytes | str, list[Command]]:
        """Data with its token, kind, value or token, commands that write the blob; None: it has vanished."""
        if data is not None and data.value is not None:
            return data, "v", data.value, []
        token = next(self.tokens)
        if data is None:
            return Data(9, token=token), "b", token, []
        write = self.blob(token, key) if data.place == REDIS else []
        return data._replace(token=token), "b" if data.place == REDIS else "n", token, write

    def blob(self, token: str, key: str) -> list[Command]:
        """Commands that write a blob for a record to adopt."""
        name = self.store.keys.blob(token, key)
        return [("HSET", name, "h", b"head"), ("PEXPIRE", name, 100_000)]

    # --- comparing ------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Audit what a spent budget left, then let the sweep end it."""
        assert audit(self.store) == []
        drain(self.store)

    def compare(self, but_notices_of: str = "") -> None:
        """Check that both are in the same state, told the same notices, and break no rule."""
        self.agree = False
        if self.is_lazy:
            self.drain()
        contents = read(self.store)
        assert violations(contents) == []
        found = snapshot(self.store, contents)
        self.adopt_lineage(found["records"])
        self.adopt_blames(found["records"])
        self.adopt_homes(found["records"])
        expected = self.model.snapshot()
        del expected["last_attempt"]
        assert found == expected
        self.compare_notices(found["records"], but_notices_of)
        assert sorted(take_mail(self.store)) == sorted(self.model.take_mail())
        assert take_failures(self.store) == sorted(set(self.model.failures))
        assert sorted(contents.debris) == sorted(set(self.model.debris))
        self.store.clear_debris(sorted(contents.debris))
        self.model.failures, self.model.debris = [], []
        unrunnable = {constraint: n for constraint, (n, _) in self.store.unrunnable().items()}
        assert unrunnable == self.model.unrunnable()
        self.model.check()
        self.agree = True

    def adopt_lineage(self, found: dict[str, dict[str, Any]]) -> None:
        """What nobody wants may have inherited an error, or not: the model takes the scripts' choice."""
        for key, record in self.model.records.items():  # inputs come before what depends on them
            row = found.get(key, {})
            if not self.model.may_have_erred(key) or record.state == row.get("state"):
                continue
            if row.get("state") == RELEASED:
                record.state, record.blame = RELEASED, None
            elif row.get("state") == ERRED and row["blame"] in self.model.blames(key):
                record.state, record.blame = ERRED, row["blame"]

    def adopt_blames(self, found: dict[str, dict[str, Any]]) -> None:
        """Where several inputs erred in one call, any may be blamed: the model takes the scripts' choice."""
        for key, record in self.model.records.items():  # inputs come before what depends on them
            blame = found.get(key, {}).get("blame")
            if record.state == ERRED and record.blame != blame and blame in self.model.blames(key):
                record.blame = blame

    def adopt_homes(self, found: dict[str, dict[str, Any]]) -> None:
        """Where several nodes have equally many bytes of the inputs, any may be the home."""
        for key, record in self.model.records.items():
            home = found.get(key, {}).get("home")
            if home in record.homes:
                record.home = home

    def compare_notices(self, records: dict[str, dict[str, Any]], but_of: str) -> None:
        told: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
        for client, key, epoch, code, content in take_notices(self.store):
            told[client, key].append((epoch, code))
            last = records.get(key, {})
            if code == "m" and last.get("value") is not None:
                assert content == last["value"]
            if code == "e" and last.get("state") == ERRED and records[last["blame"]]["state"] == ERRED:
                assert content == records[last["blame"]]["error"]
        expected = defaultdict(list)
        for n in self.model.take_notices():
            expected[n.client, n.key].append((n.epoch, n.code))
        assert {k: _distinct(v) for k, v in told.items() if k[0] != but_of} == {
            k: _distinct(v) for k, v in expected.items() if k[0] != but_of
        }

    def close(self) -> None:
        """End all clients: nothing may be left."""
        for name in list(self.model.datasets):
            self.unpublish(name)
        self.end_forgotten()
        for client in CLIENTS:
            self.expire_client(client)
        assert self.model.records == {}
        delete_namespace(self.store)

    def end_forgotten(self) -> None:
        """Nothing runs for nobody any more."""
        keys = [key for key, r in self.model.records.items() if "!" in r.holders]
        if keys:
            self.cancel("alice", keys, force=True)


def as_new(t: Task) -> scripts.NewTask:
    """The task in the form that the store takes."""
    return scripts.NewTask(
        t.key,
        t.function or "",
        t.payload,
        "",
        t.deps,
        t.priority,
        t.order,
        t.retries,
        t.hold,
        t.epoch,
        t.constraint,
        "\n".join(t.prefer),
    )


def drain(store: Store) -> None:
    for _ in range(1000):
        if store.sweep("", most=3)[0] == 0:
            return
    raise AssertionError("the sweep does not come to an end")


def _distinct(items: Iterable[Any]) -> list[Any]:
    """`items` without repeats of what came just before: to be told twice does no harm."""
    return [item for item, _ in itertools.groupby(items)]


def snapshot(store: Store, contents: Contents | None = None) -> dict[str, Any]:
    """The state of a namespace, read already or not, in the form of `Model.snapshot`."""
    c = contents or read(store)
    names = [TASK[name] for name in ("payload", "value", "error", "result", "retries", "deaths", "given")]
    rows = sorted(c.records.items())
    asked = [("HMGET", store.keys.of("task", key), *names) for key, _ in rows]
    bulk = store.link.batch(asked) if rows else []
    records = {}
    for (key, row), reply in zip(rows, bulk, strict=True):
        payload, value, error, result, retries, deaths, given = reply
        about = read_result(result)
        records[key] = {
            "state": row.state,
            "function": row.function or None,
            "payload": payload or b"",
            "deps": row.deps,
            "given": read_given(given),
            "priority": row.priority,
            "rank": row.rank,
            "retries": int(retries or 0),
            "deaths": len(read_deaths(deaths)),
            "waiting": row.waiting,
            "needed": row.needed,
            "attempt": int(row.attempt or 0),
            "owner": row.owner if row.state == PROCESSING else None,
            "nbytes": about.nbytes if about else None,
            "type": about.type if about else None,
            "value": value,
            "token": row.token,
            "maker": row.maker,
            "places": sorted(row.places),
            "copies": row.copies,
            "copies_on": row.copies_on,
            "constraint": row.constraint,
            "prefer": row.prefer,
            "home": row.home[1:],
            "contains": row.contains,
            "error": error,
            "blame": row.blame or None,
            "durable": FLAGS["durable"] in row.flags,
        }
    return {
        "records": records,
        "holders": {key: row.holders for key, row in rows if row.holders},
        "dependents": {key: sorted(d) for key, d in sorted(c.dependents.items())},
        "ready": [entry[16:] for entry in c.ready],
        "homes": {node: list(queue) for node, queue in c.home_queues.items()},
        "picky": {name: [entry[16:] for entry in queue] for name, queue in c.picky.items()},
        "clients": {client: sorted(keys) for client, keys in c.held.items()},
        "owned": {slot: {k: int(a) for k, a in keys.items()} for slot, keys in c.owned.items()},
        "functions": c.functions,
        "constraints": c.constraints,
        "node_keys": {node: sorted(keys) for node, keys in c.node_keys.items()},
        "copies": sorted(c.copies),
        "undurable": sorted(c.undurable),
        "names": c.names,
        "datasets": c.datasets,
    }


def take_failures(store: Store) -> list[tuple[str, str]]:
    """Read and remove what failed for nobody: key, key to blame."""
    found = store.log_failures()
    assert store.log_failures(logged=len(found)) == []
    return sorted({(key, blame) for key, blame, _ in found})


def give_up(store: Store, slot: str) -> tuple[list[str], list[str], scripts.Tickets]:
    """Give up a slot that is gone, as graph/killed.py does: tasks that went over the limit err."""
    owned = [key.decode() for key in store.link.call("HKEYS", store.keys.of("slot", slot))]
    deaths = [
        read_deaths(store.link.call("HGET", store.keys.of("task", key), TASK["deaths"])) for key in owned
    ]
    over = [key for key, n in zip(owned, deaths, strict=True) if len(n) >= store.settings.allowed_failures]
    return store.abandon_slot(slot, SLOTS[slot], "it ended", dict.fromkeys(over, b"killed"))


def take_mail(store: Store) -> list[tuple[str, str]]:
    """Read and remove the mail of all nodes: node, message."""
    boxes = [store.keys.of("mail", node) for node in NODES]
    *mail, _ = store.link.batch([*(("LRANGE", box, 0, -1) for box in boxes), ("UNLINK", *boxes)])
    return [(node, message.decode()) for node, box in zip(NODES, mail, strict=True) for message in box]


def take_notices(store: Store) -> list[tuple[str, str, int, str, bytes]]:
    """Read and remove all notices: client, key, epoch, code, bytes."""
    streams = [store.keys.of("notices", client) for client in CLIENTS]
    *told, _ = store.link.batch([*(("XRANGE", name, "-", "+") for name in streams), ("UNLINK", *streams)])
    found = []
    for client, entries in zip(CLIENTS, told, strict=True):
        for _, fields in entries:
            for key, text in zip(fields[::2], fields[1::2], strict=True):
                epoch, _, rest = text.partition(b" ")
                if key == b"":
                    continue  # a word about its name
                found.append((client, key.decode(), int(epoch), rest[:1].decode(), rest[1:]))
    return found


# --- random events ------------------------------------------------------------------------------------------

MEDIUM = bytes(LARGEST_GIVEN + 1)
"""A value in its record that is too large to become part of tasks that need it."""
DATA = st.builds(
    Data,
    nbytes=st.sampled_from([0, 9, 200_000, 50_000_000]),
    type=st.sampled_from(["int", "ndarray"]),
    value=st.sampled_from([b"", b"abc", MEDIUM, None, None]),
    place=st.sampled_from([REDIS, *NODES]),
)


@st.composite
def chunks(draw: st.DrawFn, records: Iterable[str]) -> list[Task]:
    """Tasks for one submission, most of them with dependencies that exist by then."""
    known = set(records)
    tasks = []
    for key in sorted(draw(st.lists(st.sampled_from(TASKS), min_size=2, max_size=6))):
        above = [k for k in KEYS if k < key]
        if draw(st.integers(0, 19)) > 0:
            above = [k for k in above if k in known] if draw(st.integers(0, 3)) > 0 else []
        task = Task(
            key,
            draw(st.sampled_from(sorted(FUNCTIONS))),
            draw(st.sampled_from([b"", b"call"])),
            tuple(draw(st.lists(st.sampled_from(above), min_size=1, max_size=3, unique=True)))
            if above
            else (),
            draw(st.sampled_from([0, 0, 1, -1.5])),
            draw(st.integers(0, 3)),
            draw(st.integers(0, 1)),
            draw(st.sampled_from([True, True, False])),
            draw(st.sampled_from([0, 0, 99])),
            draw(st.sampled_from(["", "", "", "", *CONSTRAINTS])),
            tuple(draw(st.sampled_from([(), (), (), ("c@two",), ("a@one", "gone"), ("a@one", "b@two")]))),
        )
        known.add(key)
        tasks.append(task)
    return tasks


@st.composite
def data_of(draw: st.DrawFn, key: str) -> Data:
    """A result, at times with futures inside: of keys before it, so that no two results hold each other."""
    inside = [k for k in KEYS if k < key]
    contains = draw(st.lists(st.sampled_from(inside), max_size=2, unique=True)) if inside else []
    return draw(DATA)._replace(contains=tuple(contains))


A_CLIENT = st.sampled_from(CLIENTS)
A_SLOT = st.sampled_from(sorted(SLOTS))
A_NODE = st.sampled_from(sorted(NODES))
A_PLACE = st.sampled_from(PLACES)
SOME_KEYS = st.lists(st.sampled_from(KEYS), min_size=1, max_size=4)
TIMES = st.sampled_from([1, 1, 1, 2])
WANT_NEXT = st.sampled_from([0, 1, 50])
OUTCOMES = st.lists(
    st.sampled_from(["done", "done", "large", "large", "missing", "failed", "back", "later"]),
    min_size=len(KEYS),
    max_size=len(KEYS),
)


class Machine(RuleBasedStateMachine):
    """Random events for `Twins`."""

    link: ClassVar[Link]
    budgets: ClassVar[list[int]]

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.twins = Twins(self.link, data.draw(st.sampled_from(self.budgets), "budget"))
        self.epoch = 0

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    @rule(data=st.data(), client=A_CLIENT, times=TIMES)
    def submit(self, data: st.DataObject, client: str, times: int) -> None:
        tasks = data.draw(chunks(self.twins.model.records), "tasks")
        epoch = self.next_epoch()
        self.twins.submit(client, epoch, epoch // 2, tasks, times)

    @rule(data=st.data(), client=A_CLIENT, times=TIMES)
    def submit_more(self, data: st.DataObject, client: str, times: int) -> None:
        self.submit(data, client, times)  # twice as often as other events

    @precondition(lambda self: self.twins.model.records)
    @rule(data=st.data(), client=A_CLIENT, times=TIMES)
    def ask(self, data: st.DataObject, client: str, times: int) -> None:
        """A client does something about keys, most of which have records."""
        keys = data.draw(st.lists(st.sampled_from(self.known_keys()), min_size=1, max_size=3), "keys")
        asks = ["hold", "again", "release", "release", "cancel", "force", "retry", "retry"]
        match data.draw(st.sampled_from(asks)):
            case "again":
                self.twins.hold_again(client, [(key, self.next_epoch()) for key in keys], times)
            case "hold":
                self.twins.hold(client, self.next_epoch(), keys, times)
            case "release":
                self.twins.release(client, keys, times)
            case "cancel":
                self.twins.cancel(client, keys, times=times)
            case "force":
                self.twins.cancel(client, keys, force=True, times=times)
            case "retry":
                self.twins.retry(client, keys, times)

    @rule(data=st.data(), client=A_CLIENT, times=TIMES)
    def put(self, data: st.DataObject, client: str, times: int) -> None:
        key = data.draw(st.sampled_from(SCATTERED * 3 + self.known_keys()), "key")
        self.twins.put(client, self.next_epoch(), key, data.draw(data_of(key), "data"), times)

    @rule(
        data=st.data(),
        event=st.sampled_from(
            ["publish", "override", "unpublish", "entrust", "durable", "durable", "take over"]
        ),
        times=TIMES,
    )
    def do_without_client(self, data: st.DataObject, event: str, times: int) -> None:
        """Something that makes results live longer than their client."""
        keys = data.draw(st.lists(st.sampled_from(self.known_keys()), min_size=1, max_size=3), "keys")
        name = data.draw(st.sampled_from(["one", "two"]), "dataset")
        match event:
            case "publish" | "override":
                self.twins.publish(name, keys, event == "override", times)
            case "unpublish":
                self.twins.unpublish(name, times)
            case "entrust":
                self.twins.entrust(keys, times)
            case "durable":
                self.twins.make_durable(keys, times)
            case _:
                client, other = data.draw(st.sampled_from([CLIENTS, CLIENTS[::-1]]), "heir")
                self.twins.take_over(client, other, self.next_epoch())

    def known_keys(self) -> list[str]:
        """Keys with records twice, all others once."""
        return [*self.twins.model.records, *KEYS]

    @rule(slot=A_SLOT, want=st.sampled_from([1, 2, 50]), mode=st.sampled_from(["", "", "r", "l", "q", "p"]))
    def take(self, slot: str, want: int, mode: str) -> None:
        if mode in {"l", "q"} and any(r.owner == slot for r in self.twins.model.in_state(PROCESSING)):
            mode = ""  # a slot leaves empty-handed
        self.twins.take(slot, want, mode)

    @precondition(lambda self: self.twins.model.in_state(READY, PROCESSING))
    @rule(data=st.data(), slot=A_SLOT, want=WANT_NEXT)
    def work(self, data: st.DataObject, slot: str, want: int) -> None:
        """A slot takes what it can and does most of it."""
        self.twins.take(slot, 50)
        done, failed = [], []
        for r in self.twins.model.in_state(PROCESSING):
            outcome = (
                data.draw(st.sampled_from(["done", "done", "failed", "later"])) if r.owner == slot else ""
            )
            if outcome == "done":
                large = data.draw(st.booleans())
                result = Data(900_000, "ndarray", place=SLOTS[slot]) if large else Data(1, "int", b"1")
                done.append(Done(r.key, r.attempt, result))
            elif outcome == "failed":
                failed.append(Failed(r.key, r.attempt, f"error {r.attempt}".encode(), retryable=False))
        self.twins.step(slot, done, failed, want=want)

    @precondition(lambda self: self.twins.model.in_state(READY, PROCESSING))
    @rule(data=st.data(), slot=A_SLOT, want=WANT_NEXT)
    def work_more(self, data: st.DataObject, slot: str, want: int) -> None:
        self.work(data, slot, want)  # twice as often as other events

    @precondition(lambda self: self.twins.claims)
    @rule(data=st.data(), want=WANT_NEXT, times=TIMES)
    def report(self, data: st.DataObject, want: int, times: int) -> None:
        """One slot reports attempts that are current, over, or reported before."""
        slot = data.draw(st.sampled_from(sorted({slot for slot, _, _ in self.twins.claims})), "slot")
        own = [(key, attempt) for s, key, attempt in self.twins.claims if s == slot]
        done, failed, back, missing = [], [], [], []
        some = st.lists(st.sampled_from(own[-8:]), min_size=1, max_size=4)
        for key, attempt in data.draw(some, "attempts"):
            match data.draw(st.sampled_from(["done", "done", "vanished", "failed", "back", "missing"])):
                case "done":
                    done.append(Done(key, attempt, data.draw(data_of(key))))
                case "vanished":
                    done.append(Done(key, attempt, None))
                case "failed":
                    failed.append(Failed(key, attempt, f"error {attempt}".encode(), data.draw(st.booleans())))
                case "back":
                    back.append(Back(key, attempt))
                case "missing":
                    record = self.twins.model.records.get(key)
                    lost = [
                        (dep, token, place)
                        for dep in (record.deps if record else ())
                        for token, place in self.copies_of(dep)
                        if data.draw(st.booleans())
                    ]
                    missing.append(Missing(key, attempt, tuple(lost)))
        self.twins.step(slot, done, failed, back, missing, want, times=times)

    def copies_of(self, key: str) -> list[tuple[str, str]]:
        """Token and place of the copies of a key."""
        record = self.twins.model.records.get(key)
        if record is None or record.data is None:
            return []
        return [(record.data.token, place) for place in sorted(record.places)]

    def known_copies(self) -> list[tuple[str, str]]:
        """Key and token of what there are copies of; else a token that nothing else ever has."""
        found = [(r.key, r.data.token) for r in self.twins.model.in_state(MEMORY) if r.data and r.places]
        return found or [("k00", "old")]

    @rule(data=st.data(), place=A_PLACE, times=TIMES)
    def change_copies(self, data: st.DataObject, place: str, times: int) -> None:
        """Copies come and go; now and then of a version that is none any more."""
        items = st.sampled_from([*self.known_copies() * 3, ("k03", "old"), ("d0", "old")])
        some = data.draw(st.lists(items, min_size=1, max_size=3, unique=True), "copies")
        match data.draw(st.sampled_from(["gain", "gain", "vanished", "lose", "lose", "shed"])):
            case "gain":
                self.twins.gain(place, some, times=times)
            case "vanished":
                self.twins.gain(place, [(key, f"{token}x") for key, token in some], is_there=False)
            case "lose":
                self.twins.lose(place, some, times)
            case "shed":
                self.twins.shed(place, some, times)

    @precondition(lambda self: self.twins.model.in_state(MEMORY))
    @rule(data=st.data())
    def lose_last(self, data: st.DataObject) -> None:
        """All copies of one key are gone."""
        key = data.draw(st.sampled_from([r.key for r in self.twins.model.in_state(MEMORY)]), "key")
        for token, place in self.copies_of(key):
            self.twins.lose(place, [(key, token)])

    @rule(
        keys=SOME_KEYS,
        n=st.integers(1, 2),
        nodes=st.sampled_from([(), (), ("a@one",), ("b@two", "gone")]),
        times=TIMES,
    )
    def want_copies(self, keys: list[str], n: int, nodes: tuple[str, ...], times: int) -> None:
        self.twins.want_copies(keys, n, nodes, times)

    @rule(node=A_NODE, event=st.sampled_from(["leave", "pause", "join", "join", "retire"]))
    def change_node(self, node: str, event: str) -> None:
        match event:
            case "leave" if node in self.twins.model.nodes or self.epoch % 4 == 0:  # one that is gone: seldom
                self.twins.leave_node(node)
            case "pause":
                self.twins.heartbeat(node, "paused")
            case "retire":
                self.twins.heartbeat(node, "retiring")
            case _:
                self.twins.heartbeat(node, "running")

    @precondition(lambda self: self.twins.model.in_state(READY))
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        constraints = sorted({r.constraint for r in self.twins.model.in_state(READY)})
        self.twins.refuse(data.draw(st.sampled_from(constraints), "constraint"))

    @precondition(lambda self: len(self.twins.model.in_state(PROCESSING)) > 1)
    @rule(slot=A_SLOT)
    def abandon_slot(self, slot: str) -> None:
        self.twins.abandon_slot(slot)

    @precondition(lambda self: len(self.twins.model.records) > 5)
    @rule(client=A_CLIENT, comes_back=st.booleans())
    def expire_client(self, client: str, comes_back: bool) -> None:
        if comes_back:
            self.twins.lose_client(client)
        else:
            self.twins.expire_client(client)

    @precondition(lambda self: self.twins.claims)
    @rule()
    def begin_a_new_run(self) -> None:
        """Another server process answers: numbers are not given out twice, everybody joins once more."""
        self.twins.new_run()

    def teardown(self) -> None:
        if hasattr(self, "twins") and self.twins.agree:
            self.twins.close()


class CopiesMachine(Machine):
    """The same, but it begins with results on nodes, and more events are about these and what reads them."""

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        super().begin(data)
        for key, place in zip(SCATTERED, NODES, strict=False):
            self.twins.put("alice", self.next_epoch(), key, Data(9, "bytes", place=place))
        self.twins.submit("alice", self.next_epoch(), 1, [Task(key, "f") for key in TASKS[:3]])
        for slot, node in SLOTS.items():
            self.twins.take(slot, 1)
            _, key, attempt = self.twins.claims[-1]
            self.twins.step(slot, [Done(key, attempt, Data(200_000, "ndarray", place=node))])

    @precondition(lambda self: any(r.places for r in self.twins.model.records.values()))
    @rule(data=st.data(), client=A_CLIENT)
    def read(self, data: st.DataObject, client: str) -> None:
        """A few new tasks read what has copies, and others what these will make."""
        copied = [r.key for r in self.twins.model.in_state(MEMORY) if r.places]
        some = st.lists(st.sampled_from(copied), min_size=1, max_size=2, unique=True)
        epoch = self.next_epoch()
        tasks = [
            Task(f"n{epoch}.{i}", "f", b"", tuple(deps), data.draw(st.sampled_from([0, 0, 1])), i)
            for i, deps in enumerate(data.draw(st.lists(some, min_size=1, max_size=4), "inputs"))
        ]
        if data.draw(st.booleans(), "more"):
            tasks += [Task(f"{t.key}+", "f", b"", (t.key,), order=9) for t in tasks]
        self.twins.submit(client, epoch, epoch // 2, tasks)

    @precondition(lambda self: any(r.places for r in self.twins.model.records.values()))
    @rule(data=st.data(), client=A_CLIENT)
    def read_more(self, data: st.DataObject, client: str) -> None:
        self.read(data, client)  # twice as often as other events

    @precondition(lambda self: self.twins.model.in_state(MEMORY))
    @rule(client=A_CLIENT)
    def let_go(self, client: str) -> None:
        """A client needs what was read no more."""
        self.twins.release(client, [r.key for r in self.twins.model.in_state(MEMORY) if r.key[0] == "n"])

    @rule(data=st.data(), node=A_NODE, n=st.integers(1, 2))
    def spread(self, data: st.DataObject, node: str, n: int) -> None:
        """All that has copies has one on a node, too; that many are wanted, and there is one too many."""
        copies = self.known_copies()
        self.twins.gain(node, copies)
        self.twins.want_copies([key for key, _ in copies], n, ())
        self.twins.shed(data.draw(A_PLACE, "place"), copies)

    @rule(node=st.sampled_from(sorted(set(SLOTS.values()))))
    def look(self, node: str) -> None:
        """Each slot of a node takes a task, or idles."""
        for slot, its_node in SLOTS.items():
            if its_node == node:
                self.twins.take(slot, 1)

    @precondition(lambda self: self.twins.claims)
    @rule(data=st.data(), want=WANT_NEXT, times=TIMES)
    def report_more(self, data: st.DataObject, want: int, times: int) -> None:
        self.report(data, want, times)  # twice as often as other events


class LazyMachine(RuleBasedStateMachine):
    """Random events while what spent budgets leave behind piles up, and the sweep comes when it comes.

    What is claimed meanwhile depends on what was left, so there is nothing to compare with. But every rule
    must hold at any time, and in the end nothing may be left. The sweep takes keys in random order, so what
    is drawn here must not depend on the state.
    """

    link: ClassVar[Link]
    budgets: ClassVar[list[int]]

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.store = new_store(self.link, data.draw(st.sampled_from(self.budgets), "budget"))
        self.number = 0
        self.is_sound = True

    def next_number(self) -> int:
        self.number += 1
        return self.number

    @invariant()
    def every_rule_holds(self) -> None:
        if hasattr(self, "store"):
            self.is_sound = False
            assert audit(self.store) == []
            self.is_sound = True

    @rule(data=st.data(), client=A_CLIENT)
    def submit(self, data: st.DataObject, client: str) -> None:
        known = set(read(self.store).records)
        tasks = []
        for task in data.draw(chunks(KEYS), "tasks"):
            tasks.append(task._replace(deps=tuple(dep for dep in task.deps if dep in known)))
            known.add(task.key)
        self.store.submit(client, self.next_number(), map(as_new, tasks), FUNCTIONS.items())

    @rule(client=A_CLIENT, key=st.sampled_from(KEYS))
    def put(self, client: str, key: str) -> None:
        number = self.next_number()
        if number % 2 and "a@one" in read(self.store).nodes:
            new = scripts.NewData(key, 1, "ndarray", "n", f"put{number}", place="a@one")
        else:
            new = scripts.NewData(key, 1, "int", "v", b"1")
        self.store.put(client, number, [new])

    @rule(client=A_CLIENT, keys=SOME_KEYS)
    def hold(self, client: str, keys: list[str]) -> None:
        self.store.hold(client, self.next_number(), keys)

    @rule(client=A_CLIENT, keys=SOME_KEYS)
    def release(self, client: str, keys: list[str]) -> None:
        self.store.release(client, keys)

    @rule(client=A_CLIENT, keys=SOME_KEYS, force=st.booleans())
    def cancel(self, client: str, keys: list[str], force: bool) -> None:
        self.store.cancel(client, keys, force=force)

    @rule(client=A_CLIENT, keys=SOME_KEYS)
    def retry(self, client: str, keys: list[str]) -> None:
        self.store.retry(client, keys)

    @rule(slot=A_SLOT, want=st.sampled_from([0, 1, 50]), outcomes=OUTCOMES)
    def work(self, slot: str, want: int, outcomes: list[str]) -> None:
        done, failed, back, missing = [], [], [], []
        contents = read(self.store)
        owned = sorted(contents.owned.get(slot, {}).items())
        for (key, attempt), outcome in zip(owned, outcomes, strict=False):
            match outcome:
                case "done":
                    done.append(scripts.Done(key, attempt, 1, "int", "v", b"1"))
                case "large":
                    done.append(scripts.Done(key, attempt, 9, "ndarray", "n", attempt))
                case "missing":
                    lost = self.copies(contents.records[key].deps, contents)
                    missing.append(scripts.Missing(key, attempt, lost))
                case "failed":
                    failed.append(scripts.Failed(key, attempt, b"error"))
                case "back":
                    back.append((key, attempt))
        self.store.step(
            slot, SLOTS[slot], mode="i", want=want, done=done, failed=failed, back=back, missing=missing
        )

    def copies(self, keys: Iterable[str], contents: Contents | None = None) -> list[tuple[str, str, str]]:
        """Key, token and place of all copies of keys."""
        records = (contents or read(self.store)).records
        rows = [records[key] for key in sorted(set(keys) & records.keys())]
        return [(row.key, row.token, place) for row in rows for place in row.places]

    @rule(keys=SOME_KEYS, place=A_PLACE, event=st.sampled_from(["gain", "lose", "shed"]))
    def change_copies(self, keys: list[str], place: str, event: str) -> None:
        items = [(key, token) for key, token, _ in self.copies(keys)]
        getattr(self.store, event)(place, items)

    @rule(keys=SOME_KEYS)
    def lose_all(self, keys: list[str]) -> None:
        for key, token, place in self.copies(keys):
            self.store.lose(place, [(key, token)])

    @rule(keys=SOME_KEYS, n=st.integers(1, 2))
    def want_copies(self, keys: list[str], n: int) -> None:
        self.store.want_copies(keys, n)

    @rule(keys=SOME_KEYS)
    def make_durable(self, keys: list[str]) -> None:
        self.store.make_durable(keys)

    @rule(keys=SOME_KEYS)
    def entrust(self, keys: list[str]) -> None:
        self.store.entrust(keys)

    @rule(keys=SOME_KEYS, event=st.sampled_from(["publish", "unpublish", "expire"]))
    def change_dataset(self, keys: list[str], event: str) -> None:
        if event == "unpublish":
            self.store.unpublish("one")
        elif event == "expire":
            for holder in self.store.overdue("clients"):
                self.store.expire_client(holder, most=2)
        else:
            holder = f"#{self.next_number()}"
            self.store.renew_client(holder, join=True)
            self.store.hold(holder, 1, keys)
            self.store.publish("one", holder, b"", override=True)

    @rule(keys=SOME_KEYS, most=st.sampled_from([0, 1, 50]))
    def take_over(self, keys: list[str], most: int) -> None:
        """A name goes from client to client, before what the last ones held was inherited or after."""
        heir = f"heir{self.next_number()}"
        self.store.claim_name(heir, "a name", 60)
        self.store.inherit(heir, self.next_number(), most=most)
        self.store.hold(heir, self.next_number(), keys)

    @rule(node=A_NODE)
    def leave_node(self, node: str) -> None:
        for slot in self.store.leave_node(node, most=2).slots:
            give_up(self.store, slot)
        self.store.leave_node(node, most=2)

    @rule(node=A_NODE)
    def join(self, node: str) -> None:
        join(self.store, node)

    @rule(slot=A_SLOT, outcomes=OUTCOMES)
    def work_more(self, slot: str, outcomes: list[str]) -> None:
        self.work(slot, 50, outcomes)  # twice as often as other events

    @rule(slot=A_SLOT)
    def abandon_slot(self, slot: str) -> None:
        give_up(self.store, slot)

    @rule(most=st.sampled_from([1, 3, 50]))
    def sweep(self, most: int) -> None:
        self.store.sweep("", most=most)

    def teardown(self) -> None:
        if hasattr(self, "store") and self.is_sound:
            self.store.unpublish("one")
            drain(self.store)
            ends = [key for key, row in read(self.store).records.items() if "!" in row.holders]
            self.store.cancel("alice", ends, force=True)
            while clients := list(read(self.store).clients):
                for client in clients:
                    while self.store.expire_client(client, most=3)[0]:
                        pass
            drain(self.store)
            assert audit(self.store) == []
            assert read(self.store).records == {}
            delete_namespace(self.store)


def run_machine(
    machine: type[Machine] | type[LazyMachine], link: Link, budgets: list[int], examples: int, steps: int = 25
) -> None:
    run_state_machine_as_test(
        type(machine.__name__, (machine,), {"link": link, "budgets": budgets}),
        settings=settings(
            max_examples=examples * EFFORT,
            stateful_step_count=steps,
            deadline=None,
            phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )


LONG = pytest.mark.timeout(900)  # a failure takes minutes to shrink


@pytest.fixture
def link(redis_server: str) -> Iterator[Link]:
    link = Link.connect(Settings(url=redis_server))
    yield link
    link.close()


@LONG
def test_scripts_on_redis_agree_with_the_model(link):
    run_machine(Machine, link, [ENOUGH], examples=50)


@LONG
def test_scripts_whose_budget_is_spent_agree_with_the_model_after_the_sweep(link):
    run_machine(Machine, link, [1, 2, 4], examples=35)


@LONG
def test_scripts_on_redis_agree_with_the_model_about_copies(link):
    run_machine(CopiesMachine, link, [ENOUGH, ENOUGH, 2], examples=32)


@LONG
def test_scripts_on_a_simulated_redis_agree_with_the_model():
    run_machine(Machine, fake_link(), [ENOUGH, 2], examples=8)


@LONG
def test_every_rule_holds_while_work_is_left_for_the_sweep(link):
    run_machine(LazyMachine, link, [1, 2, 4], examples=45, steps=40)


# --- seeds that failed ------------------------------------------------------------------------------------


@pytest.fixture
def twins(link: Link) -> Iterator[Twins]:
    twins = Twins(link)
    yield twins
    if twins.agree:
        twins.close()


def a_task(key: str, *deps: str, **fields: Any) -> Task:
    return Task(key, "f", b"call", deps, **fields)


def fail(twins: Twins, key: str) -> None:
    """Let the next ready task, which must be `key`, fail."""
    assert twins.take("a@one|1.1", 1) == [key]
    twins.step("a@one|1.1", failed=[Failed(key, twins.claims[-1][2], b"error", retryable=False)])


def run(twins: Twins, key: str) -> None:
    """Let the next ready task, which must be `key`, succeed."""
    assert twins.take("a@one|1.1", 1) == [key]
    twins.step("a@one|1.1", done=[Done(key, twins.claims[-1][2], Data(1, "int", b"1"))])


def test_put_tells_who_waited_for_the_key(twins):
    twins.submit("alice", 1, 1, [a_task("k00")])
    twins.put("bob", 2, "k00", Data(3, "bytes", b"abc"))


def test_a_repeated_put_keeps_the_blob_that_it_brought(twins):
    twins.put("alice", 1, "d0", Data(9), times=2)


def test_a_second_put_keeps_the_blob_of_the_first(twins):
    twins.put("alice", 1, "d0", Data(9))
    twins.put("bob", 2, "d0", Data(9))


def test_a_repeated_completion_keeps_the_blob_that_it_brought(twins):
    twins.submit("alice", 1, 1, [a_task("k00")])
    twins.take("a@one|1.1", 1)
    twins.step("a@one|1.1", done=[Done("k00", 1, Data(9))], times=2)


def test_a_repeated_submission_keeps_the_payload_blob_that_it_brought(link):
    store = new_store(link, ENOUGH)
    blob = store.keys.blob("token", "k00")
    for _ in range(2):
        new = scripts.NewTask("k00", "f", b"", "token")
        before = [("HSET", blob, "h", b"head"), ("PEXPIRE", blob, 100_000)]
        store.submit("alice", 1, [new], FUNCTIONS.items(), generation=1, before=before)
        assert audit(store) == []


def test_an_error_that_nobody_holds_is_forgotten_when_a_new_task_needs_its_key(twins):
    twins.submit("alice", 1, 1, [a_task("k00"), a_task("k01", "k00", order=1), a_task("k02", "k01", order=2)])
    fail(twins, "k00")
    twins.put("alice", 2, "k01", Data(1, "int", b"1"))
    twins.retry("alice", ["k02"])
    twins.release("alice", ["k00"])
    twins.submit("bob", 3, 2, [a_task("k00", hold=False), a_task("k03", "k00")])


@pytest.mark.parametrize("i", range(8))  # in which order the sweep takes two keys depends on their names
def test_a_task_that_a_sweep_stops_raises_and_stops_again_leaves_the_queue(link, i):
    twins = Twins(link)
    store = twins.store
    source, failed, ready, both, top = (f"{name}{i}" for name in ("source", "failed", "ready", "both", "top"))
    edges = {source: (), failed: (source,), ready: (), both: (ready, failed), top: (both,)}
    graph = [a_task(key, *deps, order=n, hold=key == top) for n, (key, deps) in enumerate(edges.items())]
    twins.submit("alice", 1, 1, graph)
    for key in edges:
        run(twins, key)
    twins.hold("alice", 2, [source])
    fail(twins, source)
    twins.hold("alice", 3, [ready])
    store.settings = store.settings.replace(sweep_budget=1)
    store.hold("alice", 4, [top, both])
    store.release("alice", [source, ready])
    store.settings = store.settings.replace(sweep_budget=ENOUGH)
    assert read(store).unsettled == {both, ready}
    store.sweep("")

    assert audit(store) == []


def test_the_blob_of_a_completion_that_a_put_forestalled_vanishes(twins):
    twins.submit("alice", 1, 1, [a_task("k00")])
    twins.take("a@one|1.1", 1)
    twins.put("bob", 2, "k00", Data(1, "int", b"1"))
    twins.step("a@one|1.1", done=[Done("k00", 1, Data(9))])


def test_a_second_result_of_one_attempt_vanishes(twins):
    twins.submit("alice", 1, 1, [a_task("k00")])
    twins.take("a@one|1.1", 1)
    twins.step("a@one|1.1", done=[Done("k00", 1, Data(1, "int", b"1"))])
    twins.step("a@one|1.1", done=[Done("k00", 1, Data(9))])


def test_force_goes_on_to_dependents_of_a_key_that_a_result_keeps(twins):
    twins.put("alice", 1, "d0", Data(1, "int", MEDIUM))
    twins.put("alice", 2, "d1", Data(1, "int", b"1", ("d0",)))
    twins.submit("bob", 3, 1, [a_task("k00", "d0")])
    twins.cancel("alice", ["d0"], force=True)
    assert read(twins.store).records.keys() == {"d0", "d1"}


def test_a_put_in_place_of_an_error_runs_again_what_that_took_down(twins):
    twins.submit("alice", 1, 1, [a_task("k00"), a_task("k01", "k00", order=1), a_task("k02", "k01", order=2)])
    fail(twins, "k00")
    twins.put("bob", 2, "k00", Data(1, "int", b"1"))
    run(twins, "k01")
    run(twins, "k02")


def test_a_task_without_a_function_is_refused(link):
    store = new_store(link, ENOUGH)
    with pytest.raises(UnknownFunctionError):
        store.submit("alice", 1, [scripts.NewTask("k00", "", b"")])
    assert read(store).records == {}


def test_who_submits_a_key_twice_in_one_chunk_is_told_under_the_epoch_of_the_last_hold(twins):
    twins.put("alice", 1, "d0", Data(0))
    twins.lose(REDIS, [("d0", "0")])
    twins.submit("alice", 2, 1, [a_task("k01", "d0"), a_task("k01"), a_task("k01", epoch=99)])


def test_who_submits_a_failed_key_twice_in_one_chunk_is_told_under_the_epoch_of_the_last_hold(twins):
    twins.submit("alice", 1, 1, [a_task("k00", hold=False), a_task("k01", "k00", order=1)])
    fail(twins, "k00")
    twins.put("bob", 2, "k01", Data(1, "int", b"1"))
    twins.submit("bob", 3, 2, [a_task("k00"), a_task("k00", epoch=99)])


def test_what_is_needed_only_by_a_task_that_errs_may_err_or_not(twins):
    twins.put("alice", 1, "d0", Data(0))
    twins.lose(REDIS, [("d0", "0")])
    chain = [
        a_task("k00", "d0", hold=False),
        a_task("k01", "k00", hold=False),
        a_task("k02", "d0", "k00", "k01"),
    ]
    twins.submit("alice", 2, 1, chain)
    twins.retry("alice", ["k02"])


def test_inputs_of_no_bytes_choose_no_home(twins):
    twins.put("alice", 1, "d0", Data(0, place="a@one"))
    twins.submit("alice", 2, 1, [a_task("k00", "d0")])
    assert read(twins.store).home_queues == {}


def test_without_nodes_tasks_without_a_constraint_are_unrunnable_too(twins):
    for node in NODES:
        twins.leave_node(node)
    twins.submit("alice", 1, 1, [a_task("k00")])
    assert twins.store.unrunnable().keys() == {""}


# --- what random events seldom come to ----------------------------------------------------------------------


def test_nobody_steals_from_a_node_with_an_idle_slot(twins):
    twins.put("alice", 1, "d0", Data(9, place="b@two"))
    for slot in ("b@two|2.1", "b@two|3.1"):
        assert twins.take(slot, 1) == []
    twins.submit("alice", 2, 1, [a_task("k00", "d0")])
    assert len(twins.idle_slots()) == 1
    assert twins.take("a@one|1.1", 1) == []
    twins.submit("alice", 3, 2, [a_task("k01", "d0")])
    assert twins.idle_slots() == {"a@one|1.1"}
    assert twins.take("a@one|1.1", 1) == ["k01"]


def test_one_call_takes_one_task_that_uses_resources(twins):
    tasks = [a_task("k00", constraint=CONSTRAINTS[1]), a_task("k01", constraint=CONSTRAINTS[2])]
    twins.submit("alice", 1, 1, tasks)
    assert twins.take("a@one|1.1", 50) == []
    assert twins.take("b@two|2.1", 50) == ["k00"]
    assert twins.take("b@two|3.1", 50) == ["k01"]


def test_a_copy_on_a_node_that_was_given_up_does_not_count(twins):
    twins.submit("alice", 1, 1, [a_task("k00")])
    twins.leave_node("a@one")
    twins.take("a@one|1.1", 1)
    twins.step("a@one|1.1", [Done("k00", 1, Data(9, place="a@one"))])
    run(twins, "k00")


def test_a_node_that_lives_again_has_none_of_its_copies(twins):
    twins.put("alice", 1, "d0", Data(9, place="a@one"))
    twins.leave_node("a@one")
    twins.heartbeat("a@one", "running")
    twins.gain("a@one", [("d0", "0")])
    twins.put("alice", 2, "d0", Data(9, place="a@one"))
    twins.gain("b@two", [("d0", "1")])


def test_what_prefers_a_node_that_goes_is_sent_elsewhere(twins):
    twins.submit("alice", 1, 1, [a_task("k00", prefer=("a@one",)), a_task("k01", prefer=("a@one", "c@two"))])
    twins.leave_node("a@one")
    assert twins.homes() == {"k01": "c@two"}


def test_copies_are_shed_until_just_as_many_as_are_wanted_are_left_on_nodes(twins):
    twins.put("alice", 1, "d0", Data(9, place="a@one"))
    for place in ("b@two", "c@two", REDIS):
        twins.gain(place, [("d0", "0")])
    twins.want_copies(["d0"], 2, ())
    for place in ("a@one", "b@two", REDIS):
        twins.shed(place, [("d0", "0")])
    assert twins.model.records["d0"].places == {"b@two", "c@two"}


def test_a_task_that_waits_for_paused_nodes_is_not_unrunnable_and_one_for_retiring_ones_is(twins):
    twins.submit("alice", 1, 1, [a_task("k00")])
    for node in NODES:
        twins.heartbeat(node, "paused")
    assert twins.store.unrunnable() == {}
    for node in NODES:
        twins.heartbeat(node, "retiring")
    assert twins.store.unrunnable().keys() == {""}


def test_a_size_class_begins_at_its_first_number_of_bytes(twins):
    for key, nbytes in (("d0", 131_071), ("d1", 131_072)):
        twins.put("alice", 1, key, Data(nbytes, place="a@one"))
    twins.submit("alice", 2, 1, [a_task("k00", "d0"), a_task("k01", "d1", order=1)])
    assert [entry[16] for entry in snapshot(twins.store)["homes"]["a@one"]] == ["0", "1"]


def test_a_blob_is_shed_however_many_nodes_are_to_have_copies(twins):
    twins.put("alice", 1, "d0", Data(9, place="a@one"))
    twins.gain(REDIS, [("d0", "0")])
    twins.want_copies(["d0"], 2, ())
    twins.shed(REDIS, [("d0", "0")])
    assert twins.model.records["d0"].places == {"a@one"}


def test_a_node_that_is_gone_gains_no_copies(twins):
    twins.put("alice", 1, "d0", Data(9, place="a@one"))
    twins.leave_node("b@two")
    twins.gain("b@two", [("d0", "0")])
    assert twins.model.records["d0"].places == {"a@one"}


def test_no_copies_are_wanted_of_what_is_only_lineage(twins):
    twins.submit("alice", 1, 1, [a_task("k00", hold=False), a_task("k01", "k00")])
    run(twins, "k00")
    run(twins, "k01")
    twins.want_copies(["k00", "k01"], 2, ("a@one",))
    assert read(twins.store).copies == {"k01"}


def test_as_much_is_given_as_the_model_says(twins):
    inputs = [f"x{i}" for i in range(MOST_GIVEN // LARGEST_GIVEN + 1)]
    for i, key in enumerate(inputs, 1):
        twins.put("alice", i, key, Data(LARGEST_GIVEN, "bytes", bytes(LARGEST_GIVEN)))
    twins.submit("alice", 99, 1, [a_task("k00", *inputs)])
    assert read(twins.store).records["k00"].deps == inputs[-1:]


def test_given_inputs_come_in_their_places_among_the_others(twins):
    twins.put("alice", 1, "d0", Data(3, "int", b"a\nb"))
    twins.put("alice", 2, "d1", Data(3, "int", MEDIUM))
    twins.put("alice", 3, "d2", Data(0, "int", b""))
    twins.submit("bob", 4, 1, [a_task("k00", "d0", "d1", "d2")])
    twins.release("alice", ["d0", "d1", "d2"])
    twins.take("a@one|1.1", 1)
    taken = twins.store.step("a@one|1.1", SLOTS["a@one|1.1"], mode="r", want=1).taken
    assert [(i.key, i.kind, i.data) for i in taken[0].inputs] == [
        ("d0", "v", b"a\nb"),
        ("d1", "v", MEDIUM),
        ("d2", "v", b""),
    ]


def test_what_a_name_holds_changes_hands_without_a_moment_in_which_nobody_holds_it(twins):
    twins.submit("alice", 1, 1, [a_task("k00"), a_task("k01", order=1), a_task("k02", order=2)])
    run(twins, "k00")
    fail(twins, "k01")
    twins.take_over("bob", "alice", 7)
    assert read(twins.store).held == {"bob": {"k00", "k01", "k02"}}
    run(twins, "k02")


def test_what_an_heir_holds_by_itself_keeps_its_number(twins):
    twins.put("alice", 1, "d0", Data(1, "int", b"1"))
    twins.hold("bob", 2, ["d0"])
    twins.take_over("bob", "alice", 7)
    assert read(twins.store).records["d0"].holders == {"bob": 2}


def test_a_client_that_lost_its_name_can_neither_submit_nor_renew_nor_release_all(link):
    store = new_store(link, ENOUGH)
    store.claim_name("alice", "a name", 60)
    store.put("alice", 1, [scripts.NewData("d0", 1, "int", "v", b"1")])
    assert store.claim_name("heir", "a name", 60) == ["alice"]
    for refused in (
        lambda: store.renew_client("alice"),
        lambda: store.hold("alice", 2, ["d0"]),
        lambda: store.put("alice", 2, [scripts.NewData("d1", 1, "int", "v", b"1")]),
        lambda: store.submit("alice", 2, [as_new(a_task("k00"))], FUNCTIONS.items()),
    ):
        with pytest.raises(UnknownClientError):
            refused()
    for fence in ("", None):
        assert store.expire_client("alice", fence=fence or "")[0] == 0
    assert read(store).records.keys() == {"d0"}
    assert store.inherit("heir", 3) == (0, [])
    assert read(store).records["d0"].holders == {"heir": 3}
    assert audit(store) == []


def test_an_heir_that_dies_before_it_inherited_leaves_all_to_the_next_one_or_to_nobody(link):
    store = new_store(link, ENOUGH)
    store.claim_name("first", "a name", 60)
    store.put("first", 1, [scripts.NewData(key, 1, "int", "v", b"1") for key in ("d0", "d1")])
    store.claim_name("second", "a name", 60)
    store.inherit("second", 2, most=1)
    assert sorted(store.claim_name("third", "a name", 60)) == ["first", "second"]
    assert audit(store) == []
    store.expire_client("third")  # it ends before it inherited: so do they
    assert sorted(store.overdue("clients")) == ["first", "second"]
    for client in ("first", "second"):
        store.expire_client(client)
    assert (read(store).records, read(store).names, read(store).heirs) == ({}, {}, {})
    assert audit(store) == []


def test_a_durable_result_forgets_how_it_was_made(twins):
    twins.submit("alice", 1, 1, [a_task("k00", hold=False), a_task("k01", "k00", order=1)])
    twins.make_durable(["k01"], times=2)
    run(twins, "k00")
    assert read(twins.store).records.keys() == {"k00", "k01"}
    run(twins, "k01")
    assert read(twins.store).records.keys() == {"k01"}
    assert read(twins.store).functions == {}


def test_a_result_on_a_node_is_durable_when_its_copy_is_there_and_not_before(twins):
    twins.submit("alice", 1, 1, [a_task("k00", hold=False), a_task("k01", "k00", order=1)])
    twins.make_durable(["k01"])
    run(twins, "k00")
    twins.take("a@one|1.1", 1)
    twins.step("a@one|1.1", [Done("k01", twins.claims[-1][2], Data(9, place="a@one"))])
    token = read(twins.store).records["k01"].token
    assert read(twins.store).undurable == {"k01"}
    assert read(twins.store).records.keys() == {"k00", "k01"}
    twins.gain(DURABLE, [("k01", token)], times=2)
    assert read(twins.store).undurable == set()
    assert read(twins.store).records.keys() == {"k01"}
    twins.leave_node("a@one")
    assert read(twins.store).records["k01"].places == [DURABLE]


def test_a_durable_result_stays_while_others_need_it_as_their_lineage(twins):
    twins.submit("alice", 1, 1, [a_task("k00", hold=False), a_task("k01", "k00", order=1)])
    twins.make_durable(["k00"])
    run(twins, "k00")
    twins.take("a@one|1.1", 1)
    twins.step("a@one|1.1", [Done("k01", twins.claims[-1][2], Data(9, place="a@one"))])
    assert read(twins.store).records["k00"].state == MEMORY
    twins.leave_node("a@one")  # with the result: it is made again from the durable one
    twins.heartbeat("a@one", "running")
    run(twins, "k01")
    twins.release("alice", ["k01"])
    assert read(twins.store).records == {}


def test_a_durable_result_whose_copy_is_lost_says_why_and_so_does_what_depends_on_it(link):
    store = new_store(link, ENOUGH)
    store.put("alice", 1, [scripts.NewData("d0", 9, "bytes", "n", "7", place="a@one")])
    store.make_durable(["d0"])
    store.gain(DURABLE, [("d0", "7")])
    store.submit("alice", 2, [as_new(a_task("k00", "d0"))], FUNCTIONS.items())
    take_notices(store)
    store.lose("a@one", [("d0", "7")])
    store.lose(DURABLE, [("d0", "7")])
    told = {key: (code, content) for _, key, _, code, content in take_notices(store)}
    assert told.keys() == {"d0", "k00"}
    for code, content in told.values():
        assert code == "l"
        assert content.startswith(b"d0\nits durable copy is gone")
    store.hold("bob", 1, ["k00", "d0"])
    assert {content.partition(b"\n")[0] for *_, content in take_notices(store)} == {b"d0"}
    assert store.debris() == ["7"]


def test_a_durable_copy_is_not_shed(twins):
    twins.put("alice", 1, "d0", Data(9, place="a@one"))
    twins.make_durable(["d0"])
    twins.gain(REDIS, [("d0", "0")])
    twins.shed(REDIS, [("d0", "0")])
    twins.shed("a@one", [("d0", "0")])
    assert twins.model.records["d0"].places == {REDIS}


def test_a_task_that_runs_for_nobody_is_freed_by_the_call_that_ends_it(twins):
    twins.submit("alice", 1, 1, [a_task("k00"), a_task("k01", order=1), a_task("k02", "k01", order=2)])
    twins.entrust(["k00", "k01", "k02"], times=2)
    twins.release("alice", ["k00", "k01", "k02"])
    run(twins, "k00")
    assert read(twins.store).records.keys() == {"k01", "k02"}
    fail(twins, "k01")
    assert read(twins.store).records == {}


def test_a_dataset_that_is_overridden_holds_what_it_has_and_lets_go_of_what_it_had(twins):
    for key in SCATTERED:
        twins.put("alice", 1, key, Data(1, "int", b"1"))
    twins.publish("one", ["d0"], override=False, times=2)
    twins.publish("one", ["d1"], override=False)
    twins.release("alice", SCATTERED)
    assert read(twins.store).records.keys() == {"d0"}
    twins.put("alice", 2, "d1", Data(1, "int", b"1"))
    twins.publish("one", ["d1"], override=True)
    twins.release("alice", ["d1"])
    assert read(twins.store).records.keys() == {"d1"}


def test_a_publication_that_dies_halfway_holds_nothing_once_its_lease_is_over(link):
    store = new_store(link, ENOUGH)
    store.put("alice", 1, [scripts.NewData("d0", 1, "int", "v", b"1")])
    store.renew_client("#half", join=True)
    store.hold("#half", 1, ["d0"])
    assert audit(store) == []
    store.now_ms = NOW_MS + 120_000
    assert "#half" in store.overdue("clients")
    store.expire_client("#half")
    with pytest.raises(UnknownClientError):
        store.publish("one", "#half", b"")
    assert audit(store) == []


def test_a_dataset_hears_nothing_of_what_it_holds(twins):
    twins.submit("alice", 1, 1, [a_task("k00"), a_task("k01", order=1)])
    twins.publish("one", ["k00", "k01"], override=False)
    run(twins, "k00")
    fail(twins, "k01")


def test_a_durable_file_that_is_lost_is_written_again_under_its_name_and_not_deleted(twins):
    twins.put("alice", 1, "d0", Data(9, place="a@one"))
    twins.make_durable(["d0"])
    twins.gain(DURABLE, [("d0", "0")])
    twins.store.lose(DURABLE, [("d0", "0")])
    assert twins.store.debris() == []
    assert read(twins.store).undurable == {"d0"}
    twins.model.lose(DURABLE, [("d0", "0")])
    twins.compare()


def test_what_is_not_wanted_any_more_is_not_made_durable(twins):
    twins.submit("alice", 1, 1, [a_task("k00"), a_task("k01", "k00", order=1)])
    twins.make_durable(["k00"])
    twins.take("a@one|1.1", 1)
    twins.step("a@one|1.1", [Done("k00", twins.claims[-1][2], Data(9, place="a@one"))])
    run(twins, "k01")
    assert read(twins.store).undurable == {"k00"}
    twins.release("alice", ["k00"])
    assert read(twins.store).records["k00"].state == "released"
    assert read(twins.store).undurable == set()
