"""Results that stay on the node that made them; slots, processes and agents are run by the test itself."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dask import delayed

from celery_mem.memory.files import NoSpace
from celery_mem.state.audit import read
from celery_mem.state.store import Location
from celery_mem.worker.keeper import PAUSED
from celery_mem.worker.slot import Slot
from tests.deployment import wait_until
from tests.tasks import inc
from tests.worker.conftest import Node, Space

N = 1_000_000
ran: list[Any] = []
doors: dict[str, threading.Event] = {}


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    ran.clear()
    doors.clear()
    yield
    for door in doors.values():
        door.set()


def make(fill: int = 1) -> Any:
    ran.append(fill)
    return np.full(N, fill, dtype="u1")


def total(*arrays: Any) -> int:
    return sum(int(a.sum(dtype="u8")) for a in arrays)


def total_of_all(*numbers: int) -> int:
    return sum(numbers)


def double(x: Any) -> int:
    """Write into the input."""
    x *= 2
    return int(x.sum(dtype="u8"))


def double_all(x: Any) -> Any:
    x *= 2
    return x


def mapped_file(x: Any) -> str:
    """Return the file that the memory of an array is mapped from."""
    at = x.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split()
        first, last = (int(n, 16) for n in span.split("-"))
        if first <= at < last:
            return path[0] if path else ""
    return ""


def big_dict(n: int) -> dict[int, str]:
    return {i: f"value {i}" for i in range(n)}


def pass_door(name: str, x: Any = None) -> Any:
    ran.append(f"at {name}")
    assert doors[name].wait(30)
    return x


def where(space: Space, future: Any) -> Location:
    (found,) = space.store.locate([future.key])
    assert found is not None
    return found


def written(node: Node) -> bool:
    return not node.live.tokens()


def blobs_of(space: Space) -> list[str]:
    return list(read(space.store).blobs)


def reads_of(slot: Slot) -> list[Any]:
    """Return a list that fills with the keys that the slot reads."""
    reads: list[Any] = []
    batch = slot.store.link.batch

    def spied(commands: Any, *rest: Any) -> Any:
        reads.extend(c[1] for c in commands if c[0] in ("HMGET", "HGET", "GET", "HGETALL"))
        return batch(commands, *rest)

    slot.store.link.batch = spied  # type: ignore[method-assign]
    return reads


# --- where results stay -------------------------------------------------------------------------------------


def test_a_large_result_stays_on_its_node_and_nothing_of_it_is_in_redis(space: Space) -> None:
    node = space.node()
    future = space.submit(make)
    slot = space.slot(node)
    slot.run_ticket("1")
    found = where(space, future)
    assert found.places == ("node",)
    assert found.owner == slot.name
    assert N <= found.nbytes < N + 1000
    assert blobs_of(space) == []
    wait_until(lambda: written(node), "the idle slot's result to be written")
    assert list(node.folder.tokens()) == [found.token]


def test_small_results_stay_in_redis(space: Space) -> None:
    node = space.node()
    future = space.submit(inc, 1)
    space.slot(node).run_ticket("1")
    assert future.result(timeout=10) == 2
    assert where(space, future).places == ()


@pytest.mark.parametrize("what", ["a dict", "arrays in a list"])
def test_objects_of_any_kind_come_back_as_they_were(space: Space, what: str) -> None:
    node = space.node()
    if what == "a dict":
        made, expected = space.submit(big_dict, 50_000), 50_000
        seen = space.submit(len, made)
    else:
        made, expected = space.submit(lambda: [np.ones(N, "u1"), np.ones(N, "u1")]), 2 * N
        seen = space.submit(lambda arrays: total(*arrays), made)
    space.slot(node).run_ticket("1")
    assert seen.result(timeout=10) == expected


def test_a_chain_on_one_slot_reads_nothing_and_writes_nothing(space: Space) -> None:
    node = space.node(write_behind=3600.0)
    node.live.begin()  # no moment counts as idle
    warm = space.submit(double_all, space.submit(make))  # so that the code is at hand
    slot = space.slot(node)
    slot.run_ticket("0")
    reads = reads_of(slot)
    chain = space.submit(make, 2)
    for _ in range(5):
        chain = space.submit(double_all, chain)
    last = space.submit(total, chain)
    slot.run_ticket("1")
    assert last.result(timeout=10) == 64 * N
    assert [r for r in reads if "f:" not in str(r)] == []
    del chain, warm
    wait_until(node.is_empty, "all to be freed")
    assert node.live.written == 0


def test_what_is_freed_before_it_is_written_is_never_written(space: Space) -> None:
    node = space.node(write_behind=3600.0)
    node.live.begin()
    futures = space.map(make, range(5))
    space.slot(node).run_ticket("1")
    assert len(node.live.tokens()) == 5
    del futures
    wait_until(node.is_empty, "all to be freed")
    node.live.end()
    assert node.live.written == 0


# --- who reads what -----------------------------------------------------------------------------------------


def test_another_slot_of_the_node_maps_the_file_after_asking_for_it(space: Space) -> None:
    node = space.node(write_behind=3600.0)
    node.live.begin()  # the maker is busy: nothing is written by itself
    made = space.submit(make, 3)
    space.slot(node).run_ticket("1")
    seen = space.submit(mapped_file, made)
    # As another process of the node has it: the same folder and other live results.
    other = space.slot(other_process(node))
    other.run_ticket("2")
    assert seen.result(timeout=10) == f"{node.folder.path}/files/{where(space, made).token}"
    assert node.live.written == 1


def other_process(node: Node) -> Any:
    """The node as a process has it that made nothing itself."""
    from types import SimpleNamespace

    live = SimpleNamespace(
        copy=lambda _: None,
        sizes=lambda _: None,
        begin=lambda: None,
        end=lambda: None,
        now_known=lambda _: None,
        has_room=True,
    )
    memory = SimpleNamespace(folder=node.folder, node=node.name, live=live, is_paused=False)
    return SimpleNamespace(name=node.name, memory=memory)


def test_a_node_of_the_same_host_maps_the_other_ones_file_and_makes_no_copy(space: Space) -> None:
    one, two = space.node("one"), space.node("two")
    made = space.submit(make, 3)
    space.slot(one).run_ticket("1")
    seen = space.submit(mapped_file, made, key="seen")
    take_and_run(space, space.slot(two), "seen")
    assert seen.result(timeout=10) == f"{one.folder.path}/files/{where(space, made).token}"
    assert where(space, made).places == ("one",)
    assert list(two.folder.tokens()) == []


def take_and_run(space: Space, slot: Slot, key: str) -> None:
    """Run tickets of a slot until it has stolen a task from the node that it is meant for."""
    name = space.store.keys.of("task", key)
    wait_until(lambda: slot.run_ticket("") and space.store.link.call("EXISTS", name), f"{key} to be run")


def test_a_live_input_goes_into_a_warm_file_where_one_waits(space: Space) -> None:
    node = space.node(write_behind=3600.0)
    node.live.begin()
    slot = space.slot(node)
    old = space.submit(make, 1)
    slot.run_ticket("1")
    node.live.write(where(space, old).token)
    del old
    wait_until(node.is_empty, "the file to be recycled")
    made = space.submit(make, 3)
    slot.run_ticket("2")
    seen = [space.submit(mapped_file, made, key=f"s{i}") for i in range(2)]
    slot.run_ticket("3")
    assert space.client.gather(seen) == [f"{node.folder.path}/files/{where(space, made).token}"] * 2
    assert written(node)


def test_what_is_freed_while_it_is_being_written_leaves_no_file(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = space.node(write_behind=0.0)
    began, may_end = threading.Event(), threading.Event()
    write = node.folder.write

    def slow_write(*args: Any) -> int:
        began.set()
        assert may_end.wait(10)
        return write(*args)

    monkeypatch.setattr(node.folder, "write", slow_write)
    made = space.submit(make, 1)
    space.slot(node).run_ticket("1")
    token = where(space, made).token
    assert began.wait(10)
    node.house.drop([token])  # returns when the process knows
    may_end.set()
    del made
    wait_until(lambda: written(node) and not list(node.folder.tokens()), "the result to be gone")


def test_a_task_that_writes_into_its_input_spoils_nobodys(space: Space) -> None:
    node = space.node(write_behind=3600.0)
    node.live.begin()
    made = space.submit(make, 1)
    slot = space.slot(node)
    slot.run_ticket("1")
    from_memory = [space.submit(double, made, key=f"m{i}") for i in range(3)]
    slot.run_ticket("2")
    node.live.write(where(space, made).token)
    from_file = [space.submit(double, made, key=f"f{i}") for i in range(3)]
    slot.run_ticket("3")
    assert space.client.gather(from_memory + from_file) == [2 * N] * 6


def read_from_afar(space: Space, one: Node, two: Node) -> Any:
    """Make a result on one node and read it on another as if from another host; returns its future."""
    made = space.submit(make, 3)
    space.slot(one).run_ticket("1")
    wait_until(lambda: written(one), "it to be written")
    slot = space.slot(two)
    # As from another host: the path leads nowhere there.
    space.store.link.call("HSET", space.store.keys.of("node", "one"), "dir", "/nowhere")
    one.mailbox.start()
    seen = space.submit(total, made, key="seen")
    take_and_run(space, slot, "seen")
    assert seen.result(timeout=10) == 3 * N
    return made


def test_a_result_from_a_host_that_cannot_be_reached_becomes_a_copy_here(space: Space) -> None:
    one, two = space.node("one"), space.node("two")
    made = read_from_afar(space, one, two)
    assert sorted(where(space, made).places) == ["one", "two"]
    assert list(two.folder.tokens()) == [where(space, made).token]
    assert blobs_of(space) == []  # what was on its way is gone


def test_what_another_host_asked_for_once_stays_in_redis_if_it_is_to_be_pinned(space: Space) -> None:
    made = read_from_afar(space, space.node("one", publish="pinned"), space.node("two"))
    wait_until(lambda: set(where(space, made).places) == {"one", "two", "@redis"}, "it to be pinned")


def test_every_result_is_in_redis_too_if_that_is_wanted(space: Space) -> None:
    node = space.node(publish="always")
    made = space.submit(make, 3)
    space.slot(node, publish="always").run_ticket("1")
    node.mailbox.start()
    wait_until(lambda: set(where(space, made).places) == {"node", "@redis"}, "it to be published")


@pytest.mark.parametrize("how", ["futures", "graph"])
def test_a_reduction_over_many_chunks_holds_few_at_a_time(space: Space, how: str) -> None:
    node, most = space.node(), 0
    name = space.store.keys.of("node_keys", "node")
    slots = [space.slot(node), space.slot(node)]
    if how == "futures":
        chunks = space.map(make, [1] * 400, pure=False)
        sums = space.map(total, chunks)
        result = space.submit(total_of_all, *sums)
        del chunks, sums
    else:
        sums = [delayed(total)(delayed(make, pure=False)(1)) for _ in range(400)]
        result = space.client.compute(delayed(total_of_all)(*sums))
        wait_until(
            lambda: space.store.link.call("ZCARD", space.store.keys.fixed("ready")) == 400, "the graph"
        )
    for slot in slots:
        step = slot.store.step

        def counted(*args: Any, step: Any = step, **kwargs: Any) -> Any:
            nonlocal most
            answer = step(*args, **kwargs)
            most = max(most, space.store.link.call("SCARD", name))
            return answer

        slot.store.step = counted  # type: ignore[method-assign]
    threads = [
        space.in_thread(lambda slot=slot, i=i: slot.run_ticket(str(i))) for i, slot in enumerate(slots)
    ]
    assert result.result(timeout=60) == 400 * N
    for thread in threads:
        thread.join(10)
    assert 1 <= most <= 4 * len(slots)


# --- losses -------------------------------------------------------------------------------------------------


def test_an_input_that_is_gone_is_made_again_and_its_reader_waits_for_it(space: Space) -> None:
    node = space.node()
    made = space.submit(make, 3)
    slot = space.slot(node)
    slot.run_ticket("1")
    wait_until(lambda: written(node), "it to be written")
    node.folder.drop([where(space, made).token])
    seen = space.submit(total, made)
    slot.run_ticket("2")
    assert seen.result(timeout=10) == 3 * N
    assert ran == [3, 3]


def test_inputs_that_are_gone_hold_up_only_their_reader(space: Space) -> None:
    node = space.node()
    good, bad = space.map(make, [3, 4], key=["good", "bad"])
    slot = space.slot(node)
    slot.run_ticket("1")
    wait_until(lambda: written(node), "both to be written")
    node.folder.drop([where(space, bad).token])
    slot.seconds_per_task = 1e-6  # it takes several at a time
    sums = [space.submit(total, f, key=f"sum {f.key}") for f in (good, bad, good)]
    slot.run_ticket("2")
    assert space.client.gather(sums, timeout=10) == [3 * N, 4 * N, 3 * N]


def test_the_agent_tells_what_went_with_a_process_that_had_not_written_it(space: Space) -> None:
    node = space.node(write_behind=3600.0)
    node.live.begin()
    lost, kept = space.map(make, [3, 4], key=["lost", "kept"])
    dead = Slot(f"node|{os.getpid()}-1.1", "node", space.settings, space.send, node.memory)
    dead.run_ticket("1")
    assert node.live.write(where(space, kept).token)
    node.live.drop([where(space, lost).token])  # as its process, which is gone
    dead.close()
    assert node.house.replicas.report_lost() == 1
    assert node.house.replicas.report_lost() == 0
    states = {key: row.state for key, row in read(space.store).records.items()}
    assert states == {"lost": "ready", "kept": "memory"}
    space.slot(node).run_ticket("2")
    assert where(space, lost).places == ("node",)


def test_files_that_no_record_names_are_dropped_unless_they_are_young(space: Space) -> None:
    node = space.node()
    made = space.submit(make, 3)
    space.slot(node).run_ticket("1")
    wait_until(lambda: written(node), "it to be written")
    for token, age in (("old", 600), ("young", 0)):
        node.folder.write(token, b"head")
        status = os.stat(f"{node.folder.path}/files/{token}")
        os.utime(f"{node.folder.path}/files/{token}", (0, status.st_mtime - age))
    os.utime(f"{node.folder.path}/files/{where(space, made).token}", (0, 0))
    assert node.house.replicas.remove_unknown() == 1
    assert set(node.folder.tokens()) == {"young", where(space, made).token}
    node.folder.drop(["young"])


# --- little room --------------------------------------------------------------------------------------------


def test_without_room_in_the_folder_results_go_to_redis(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise NoSpace("full")

    node = space.node(live_bytes=1)
    monkeypatch.setattr(node.folder, "write", refuse)
    monkeypatch.setattr(node.folder, "begin", refuse)
    futures = space.map(make, [1, 2, 3])
    sums = [space.submit(total, f) for f in futures]
    slot = space.slot(node)
    slot.run_ticket("1")
    wait_until(lambda: written(node), "nothing to be left in the process")
    assert {where(space, f).places for f in futures} == {("@redis",)}
    assert space.client.gather(sums, timeout=10) == [N, 2 * N, 3 * N]


def test_a_spilled_result_is_read_back(space: Space) -> None:
    node = space.node()
    node.folder.is_memory = True  # the folder of a test is on a disk
    made = space.submit(make, 3)
    slot = space.slot(node)
    slot.run_ticket("1")
    wait_until(lambda: written(node), "it to be written")
    assert node.folder.spill(where(space, made).token) > 0
    assert node.folder.coldest() == []
    seen = space.submit(total, made)
    slot.run_ticket("2")
    assert seen.result(timeout=10) == 3 * N


def test_a_paused_node_takes_nothing_until_it_goes_on(space: Space) -> None:
    node = space.node()
    mark = Path(node.folder.path) / PAUSED
    future = space.submit(inc, 1)
    slot = space.slot(node)
    mark.touch()
    assert slot.run_ticket("1") == 0
    mark.unlink()
    assert slot.run_ticket("2") == 1
    assert future.result(timeout=10) == 2


def test_a_node_that_stops_saves_what_only_it_has(space: Space) -> None:
    node = space.node()
    futures = space.map(make, [1, 2, 3])
    space.slot(node).run_ticket("1")
    wait_until(lambda: written(node), "all to be written")
    node.house.save_unique(lambda: None)
    assert {where(space, f).places for f in futures} == {("node", "@redis")}
    node.leave()
    node.folder.drop(list(node.folder.tokens()))  # it goes with the node
    assert {where(space, f).places for f in futures} == {("@redis",)}
    total_of_all = space.submit(total, *futures)
    space.slot().run_ticket("2")
    assert total_of_all.result(timeout=10) == 6 * N


def test_mail_that_asks_to_save_is_carried_out(space: Space) -> None:
    node = space.node(write_behind=3600.0)
    node.live.begin()
    made = space.submit(make, 3)
    space.slot(node).run_ticket("1")
    node.mailbox.start()
    node.store.mail("node", f"s {where(space, made).token} {made.key}")
    wait_until(lambda: "@redis" in where(space, made).places, "the copy in Redis")
    assert node.live.written == 1  # the process that had it was asked to write it first


def test_results_of_a_namespace_that_was_reset_are_forgotten(space: Space) -> None:
    node = space.node(write_behind=3600.0)
    node.live.begin()
    made = space.submit(make, 3)
    slot = space.slot(node)
    slot.run_ticket("1")
    node.live.add("other", "7-ffffffff", pickled(b"x" * 100))
    node.memory.forget_generation(slot.store.generation)
    assert node.live.tokens() == ["7-ffffffff"]
    node.live.drop(["7-ffffffff"])
    del made


def pickled(obj: Any) -> Any:
    from celery_mem.memory.serialize import Frames

    return Frames(pickle.dumps(obj), [], ())
