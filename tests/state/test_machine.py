"""One model, two machines: random events go to the model and to the scripts, which must agree after each.

A seed that fails becomes a test at the end of this file.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
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
from celery_mem.errors import UnknownDependencyError, UnknownFunctionError
from celery_mem.state import store as scripts
from celery_mem.state.audit import audit, read
from celery_mem.state.keys import TASK
from celery_mem.state.link import Link
from celery_mem.state.model import ERRED, PROCESSING, READY, Back, Data, Done, Failed, Model, Task
from celery_mem.state.store import Store
from tests.conftest import NOW_MS, delete_namespace, fake_link

EFFORT = int(os.environ.get("CELERY_MEM_TEST_EFFORT", "1"))  # 1 takes half a minute; more finds more
ENOUGH = 100_000  # a budget that no call here spends
CLIENTS = ("alice", "bob")
SLOTS = ("s1", "s2", "s3")
NODE = "node"
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
        notice_limit=16,
        allowed_failures=1,
    )
    store = Store.connect(config, link)
    store.now_ms = NOW_MS
    for client in CLIENTS:
        store.renew_client(client, join=True)
    return store


class Twins:
    """A model and a store that get the same events, and must give the same answers.

    Args:
        budget: visits after which a script leaves work for the sweep, which then goes on to the end.
    """

    def __init__(self, link: Link, budget: int = ENOUGH) -> None:
        self.store = new_store(link, budget)
        self.model = Model()
        self.agree = True
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
        kind, value, before = self.as_stored(key, data)
        for _ in range(times):
            self.model.put(client, epoch, key, data)
            new = scripts.NewData(key, data.nbytes, data.type, kind, value, data.contains)
            self.store.put(client, epoch, [new], before=before)
            self.compare()

    def hold(self, client: str, epoch: int, keys: list[str], times: int = 1) -> None:
        for _ in range(times):
            assert self.store.hold(client, epoch, keys)[0] == self.model.hold(client, epoch, keys)
            self.compare()

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

    def retry(self, keys: list[str], times: int = 1) -> None:
        for _ in range(times):
            self.store.retry(keys)
            self.model.retry(keys)
            self.compare()

    def expire_client(self, client: str) -> None:
        while self.store.expire_client(client, most=3)[0]:
            self.drain()
        self.model.expire_client(client)
        self.compare(but_notices_of=client)
        self.store.renew_client(client, join=True)

    def report(
        self,
        slot: str,
        done: list[Done] | None = None,
        failed: list[Failed] | None = None,
        back: list[Back] | None = None,
        times: int = 1,
    ) -> None:
        """A step that takes nothing."""
        done, failed, back = done or [], failed or [], back or []
        new, before = [], []
        for d in done:
            kind, value, blob = self.as_stored(d.key, d.data)
            nbytes, type_name, _, contains = d.data or Data(9)
            new.append(scripts.Done(d.key, str(d.attempt), nbytes, type_name, kind, value, contains))
            before += blob
        for _ in range(times):
            expected = self.model.step(slot, done, failed, back)
            found = self.store.step(
                slot,
                NODE,
                want=0,
                mode=self.mode(slot),
                done=new,
                failed=[scripts.Failed(f.key, str(f.attempt), f.error, f.retryable) for f in failed],
                back=[(b.key, str(b.attempt)) for b in back],
                before=before,
            )
            assert found.stale == expected.stale
            assert found.taken == []
            self.compare()

    def take(self, slot: str, want: int, mode: str = "") -> list[str]:
        """A step that reports nothing; returns the keys taken, with mode r also those owned before."""
        owned = {r.key for r in self.model.in_state(PROCESSING) if r.owner == slot}
        expected = self.model.step(slot, want=want, mode=mode)
        found = self.store.step(slot, NODE, want=want, mode=self.mode(slot) + mode)
        taken = {t.key: int(t.attempt) for t in found.taken}
        assert len(taken) == len(found.taken)
        if "r" in mode:
            assert taken.keys() == {c.key for c in expected.claimed}
        else:
            assert list(taken) == [c.key for c in expected.claimed]
        earlier = {attempt for _, _, attempt in self.claims}
        for t in found.taken:
            record = self.model.records[t.key]
            assert (t.function, t.payload, t.payload_blob) == (record.function, record.payload, "")
            assert [i.key for i in t.inputs] == list(record.deps)
            for i in t.inputs:
                data = self.model.records[i.key].data
                assert data is not None
                assert (i.kind == "b") if data.value is None else ((i.kind, i.data) == ("v", data.value))
            if t.key in owned:
                assert taken[t.key] == record.attempt
            else:
                assert not earlier or taken[t.key] > max(earlier)
                record.attempt = taken[t.key]  # numbers may be left out
                self.claims.append((slot, t.key, record.attempt))
        if want > 0 and not taken and slot in self.model.slots:
            self.idle.add(slot)
        self.model.last_attempt = max([self.model.last_attempt, *taken.values()])
        self.compare()
        return list(taken)

    def abandon_slot(self, slot: str) -> None:
        self.idle.discard(slot)
        keys, killed, _ = self.store.abandon_slot(slot, NODE, b"killed")
        expected = self.model.abandon_slot(slot, self.store.settings.allowed_failures, b"killed")
        assert (sorted(keys), sorted(killed)) == tuple(map(sorted, expected))
        self.compare()

    def mode(self, slot: str) -> str:
        """The letter that a slot must say if it was idle; it is so no longer."""
        was_idle = slot in self.idle
        self.idle.discard(slot)
        return "i" if was_idle else ""

    def as_stored(self, key: str, data: Data | None) -> tuple[str, bytes | str, list[scripts.Command]]:
        """Kind, value or blob token, commands that write the blob; without data the blob has vanished."""
        if data is not None and data.value is not None:
            return "v", data.value, []
        token = next(self.tokens)
        blob = self.store.keys.blob(token, key)
        write = [("HSET", blob, "h", b"head"), ("PEXPIRE", blob, 100_000)]
        return "b", token, write if data is not None else []

    # --- comparing ------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Audit what a spent budget left, then let the sweep end it."""
        assert audit(self.store) == []
        drain(self.store)

    def compare(self, but_notices_of: str = "") -> None:
        """Check that both are in the same state, told the same notices, and break no rule."""
        self.agree = False
        self.drain()
        found = snapshot(self.store)
        self.adopt_blames(found["records"])
        expected = self.model.snapshot()
        del expected["last_attempt"]
        assert found == expected
        self.compare_notices(found["records"], but_notices_of)
        assert audit(self.store) == []
        self.model.check()
        self.agree = True

    def adopt_blames(self, found: dict[str, dict[str, Any]]) -> None:
        """Where several inputs erred in one call, any may be blamed: the model takes the scripts' choice."""
        for key, record in self.model.records.items():  # inputs come before what depends on them
            blame = found.get(key, {}).get("blame")
            if record.state == ERRED and record.blame != blame and blame in self.model.blames(key):
                record.blame = blame

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
        for client in CLIENTS:
            self.expire_client(client)
        assert self.model.records == {}
        delete_namespace(self.store)


def as_new(t: Task) -> scripts.NewTask:
    """The task in the form that the store takes."""
    return scripts.NewTask(
        t.key, t.function or "", t.payload, "", t.deps, t.priority, t.order, t.retries, t.hold, t.epoch
    )


def drain(store: Store) -> None:
    for _ in range(1000):
        if store.sweep("", most=3)[0] == 0:
            return
    raise AssertionError("the sweep does not come to an end")


def _distinct(items: Iterable[Any]) -> list[Any]:
    """`items` without repeats of what came just before: to be told twice does no harm."""
    return [item for item, _ in itertools.groupby(items)]


def snapshot(store: Store) -> dict[str, Any]:
    """The state of a namespace in the form of `Model.snapshot`."""
    c = read(store)
    names = [TASK[name] for name in ("payload", "value", "error", "nbytes", "type", "retries", "deaths")]
    rows = sorted(c.records.items())
    asked = [("HMGET", store.keys.of("task", key), *names) for key, _ in rows]
    bulk = store.link.batch(asked) if rows else []
    records = {}
    for (key, row), reply in zip(rows, bulk, strict=True):
        payload, value, error, nbytes, type_name, retries, deaths = reply
        records[key] = {
            "state": row.state,
            "function": row.function or None,
            "payload": payload or b"",
            "deps": row.deps,
            "priority": row.priority,
            "rank": row.rank,
            "retries": int(retries or 0),
            "deaths": int(deaths or 0),
            "waiting": row.waiting,
            "needed": row.needed,
            "attempt": int(row.attempt or 0),
            "owner": row.owner if row.state == PROCESSING else None,
            "nbytes": None if nbytes is None else int(nbytes),
            "type": None if type_name is None else type_name.decode(),
            "value": value,
            "blob": bool(row.blob),
            "contains": row.contains,
            "error": error,
            "blame": row.blame or None,
        }
    return {
        "records": records,
        "holders": {key: {h: int(e) for h, e in row.holders.items()} for key, row in rows if row.holders},
        "dependents": {key: sorted(d) for key, d in sorted(c.dependents.items())},
        "ready": [entry[16:] for entry in c.ready],
        "clients": {client: sorted(keys) for client, keys in c.held.items()},
        "owned": {slot: {k: int(a) for k, a in keys.items()} for slot, keys in c.owned.items()},
        "functions": c.functions,
    }


def take_notices(store: Store) -> list[tuple[str, str, int, str, bytes]]:
    """Read and remove all notices: client, key, epoch, code, bytes."""
    found = []
    for client in CLIENTS:
        stream = store.keys.of("notices", client)
        for _, fields in store.link.call("XRANGE", stream, "-", "+"):
            for key, text in zip(fields[::2], fields[1::2], strict=True):
                epoch, _, rest = text.partition(b" ")
                found.append((client, key.decode(), int(epoch), rest[:1].decode(), rest[1:]))
        store.link.call("UNLINK", stream)
    return found


# --- random events ------------------------------------------------------------------------------------------

DATA = st.builds(
    Data,
    nbytes=st.integers(0, 9),
    type=st.sampled_from(["int", "ndarray"]),
    value=st.sampled_from([b"", b"abc", None]),
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
A_SLOT = st.sampled_from(SLOTS)
SOME_KEYS = st.lists(st.sampled_from(KEYS), min_size=1, max_size=4)
TIMES = st.sampled_from([1, 1, 1, 2])
OUTCOMES = st.lists(
    st.sampled_from(["done", "done", "done", "failed", "back", "later"]),
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
        match data.draw(st.sampled_from(["hold", "release", "release", "cancel", "force", "retry", "retry"])):
            case "hold":
                self.twins.hold(client, self.next_epoch(), keys, times)
            case "release":
                self.twins.release(client, keys, times)
            case "cancel":
                self.twins.cancel(client, keys, times=times)
            case "force":
                self.twins.cancel(client, keys, force=True, times=times)
            case "retry":
                self.twins.retry(keys, times)

    @rule(data=st.data(), client=A_CLIENT, times=TIMES)
    def put(self, data: st.DataObject, client: str, times: int) -> None:
        key = data.draw(st.sampled_from(SCATTERED * 3 + self.known_keys()), "key")
        self.twins.put(client, self.next_epoch(), key, data.draw(data_of(key), "data"), times)

    def known_keys(self) -> list[str]:
        """Keys with records twice, all others once."""
        return [*self.twins.model.records, *KEYS]

    @rule(slot=A_SLOT, want=st.sampled_from([1, 2, 50]), mode=st.sampled_from(["", "", "r", "l", "q"]))
    def take(self, slot: str, want: int, mode: str) -> None:
        if mode in {"l", "q"} and any(r.owner == slot for r in self.twins.model.in_state(PROCESSING)):
            mode = ""  # a slot leaves empty-handed
        self.twins.take(slot, want, mode)

    @precondition(lambda self: self.twins.model.in_state(READY, PROCESSING))
    @rule(data=st.data(), slot=A_SLOT)
    def work(self, data: st.DataObject, slot: str) -> None:
        """A slot takes what it can and does most of it."""
        self.twins.take(slot, 50)
        done, failed = [], []
        for r in self.twins.model.in_state(PROCESSING):
            outcome = (
                data.draw(st.sampled_from(["done", "done", "failed", "later"])) if r.owner == slot else ""
            )
            if outcome == "done":
                done.append(Done(r.key, r.attempt, Data(1, "int", b"1")))
            elif outcome == "failed":
                failed.append(Failed(r.key, r.attempt, f"error {r.attempt}".encode(), retryable=False))
        self.twins.report(slot, done, failed)

    @precondition(lambda self: self.twins.model.in_state(READY, PROCESSING))
    @rule(data=st.data(), slot=A_SLOT)
    def work_more(self, data: st.DataObject, slot: str) -> None:
        self.work(data, slot)  # twice as often as other events

    @precondition(lambda self: self.twins.claims)
    @rule(data=st.data(), times=TIMES)
    def report(self, data: st.DataObject, times: int) -> None:
        """One slot reports attempts that are current, over, or reported before."""
        slot = data.draw(st.sampled_from(sorted({slot for slot, _, _ in self.twins.claims})), "slot")
        own = [(key, attempt) for s, key, attempt in self.twins.claims if s == slot]
        done, failed, back = [], [], []
        some = st.lists(st.sampled_from(own[-8:]), min_size=1, max_size=4)
        for key, attempt in data.draw(some, "attempts"):
            match data.draw(st.sampled_from(["done", "done", "vanished", "failed", "back"])):
                case "done":
                    done.append(Done(key, attempt, data.draw(data_of(key))))
                case "vanished":
                    done.append(Done(key, attempt, None))
                case "failed":
                    failed.append(Failed(key, attempt, f"error {attempt}".encode(), data.draw(st.booleans())))
                case "back":
                    back.append(Back(key, attempt))
        self.twins.report(slot, done, failed, back, times)

    @precondition(lambda self: len(self.twins.model.in_state(PROCESSING)) > 1)
    @rule(slot=A_SLOT)
    def abandon_slot(self, slot: str) -> None:
        self.twins.abandon_slot(slot)

    @precondition(lambda self: len(self.twins.model.records) > 5)
    @rule(client=A_CLIENT)
    def expire_client(self, client: str) -> None:
        self.twins.expire_client(client)

    def teardown(self) -> None:
        if hasattr(self, "twins") and self.twins.agree:
            self.twins.close()


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
        self.store.put(client, self.next_number(), [scripts.NewData(key, 1, "int", "v", b"1")])

    @rule(client=A_CLIENT, keys=SOME_KEYS)
    def hold(self, client: str, keys: list[str]) -> None:
        self.store.hold(client, self.next_number(), keys)

    @rule(client=A_CLIENT, keys=SOME_KEYS)
    def release(self, client: str, keys: list[str]) -> None:
        self.store.release(client, keys)

    @rule(client=A_CLIENT, keys=SOME_KEYS, force=st.booleans())
    def cancel(self, client: str, keys: list[str], force: bool) -> None:
        self.store.cancel(client, keys, force=force)

    @rule(keys=SOME_KEYS)
    def retry(self, keys: list[str]) -> None:
        self.store.retry(keys)

    @rule(slot=A_SLOT, want=st.sampled_from([0, 1, 50]), outcomes=OUTCOMES)
    def work(self, slot: str, want: int, outcomes: list[str]) -> None:
        done, failed, back = [], [], []
        owned = sorted(read(self.store).owned.get(slot, {}).items())
        for (key, attempt), outcome in zip(owned, outcomes, strict=False):
            match outcome:
                case "done":
                    done.append(scripts.Done(key, attempt, 1, "int", "v", b"1"))
                case "failed":
                    failed.append(scripts.Failed(key, attempt, b"error"))
                case "back":
                    back.append((key, attempt))
        self.store.step(slot, NODE, mode="i", want=want, done=done, failed=failed, back=back)

    @rule(slot=A_SLOT, outcomes=OUTCOMES)
    def work_more(self, slot: str, outcomes: list[str]) -> None:
        self.work(slot, 50, outcomes)  # twice as often as other events

    @rule(slot=A_SLOT)
    def abandon_slot(self, slot: str) -> None:
        self.store.abandon_slot(slot, NODE, b"killed")

    @rule(most=st.sampled_from([1, 3, 50]))
    def sweep(self, most: int) -> None:
        self.store.sweep("", most=most)

    def teardown(self) -> None:
        if hasattr(self, "store") and self.is_sound:
            for client in CLIENTS:
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
def test_scripts_on_a_simulated_redis_agree_with_the_model():
    run_machine(Machine, fake_link(), [ENOUGH, 2], examples=12)


@LONG
def test_every_rule_holds_while_work_is_left_for_the_sweep(link):
    run_machine(LazyMachine, link, [1, 2, 4], examples=60, steps=40)


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
    assert twins.take("s1", 1) == [key]
    twins.report("s1", failed=[Failed(key, twins.claims[-1][2], b"error", retryable=False)])


def run(twins: Twins, key: str) -> None:
    """Let the next ready task, which must be `key`, succeed."""
    assert twins.take("s1", 1) == [key]
    twins.report("s1", done=[Done(key, twins.claims[-1][2], Data(1, "int", b"1"))])


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
    twins.take("s1", 1)
    twins.report("s1", done=[Done("k00", 1, Data(9))], times=2)


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
    twins.retry(["k02"])
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
    twins.take("s1", 1)
    twins.put("bob", 2, "k00", Data(1, "int", b"1"))
    twins.report("s1", done=[Done("k00", 1, Data(9))])


def test_a_second_result_of_one_attempt_vanishes(twins):
    twins.submit("alice", 1, 1, [a_task("k00")])
    twins.take("s1", 1)
    twins.report("s1", done=[Done("k00", 1, Data(1, "int", b"1"))])
    twins.report("s1", done=[Done("k00", 1, Data(9))])


def test_force_goes_on_to_dependents_of_a_key_that_a_result_keeps(twins):
    twins.put("alice", 1, "d0", Data(1, "int", b"1"))
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
