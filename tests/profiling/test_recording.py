"""Recordings of what runs: nothing is lost, nothing is left, and nothing is paid while there is none."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from celery_mem import Client
from celery_mem.errors import RecordingError, RedisUnavailableError
from celery_mem.profiling import recorder as recorders
from celery_mem.profiling.lines import CANCELLED, DONE, FAILED, Line, Parcel, pack
from celery_mem.profiling.recorder import LiveRecording
from celery_mem.profiling.recording import Recording
from celery_mem.state.audit import audit
from celery_mem.state.store import WATCH_S, Done, NewTask, Store
from celery_mem.testing import InProcessCluster
from tests.on_cluster import Gate, add, fail, inc, until


def of_profiling(store: Store) -> set[str]:
    """The Redis keys that recordings and samplers have."""
    kinds = ("watchers", "recordings", "rec:")
    names = [name.decode() for name in store.link.call("KEYS", store.keys.prefix + "*")]
    return {name for name in names if name.removeprefix(store.keys.prefix).startswith(kinds)}


# --- on a cluster -------------------------------------------------------------------------------------------


def test_every_task_is_in_it_once(mem_client: Client, mem_cluster: InProcessCluster) -> None:
    recording = mem_client.record()
    with recording:
        assert mem_client.gather(mem_client.map(inc, range(300), pure=False)) == [*range(1, 301)]
        bad = mem_client.submit(fail, "so it is", pure=False)
        assert isinstance(bad.exception(), ValueError)
        two = mem_client.submit(add, bytes(1000), b"x", pure=False)
        two.result()
    keys = {"bad": bad.key, "two": two.key}
    del bad, two

    assert len(recording) == 302
    assert len({ran.line.key for ran in recording}) == 302
    assert (recording.dropped, recording.gaps) == (0, [])
    lines = {ran.line.key: ran for ran in recording}
    line, slot = lines[keys["bad"]]
    assert (line.function, line.outcome, line.error) == ("fail", FAILED, "ValueError: so it is")
    assert slot.partition("|")[0] in mem_cluster.workers
    line, _ = lines[keys["two"]]
    assert (line.function, line.outcome, line.error) == ("add", DONE, "")
    assert line.nbytes >= 1001
    for line, _ in recording:
        assert recording.began - 0.01 <= line.began <= line.called <= line.ended <= recording.ended + 0.01
    assert of_profiling(mem_client.session.store) == set()


def test_a_task_that_began_before_is_not_in_it_and_one_that_began_after_is(
    client: Client, nodes: list[str], gate: Gate
) -> None:
    before = client.submit(gate.pass_, "before", pure=False)
    gate.next_reached()
    with client.record() as recording:
        after = client.submit(inc, 1, pure=False)
        gate.open()
        client.gather([before, after])
        key = after.key
        del before, after
    assert [ran.line.key for ran in recording] == [key]
    [(line, slot)] = recording
    assert slot.partition("|")[0] in nodes
    assert line.ended > line.began > 0


def test_a_cancelled_task_is_in_it_as_such(client: Client, gate: Gate) -> None:
    with client.record() as recording:
        future = client.submit(gate.pass_, 1, pure=False)
        gate.next_reached()
        client.cancel(future)
        assert until(lambda: recording and len(recording) == 1)
    [(line, _)] = recording
    assert line.outcome == CANCELLED


def test_without_a_recording_nothing_is_noted(mem_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = []
    monkeypatch.setattr("celery_mem.worker.run.Note", noted.append)
    assert mem_client.submit(inc, 1, pure=False).result() == 2
    with mem_client.record():
        pass
    assert mem_client.submit(inc, 2, pure=False).result() == 3
    assert noted == []


def test_two_recordings_do_not_disturb_each_other(mem_client: Client) -> None:
    with mem_client.record() as long:
        mem_client.submit(inc, 1, pure=False).result()
        with mem_client.record() as short:
            mem_client.submit(inc, 2, pure=False).result()
        mem_client.submit(inc, 3, pure=False).result()
    assert (len(long), len(short)) == (3, 1)
    assert (long.dropped, short.dropped) == (0, 0)


def test_too_many_tasks_drop_the_oldest_and_are_counted(mem_client: Client) -> None:
    with mem_client.record(most=10) as recording:
        mem_client.gather(mem_client.map(inc, range(30), pure=False))
    assert (len(recording), recording.dropped) == (10, 20)


def test_it_is_saved_at_the_end_though_the_block_fails(mem_client: Client, tmp_path: Path) -> None:
    path = tmp_path / "run.json"

    def run() -> None:
        with mem_client.record(path):
            mem_client.submit(inc, 1, pure=False).result()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    found = Recording.load(path)
    assert [ran.line.function for ran in found] == ["inc"]
    assert [name.name for name in tmp_path.iterdir()] == ["run.json"]


def test_a_page_is_saved_where_the_name_says_so(mem_client: Client, tmp_path: Path) -> None:
    with mem_client.record(tmp_path / "run.html"):
        mem_client.submit(inc, 1, pure=False).result()
    assert (tmp_path / "run.html").read_text().startswith("<!DOCTYPE html>")


def test_a_recording_begins_once(mem_client: Client, tmp_path: Path) -> None:
    recording = mem_client.record()
    with recording:
        pass
    with pytest.raises(RecordingError, match="started before"):
        recording.start()
    assert recording.stop() is recording
    with pytest.raises(FileNotFoundError, match="no folder"):
        mem_client.record(tmp_path / "nowhere" / "run.json")
    with pytest.raises(ValueError, match="interval"):
        mem_client.record(interval=0)
    with pytest.raises(ValueError, match="most"):
        mem_client.record(most=0)


# --- with Redis that forgets, or is away --------------------------------------------------------------------


def test_what_a_restart_forgets_is_told_and_the_rest_recorded(
    mem_cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "PERIOD_S", 0.01)
    monkeypatch.setattr("celery_mem.profiling.memory.WATCH_S", 0.2)  # renewed fifty times a second
    with mem_cluster.client() as client, client.record() as recording:
        client.submit(inc, 1, pure=False).result()
        assert until(lambda: len(recording) == 1)
        client.restart()
        assert until(lambda: recording.gaps)
        client.submit(inc, 2, pure=False).result()
        assert until(lambda: len(recording) == 2)
    assert "lost sight" in recording.gaps[0]
    assert recording.dropped == 0


def test_looks_that_fail_are_left_out(mem_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    look, looks = recorders.look, iter([RedisUnavailableError("away"), None])

    def look_or_fail(store: Store) -> Any:
        if (error := next(looks, None)) is not None:
            raise error
        return look(store)

    monkeypatch.setattr(recorders, "look", look_or_fail)
    monkeypatch.setattr(recorders, "PERIOD_S", 0.01)
    with mem_client.record(interval=0.05) as recording:
        assert until(lambda: len(recording.memory.samples) >= 2)
        mem_client.submit(inc, 1, pure=False).result()
    assert len(recording) == 1


def test_a_recording_ends_though_redis_is_gone(make_store: Callable[..., Store]) -> None:
    store = make_store()
    recording = LiveRecording(store.twin, "test").start()
    assert recording._recorder is not None
    link = recording._recorder._watch.store.link
    link.retry_timeout = 0.01
    link.abort()
    link.pool.connection_kwargs = {**link.pool.connection_kwargs, "path": "/nowhere"}
    link.close()
    recording.stop()
    assert "the last seconds are missing" in recording.gaps[0]
    assert not [t for t in threading.enumerate() if t.name == "celery-mem-recorder"]


# --- what is in Redis ---------------------------------------------------------------------------------------


def take_and_report(store: Store, key: str) -> tuple[str, ...]:
    """Let a slot take a task and report it with a line; returns the recordings that it was told."""
    store.renew_client("client", join=True)
    store.submit("client", 1, [NewTask(key, "inc", b"payload")], [("inc", b"code")])
    step = store.step("node|1.1", "node", want=1)
    line = pack(Parcel("node|1.1", 0, [Line(key, "inc", 1.0, 1.0, 2.0)]))
    done = [Done(t.key, t.attempt, 1, "int", "v", b"1") for t in step.taken]
    lines = [(name, line) for name in step.recordings]
    store.step("node|1.1", "node", mode="q", want=0, done=done, lines=lines)
    store.expire_client("client")
    return step.recordings


def test_a_step_names_the_recordings_that_are_alive(store: Store) -> None:
    assert take_and_report(store, "x") == ()
    assert store.watch("one", records=True) is False
    assert store.watch("one", records=True) is True
    assert store.watch("looker", records=False) is False
    assert take_and_report(store, "y") == ("one",)
    [data], after = store.read_lines("one", "0")
    assert data == pack(Parcel("node|1.1", 0, [Line("y", "inc", 1.0, 1.0, 2.0)]))
    assert store.read_lines("one", after) == ([], after)
    store.end_watch("one")
    assert take_and_report(store, "z") == ()
    store.end_watch("looker")
    assert of_profiling(store) == set()


def test_of_a_recorder_that_died_nothing_is_left(store: Store) -> None:
    store.watch("dead", records=True)
    assert audit(store) == []
    for name in of_profiling(store):
        assert 0 < store.link.call("PTTL", name) <= WATCH_S * 1000
    assert store.now_ms is not None
    store.now_ms += int(WATCH_S * 1000) + 1
    assert take_and_report(store, "x") == ()
    store.watch("alive", records=True)
    assert store.link.call("ZRANGE", store.keys.fixed("recordings"), 0, -1) == [b"alive"]
    store.end_watch("alive")
    store.end_watch("dead")
    assert of_profiling(store) == set()


def test_lines_that_come_late_make_no_stream(store: Store) -> None:
    line = pack(Parcel("s", 0, []))
    store.step("node|1.1", "node", mode="q", want=0, lines=[("over", line)])
    assert of_profiling(store) == set()


@pytest.mark.parametrize(("line", "kept"), [(b"short", 2000), (b"x" * 3000, 500)])
def test_a_reader_that_is_too_slow_loses_the_oldest_lines(store: Store, line: bytes, kept: int) -> None:
    store.watch("slow", records=True)
    for _ in range(45):
        lines = [("slow", line)] * 50
        store.step("node|1.1", "node", mode="q", want=0, lines=lines)
    assert kept <= store.link.call("XLEN", store.keys.of("lines", "slow")) < kept + 200
    store.end_watch("slow")


def test_lines_that_are_missing_are_counted_and_those_that_come_twice_are_not(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    recording = LiveRecording(store.twin, "test")
    recorder = recorders._Recorder(store.twin(), recording, 0.5)
    lines = [Line(str(n), "inc", 1.0, 1.0, 2.0) for n in range(10)]
    recorder._take(pack(Parcel("a", 0, lines[:2])))
    recorder._take(pack(Parcel("a", 0, lines[:3])))  # its reply was lost, and the step went out again
    recorder._take(pack(Parcel("a", 7, lines[7:])))
    recorder._take(pack(Parcel("b", 2, lines[:1])))
    recorder._take(b"nonsense")
    assert [ran.line.key for ran in recording] == ["0", "1", "2", "7", "8", "9", "0"]
    assert recording.dropped == 4 + 2
    assert "unreadable" in recording.gaps[0]
    recorder._watch.store.link.close()


# --- files --------------------------------------------------------------------------------------------------


def test_a_file_has_all_that_the_recording_has(mem_client: Client, tmp_path: Path) -> None:
    with mem_client.record(interval=0.05) as recording:
        mem_client.gather(mem_client.map(inc, range(5), pure=False))
        assert until(lambda: len(recording.memory.samples) > 1)
    path = tmp_path / "run.json"
    recording.dropped, recording.gaps = 3, ["a gap"]
    recording.save(path)
    found = Recording.load(path)
    found.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()
    assert [ran.line.key for ran in found] == [ran.line.key for ran in recording]
    assert found.namespace == recording.namespace
    frame = found.to_pandas()
    assert list(frame["function"]) == ["inc"] * 5
    assert (frame["ended"] >= frame["began"]).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": "other"}, "is no recording"),
        ({"version": 99}, "version 99"),
        ({"tasks": [["k", 5, 0, 0, 0, 0, 0, "done", ""]]}, "is no recording"),
        ({"tasks": [["k", 0, 0, 0, 0, 0, 0, "odd", ""]], "functions": ["f"], "slots": ["s"]}, "is 'odd'"),
        ({"memory": 3}, "is no recording"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    path = tmp_path / "run.json"
    recording = Recording("mem")
    recording.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RecordingError, match=text):
        Recording.load(path)
    path.write_bytes(b"\xff\x00")
    with pytest.raises(RecordingError, match="is no recording"):
        Recording.load(path)


def test_a_summary_counts_what_slots_were_busy_with_once() -> None:
    recording = Recording()
    recording.add(
        "n|1.1", [Line("child", "f", 11.0, 11.0, 12.0, 5), Line("parent", "g", 10.0, 10.5, 14.0, 7)]
    )
    recording.add("n|1.2", [Line("bad", "f", 10.0, 10.0, 11.0, 0, FAILED, "no")])
    found = recording.summary()
    assert (found.tasks, found.failed, found.slots, found.wall_s, found.busy_s) == (3, 1, 2, 4.0, 5.0)
    assert found.utilisation == pytest.approx(5 / 8)
    assert [row.name for row in found.functions] == ["g", "f"]
    assert found.functions[1] == ("f", 2, 1, 2.0, 1.0, 1.0, "child", 0.0, 5)
    assert found.functions[0].waited_s == 0.5
    empty = Recording().summary()
    assert (empty.tasks, empty.utilisation, empty.functions) == (0, 0.0, [])
