"""The memory sampler, on a cluster and without one."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest

from celery_mem import Client
from celery_mem.errors import RedisUnavailableError
from celery_mem.profiling import memory
from celery_mem.profiling.memory import Memory, MemorySampler, NodeMemory, Sample
from celery_mem.state.store import Store
from tests.on_cluster import until

MIB = 2**20


def block(nbytes: int) -> bytes:
    return bytes(nbytes)


def sampler(**runs: list[Sample]) -> MemorySampler:
    """A sampler that has found something already."""

    def nowhere() -> Store:
        raise AssertionError("nobody is to connect")

    made = MemorySampler(nowhere)
    for label, samples in runs.items():
        made.runs[label] = Memory()
        made.runs[label].samples += samples
    return made


def at(second: float, *nodes: int, redis: int | None = 7 * MIB) -> Sample:
    return Sample(second, {f"n{i}": NodeMemory(n * MIB, 0, MIB, 9 * MIB) for i, n in enumerate(nodes)}, redis)


@pytest.fixture
def one_run() -> MemorySampler:
    return sampler(a=[at(100, 1, 2), at(101, 3, 4), at(102, 1, 1)])


@pytest.mark.node_memory
def test_a_block_sees_what_its_results_take(client: Client, nodes: list[str]) -> None:
    sampler = client.profile_memory(interval=0.05)
    with sampler.sample("kept"):
        kept = [client.submit(block, 8 * MIB, pure=False) for _ in range(2)]
        client.gather(kept)
        assert until(lambda: sampler.peak("kept") >= 16 * MIB)
    del kept
    with sampler.sample("none") as same:
        assert same is sampler
    last = sampler.runs["kept"].samples[-1]
    assert set(last.nodes) == set(nodes)
    assert all(node.limit > 64 * MIB for node in last.nodes.values())
    assert sampler.peak(measure="redis") > 100_000
    assert sampler.peak("kept", "processes") > MIB
    assert list(sampler.runs) == ["kept", "none"]
    assert not [t for t in threading.enumerate() if t.name == "celery-mem-memory"]


def test_the_sampler_itself_is_a_block(mem_client: Client) -> None:
    with mem_client.profile_memory("first", interval=0.05) as found:
        pass
    with found, found:
        pass
    assert list(found.runs) == ["first"]
    with mem_client.profile_memory() as found, found.sample():
        pass
    assert list(found.runs) == ["run 1", "run 2"]
    assert all(run.samples for run in found.runs.values())
    assert "'run 1': " in repr(found)
    store = mem_client.session.store
    assert store.link.call("EXISTS", store.keys.fixed("watchers")) == 0


def test_looks_without_redis_are_missed_and_the_others_go_on(
    mem_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, n_looks = memory.look, 0

    def look_or_fail(store: Store) -> Sample:
        nonlocal n_looks
        n_looks += 1
        if n_looks in (2, 3):
            raise RedisUnavailableError("away")
        return look(store)

    monkeypatch.setattr(memory, "look", look_or_fail)
    with mem_client.profile_memory("a", interval=0.05) as found:
        assert until(lambda: len(found.runs["a"].samples) >= 3)
    assert found.runs["a"].missed == 2


def test_many_samples_are_thinned() -> None:
    run = Memory()
    for second in range(memory.MOST_SAMPLES + 1):
        run.add(at(second))
    assert len(run.samples) == memory.MOST_SAMPLES // 2 + 1
    assert [s.at for s in run.samples[:3]] == [0, 2, 4]
    assert run.samples[-1].at == memory.MOST_SAMPLES


@pytest.mark.parametrize("interval", [0, -1, 0.001, "1", True, float("nan")])
def test_an_interval_is_some_seconds(mem_client: Client, interval: Any) -> None:
    with pytest.raises(ValueError, match="interval: seconds"):
        mem_client.profile_memory(interval=interval)


def test_of_nodes_that_told_nothing_nothing_is_known() -> None:
    empty = Sample(1.0, {}, None)
    assert [empty.total(measure) for measure in memory.MEASURES] == [None] * 5
    assert sampler(a=[empty]).peak() == 0


# --- frames and pictures ------------------------------------------------------------------------------------


def test_a_frame_has_bytes_over_time(one_run: MemorySampler) -> None:
    frame = one_run.to_pandas()
    assert list(frame.columns) == ["a"]
    assert list(frame["a"] / MIB) == [3, 7, 2]
    assert frame.index[1].timestamp() == 101
    assert list(one_run.to_pandas("limit")["a"] / MIB) == [18] * 3
    assert list(one_run.to_pandas("redis")["a"] / MIB) == [7] * 3
    by_node = one_run.to_pandas(by_node=True)
    assert list(by_node["a", "n1"] / MIB) == [2, 4, 1]


def test_runs_are_compared_from_their_begins() -> None:
    found = sampler(a=[at(100, 1), at(101, 2), at(103, 3)], b=[at(200, 5), at(202, 6)])
    frame = found.to_pandas(align=True) / MIB
    assert [t.total_seconds() for t in frame.index] == [0, 1, 2, 3]
    assert list(frame["a"]) == [1, 2, 2, 3]
    assert list(frame["b"][:3]) == [5, 5, 6]
    assert frame["b"].isna().iloc[3]  # it was over


@pytest.mark.parametrize("call", [lambda s: s.to_pandas("all"), lambda s: s.peak("a", "all")])
def test_an_unknown_measure_is_refused(one_run: MemorySampler, call: Any) -> None:
    with pytest.raises(ValueError, match="measure is one of memory, spilled"):
        call(one_run)


def test_redis_is_of_no_node(one_run: MemorySampler) -> None:
    with pytest.raises(ValueError, match="is of no node"):
        one_run.to_pandas("redis", by_node=True)


def test_a_plot_has_a_line_for_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "backend", "agg")
    found = sampler(a=[at(100, 1), at(101, 2)], b=[at(200, 5), at(202, 6)])
    axes = found.plot(title="two runs")
    assert [line.get_label() for line in axes.get_lines()] == ["a", "b"]
    assert axes.get_title() == "two runs"
    assert axes.get_ylabel() == "memory, MiB"
    assert axes.get_ylim()[0] == 0
    from matplotlib import pyplot

    pyplot.close(axes.figure)


@pytest.mark.parametrize(
    ("missing", "call", "text"),
    [
        ("pandas", lambda s: s.to_pandas(), "pip install pandas"),
        ("matplotlib", lambda s: s.plot(), "pip install matplotlib"),
    ],
)
def test_what_is_not_installed_is_named(
    one_run: MemorySampler, monkeypatch: pytest.MonkeyPatch, missing: str, call: Any, text: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=text):
        call(one_run)
