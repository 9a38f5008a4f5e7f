"""Each rule of the audit sees what was broken on purpose, by hand, and names it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from celery_mem.state.audit import RULES, Violation, audit
from celery_mem.state.keys import CORE, FIXED, FLAGS, META, PREFIXES, RECIPE, TASK
from celery_mem.state.records import read_core
from celery_mem.state.store import Done, Failed, NewData, NewTask, Store

Command = tuple[object, ...]

NODE = "a@one"
ON_NODE = '{"workers":["a@one"]}'
RANK = "0" * 16


@pytest.fixture
def graph(make_store: Callable[..., Store]) -> Store:
    """A sound namespace with tasks in all states: what its tests break is not audited at their end.

    Keys: `gone` is lost, `input` was freed when `made` was done, `large` has a blob, `copied` has a copy on
    the node and is to have more; `outer` contains `inner`; `bad` failed and took `victim` down; `running`
    runs, and `waits` for it; three are ready: `ready` for any node, `near` for that of `copied`, and `picky`
    under a constraint.
    """
    store = make_store()
    store.heartbeat(NODE, slots=2)
    store.renew_client("alice", join=True)
    data = store.keys.blob("token", "large")
    call = store.keys.blob("call", "ready")
    store.put("alice", 1, [NewData("gone", 3, "bytes", "v", b"abc"), NewData("inner", 1, "bytes", "v", b"i")])
    store.put("alice", 2, [NewData("outer", 1, "bytes", "v", b"o", ["inner"])])
    store.put("alice", 3, [NewData("large", 9, "bytes", "b", "token")], before=[blob(data)])
    store.put("alice", 3, [NewData("copied", 9, "bytes", "n", "version", place=NODE)])
    store.want_copies(["copied"], 2)
    tasks = [
        NewTask("input", "f", b"call", deps=["gone"], order=1, hold=False),
        NewTask("made", "f", b"call", deps=["input"], order=2),
        NewTask("bad", "f", b"call", order=3),
        NewTask("victim", "f", b"call", deps=["bad"], order=4),
        NewTask("running", "f", b"call", order=5, hold=False),
        NewTask("waits", "f", b"call", deps=["running"], order=6),
    ]
    store.submit("alice", 4, tasks, [("f", b"code")])
    taken = store.step("slot", NODE, ticket="1", want=3).taken
    assert [t.key for t in taken] == ["input", "bad", "running"]
    store.step(
        "slot",
        NODE,
        want=0,
        done=[Done("input", taken[0].attempt, 1, "bytes", "v", b"1")],
        failed=[Failed("bad", taken[1].attempt, b"error", may_retry=False)],
    )
    (made,) = store.step("slot", NODE).taken
    store.step("slot", NODE, want=0, done=[Done("made", made.attempt, 1, "bytes", "v", b"2")])
    store.release("alice", ["gone", "inner"])
    tasks = [
        NewTask("ready", "g", b"", "call", priority=1),
        NewTask("near", "g", b"call", deps=["copied"], priority=1),
        NewTask("picky", "g", b"call", priority=1, constraint=ON_NODE),
    ]
    store.submit("alice", 5, tasks, [("g", b"code")], before=[blob(call)])
    assert audit(store) == []
    return store


def blob(key: str) -> Command:
    return ("HSET", key, "h", b"head")


def field(key: str, name: str, value: object = None) -> Command:
    """Set, or without value remove, a field of a record, or a part of one that holds several."""
    if name in {*CORE, *RECIPE}:
        return ("PART", f"t:{key}", name, "" if value is None else value)
    return ("HDEL", f"t:{key}", TASK[name]) if value is None else ("HSET", f"t:{key}", TASK[name], value)


def set_part(store: Store, record: str, name: str, value: object) -> None:
    whole, parts = ("core", CORE) if name in CORE else ("recipe", RECIPE)
    raw = store.link.call("HGET", record, TASK[whole]).decode()
    found = dict(zip(parts, re.split("[ \n]", raw, maxsplit=len(parts) - 1), strict=True))
    *words, last = (found | {name: value}).values()
    text = " ".join(map(str, words)) + ("\n" if whole == "core" else " ") + str(last)
    store.link.call("HSET", record, TASK[whole], text)


def spoil(store: Store, *commands: Command) -> set[tuple[str, str]]:
    """Carry out commands, whose keys are relative to the namespace; return rule and key of each violation."""
    for name, key, *rest in commands:
        if name == "PART":
            set_part(store, store.keys.prefix + key, *rest)
        else:
            store.link.call(name, f"{store.keys.prefix}{key}", *rest)
    return {(v.rule, v.key) for v in audit(store)}


BREAKS: list[tuple[str, str, list[Command]]] = [
    ("unwanted data", "made", [field("made", "holders", "")]),
    ("unwanted work", "ready", [field("ready", "holders", "")]),
    ("unwanted work", "waits", [field("waits", "holders", "")]),
    ("orphan record", "victim", [field("victim", "holders", "")]),
    ("not raised", "input", [field("input", "holders", "alice 1")]),
    ("left over", "made", [("DEL", "c:alice")]),
    ("left over", "f", [("DEL", "c:alice")]),
    ("left over", "copied", [("DEL", "c:alice")]),
    ("left over", ON_NODE, [("DEL", "c:alice")]),
    ("state", "made", [field("made", "state", "finished")]),
    ("state", "made", [("HSET", "t:made", "zz", 1)]),
    ("state", "made", [field("made", "core", "memory 0")]),
    ("state", "made", [field("made", "result", "many bytes")]),
    ("state", "input", [field("input", "state", "lost")]),
    ("data", "made", [field("made", "value")]),
    ("data", "made", [field("made", "result")]),
    ("data", "made", [field("made", "replicas", f"token\nslot\n1\n{NODE}")]),
    ("data", "bad", [field("bad", "value", b"1")]),
    ("data", "large", [field("large", "replicas")]),
    ("data", "input", [field("input", "replicas", f"token\nslot\n1\n{NODE}")]),
    ("payload", "made", [field("made", "payload")]),
    ("payload", "made", [field("made", "payload_blob", "call")]),
    ("flags", "copied", [field("copied", "flags", FLAGS["replicas"])]),
    ("flags", "large", [field("large", "flags")]),
    ("flags", "made", [field("made", "flags", FLAGS["prefer"])]),
    ("flags", "outer", [field("outer", "flags")]),
    ("flags", "picky", [field("picky", "flags")]),
    ("flags", "ready", [field("ready", "flags")]),
    ("flags", "near", [field("near", "flags")]),
    ("replicas", "copied", [field("copied", "replicas", f"\n\n9\n{NODE}")]),
    ("replicas", "copied", [field("copied", "replicas", f"version\n\n8\n{NODE}")]),
    ("replicas", "copied", [field("copied", "replicas", "version\n\n9")]),
    ("replicas", "copied", [field("copied", "replicas", f"version\n\n9\n{NODE}\n{NODE}")]),
    ("replicas", "copied", [field("copied", "replicas", f"version\n\n9\n{NODE}\nghost")]),
    ("replicas", "copied", [("ZREM", "nodes", NODE)]),
    ("copies index", "copied", [("SREM", "copies", "copied")]),
    ("copies index", "copied", [field("copied", "copies")]),
    ("copies index", "large", [field("large", "copies_on", NODE)]),
    ("copies index", "ghost", [("SADD", "copies", "ghost")]),
    ("blame", "bad", [field("bad", "blame")]),
    ("blame", "bad", [field("bad", "error")]),
    ("blame", "victim", [field("victim", "error", b"x")]),
    ("blame", "made", [field("made", "blame", "made")]),
    ("missing dependency", "made", [("DEL", "t:input")]),
    ("waits for error", "waits", [field("running", "state", "erred")]),
    ("waiting count", "waits", [field("waits", "waiting", 2)]),
    ("waiting count", "made", [field("made", "waiting", 1)]),
    ("waiting count", "waits", [field("waits", "waiting", 0), field("running", "state", "memory")]),
    ("needed count", "running", [field("running", "needed", 2)]),
    ("needed count", "input", [field("input", "needed", 1)]),
    ("inputs missing", "waits", [field("waits", "state", "ready")]),
    ("function count", "f", [("HSET", "functions", "f", 5)]),
    ("function count", "ghost", [("HSET", "functions", "ghost", 1)]),
    ("function count", "g", [("HDEL", "functions", "g")]),
    ("constraint count", ON_NODE, [("HSET", "constraints", ON_NODE, 2)]),
    ("constraint count", ON_NODE, [("HDEL", "constraints", ON_NODE)]),
    ("constraint count", "{}", [("HSET", "constraints", "{}", 1)]),
    ("constraint count", "{}", [("HSET", "unrunnable", "{}", 1)]),
    ("ready queue", "ready", [("DEL", "ready")]),
    ("ready queue", "made", [("ZADD", "ready", 0, RANK + "made")]),
    ("ready queue", "ready", [field("ready", "priority", 2)]),
    ("ready queue", "ready", [field("ready", "rank", RANK)]),
    ("ready queue", "near", [("DEL", f"ready:{NODE}")]),
    ("ready queue", "near", [field("near", "home")]),
    ("ready queue", "near", [field("near", "home", f"1{NODE}")]),
    ("ready queue", "near", [field("near", "home", "0ghost")]),
    ("ready queue", "near", [field("near", "priority", 2)]),
    ("ready queue", "made", [("ZADD", f"ready:{NODE}", 0, RANK + "0made")]),
    ("ready queue", "picky", [("DEL", f"picky:{ON_NODE}")]),
    ("ready queue", "picky", [field("picky", "constraint")]),
    ("ready queue", "made", [("ZADD", f"picky:{ON_NODE}", 0, RANK + "made")]),
    ("ready queue", "made", [("ZADD", "picky:{}", 0, RANK + "made")]),
    ("node index", "copied", [("SREM", f"nk:{NODE}", "copied")]),
    ("node index", "copied", [field("copied", "replicas", "version\n\n9\n@redis")]),
    ("node index", "large", [("SADD", f"nk:{NODE}", "large")]),
    ("node index", "ghost", [("SADD", f"nk:{NODE}", "ghost")]),
    ("node lease", NODE, [("ZREM", "nodes", NODE)]),
    ("node lease", "ghost", [("HSET", "node:ghost", "slots", 1)]),
    ("node lease", "ghost", [("SADD", "nk:ghost", "copied")]),
    ("node lease", "ghost", [("ZADD", "ready:ghost", 0, RANK + "0near")]),
    ("node lease", "ghost", [("RPUSH", "mail:ghost", "d version")]),
    ("node lease", "ghost", [("ZADD", "tickets:ghost", 0, "1@ghost")]),
    ("slot index", "running", [("DEL", "s:slot")]),
    ("slot index", "running", [("HSET", "s:slot", "running", 99)]),
    ("slot index", "running", [("HSET", "s:other", "running", 3)]),
    ("slot index", "running", [field("running", "owner")]),
    ("slot index", "made", [("HSET", "s:slot", "made", 4)]),
    ("slot lease", "slot", [("ZREM", "slots", "slot")]),
    ("slot lease", "ghost", [("ZADD", "idle", 0, "ghost")]),
    ("slot lease", "ghost", [("LPUSH", "w:ghost", "1")]),
    ("slot lease", "ghost", [("SADD", f"ns:{NODE}", "ghost")]),
    ("attempt", "made", [field("made", "attempt", 99)]),
    ("attempt", "made", [field("made", "attempt", 1)]),
    ("attempt", "running", [("HSET", "meta", META["attempts"], 1)]),
    ("dependents index", "waits", [("DEL", "d:running")]),
    ("dependents index", "ghost", [("HSET", "d:running", "ghost", "")]),
    ("holders index", "made", [("SREM", "c:alice", "made")]),
    ("holders index", "ghost", [("SADD", "c:alice", "ghost")]),
    ("holders index", "made", [field("made", "holders", "alice 1\n@ghost 0")]),
    ("holders index", "inner", [field("outer", "contains")]),
    ("client lease", "alice", [("ZREM", "clients", "alice")]),
    ("client lease", "ghost", [("XADD", "n:ghost", "*", "made", "1 M")]),
    ("client lease", "ghost", [("SADD", "c:ghost", "made")]),
    ("function code", "f", [("DEL", "f:f")]),
    ("function code", "ghost", [("SET", "f:ghost", "code")]),
    ("blob missing", "token:large", [("DEL", "b:token:large")]),
    ("blob missing", "call:ready", [("DEL", "b:call:ready")]),
    ("blob lease", "token:large", [("PEXPIRE", "b:token:large", 100_000)]),
    ("blob lease", "new:made", [("HSET", "b:new:made", "h", "head")]),
    ("durable", "made", [field("made", "flags", FLAGS["durable"])]),
    ("durable", "copied", [field("copied", "flags", FLAGS["replicas"] + FLAGS["copies"] + FLAGS["durable"])]),
    ("durable", "ghost", [("SADD", "undurable", "ghost")]),
    ("durable", "made", [("SADD", "undurable", "made")]),
    ("forgotten", "ready", [field("ready", "flags", FLAGS["forgotten"])]),
    ("forgotten", "ready", [field("ready", "holders", "alice 1\n! 0"), ("SADD", "c:!", "ready")]),
    ("forgotten", "made", [field("made", "flags", "f"), field("made", "holders", "alice 1\n! 0")]),
    ("holders index", "ready", [field("ready", "holders", "alice 1\n! 0")]),
    ("holders index", "made", [("SADD", "c:#token", "made")]),
    ("client lease", "#token", [("SADD", "c:#token", "made")]),
    ("names", "a name", [("HSET", "names", "a name", "ghost")]),
    ("names", "ghost", [("HSET", "heirs", "ghost", "nobody")]),
    ("names", "alice", [("HSET", "heirs", "alice", "alice")]),
    ("datasets", "a set", [("HSET", "datasets", "a set", "alice\ncontent")]),
    ("datasets", "a set", [("HSET", "datasets", "a set", "#t\ncontent"), ("ZADD", "clients", 0, "#t")]),
    ("unknown key", "zzz", [("SET", "zzz", 1)]),
    ("unknown key", "t:made", [("DEL", "t:made"), ("SET", "t:made", 1)]),
    ("unknown key", "zzz:made", [("SET", "zzz:made", 1)]),
]


@pytest.mark.parametrize(("rule", "key", "commands"), BREAKS)
def test_audit_names_what_is_broken(graph, rule, key, commands):
    name = graph.keys.prefix + key if rule == "unknown key" else key

    assert (rule, name) in spoil(graph, *commands)


def test_every_rule_of_the_audit_is_broken_by_a_test():
    assert {rule for rule, _, _ in BREAKS} == set(RULES)


@pytest.mark.parametrize(
    ("rule", "key", "commands"),
    [
        ("unwanted data", "made", [field("made", "holders", "")]),
        ("unwanted work", "ready", [field("ready", "holders", "")]),
        ("orphan record", "victim", [field("victim", "holders", "")]),
        ("not raised", "input", [field("input", "holders", "alice 1")]),
        ("waits for error", "waits", [field("running", "state", "erred")]),
    ],
)
def test_a_key_that_waits_for_the_sweep_is_excused_from_what_the_sweep_enforces(graph, rule, key, commands):
    assert (rule, key) not in spoil(graph, ("SADD", "unsettled", key), *commands)


def test_a_blob_in_flight_is_no_violation(graph):
    assert spoil(graph, ("HSET", "b:new:made", "h", "head"), ("PEXPIRE", "b:new:made", 100_000)) == set()


def test_what_a_lease_that_is_over_names_is_no_violation_as_long_as_it_is_there_to_be_recovered(graph):
    over = [("ZADD", "slots", 0, "slot"), ("ZADD", "nodes", 0, NODE), ("ZADD", "clients", 0, "alice")]
    assert spoil(graph, *over) == set()


def test_audit_sees_only_its_own_namespace(graph, make_store):
    other = make_store()
    other.link.call("SET", other.keys.prefix + "zzz", 1)

    assert audit(graph) == []
    assert audit(other) == [Violation("unknown key", other.keys.prefix + "zzz", "is a string")]


def test_a_namespace_without_clients_is_empty_but_for_its_members(graph):
    graph.step("slot", NODE, want=0, mode="q", back=[("running", attempt_of(graph, "running"))])
    while graph.expire_client("alice")[0]:
        pass
    assert graph.leave_node(NODE).is_over
    assert graph.now_ms is not None
    graph.now_ms += int(graph.settings.ticket_lease * 1000) + 1
    assert graph.call_tickets() == []  # those that nobody took are given up

    assert audit(graph) == []
    prefix = graph.keys.prefix.encode()
    assert set(graph.link.call("KEYS", graph.keys.prefix + "*")) == {prefix + b"meta", prefix + b"counts"}


def test_a_violation_tells_the_rule_in_words(graph):
    graph.link.call("SREM", graph.keys.of("held", "alice"), "made")

    (violation,) = audit(graph)
    assert str(violation) == (
        "holders index: 'made' is held by alice only by its record "
        "(the holders of a record and the keys of a holder say the same)"
    )


def test_every_kind_of_key_has_a_type():
    from celery_mem.state.audit import TYPES

    assert TYPES.keys() == FIXED.keys() | PREFIXES.keys()


def attempt_of(store: Store, key: str) -> str:
    return read_core(store.link.call("HGET", store.keys.of("task", key), TASK["core"])).attempt


def test_a_task_without_the_record_of_an_input_harms_no_other_task_of_its_call(graph):
    store, records = graph, graph.keys.prefix + "t:"
    (taken,) = store.step("slot", NODE, want=1).taken  # on the node itself: `near`, whose input is `copied`
    tasks = [NewTask("lone", "f", b"call", deps=["running"]), NewTask("sound", "f", b"call", priority=9)]
    store.submit("alice", 6, tasks, [("f", b"code")])
    store.link.call("DEL", f"{records}copied", f"{records}running")
    report = [Done(taken.key, taken.attempt, 1, "bytes", "v", b"1")]
    step = store.step("slot", NODE, want=1, done=report)
    assert ([t.key for t in step.taken], step.stale) == (["sound"], [])
    assert store.retry("alice", ["lone"])[1] == []
    store.hold("alice", 7, ["lone"])
    store.cancel("alice", ["waits"])
    store.release("alice", ["near"])
    assert store.link.call("EXISTS", f"{records}near") == 0


def test_a_lost_record_is_the_error_of_what_is_made_from_it(graph):
    store = graph
    (sound,) = store.step("slot", NODE, want=1).taken
    store.link.call("DEL", store.keys.prefix + "t:copied")
    store.step("slot", NODE, want=0, back=[(sound.key, sound.attempt)])
    assert read_core(store.link.call("HGET", store.keys.of("task", "near"), TASK["core"])).state == "erred"
    told = [fields for _, fields in store.link.call("XRANGE", store.keys.of("notices", "alice"), "-", "+")]
    assert told[-1] == [b"near", b"5 lcopied\nits record in Redis is gone, or unreadable"]
