"""What the benchmarks conclude from samples, without running any cluster."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import data, report, traffic
from benchmarks.checks import WrongResultError
from benchmarks.contenders import Ray
from benchmarks.harness import Outcome, clusters
from benchmarks.limits import measure_limits
from benchmarks.memory import PeakMemory
from benchmarks.soak import thirds
from benchmarks.workloads import WORKLOADS, chain, graph, map_noop, tree


def outcome(**samples: dict[str, list[float]]) -> Outcome:
    return Outcome(samples=samples)


def ours(lines: list[report.Line]) -> report.Line:
    [line] = [line for line in lines if line.contender == "celery-mem"]
    return line


def test_ratio_is_to_the_faster_reference_where_more_is_better() -> None:
    lines = report.summarise(
        outcome(
            map_noop={
                "celery-mem": [17_000, 16_000, 90_000],
                "distributed": [500, 400, 600],
                "distributed-tuned": [2_000, 1_900, 2_100],
            }
        )
    )
    line = ours(lines)
    assert (line.median, line.low, line.high, line.repetitions) == (17_000, 16_000, 90_000, 3)
    assert line.ratio == 8.5
    assert (line.target, line.met) == (">= 8x", True)


def test_ratio_is_to_the_faster_reference_where_less_is_better() -> None:
    lines = report.summarise(
        outcome(roundtrip={"celery-mem": [1.5], "distributed": [11.0], "distributed-tuned": [10.0]})
    )
    line = ours(lines)
    assert line.ratio == 0.15
    assert (line.target, line.met) == ("<= 1/8x", False)


def test_ray_is_a_peer_where_data_is_large_and_nowhere_else() -> None:
    samples = {"celery-mem": [6.0], "distributed": [1.0], "distributed-tuned": [1.5], "ray": [3.0]}
    assert ours(report.summarise(outcome(bytes_local=samples))).ratio == 2
    assert ours(report.summarise(outcome(map_noop=samples))).ratio == 4
    assert ours(report.summarise(outcome(array_pipeline_peak=samples))).ratio == 6


def test_absolute_target_needs_no_reference() -> None:
    line = ours(report.summarise(outcome(held_bytes={"celery-mem": [900.0, 1100.0, 1000.0]})))
    assert (line.ratio, line.target, line.met) == (None, "<= 1024 bytes", True)


def test_relative_target_without_a_reference_is_not_judged() -> None:
    assert ours(report.summarise(outcome(tree={"celery-mem": [1.0]}))).met is None


def test_table_marks_reference_and_missed_target() -> None:
    table = report.render(
        report.summarise(
            outcome(chain={"celery-mem": [900], "distributed": [100], "distributed-tuned": [90]})
        )
    )
    [mem] = [row for row in table.splitlines() if " celery-mem " in row]
    assert mem.split()[-4:] == ["9x", ">=", "10x", "MISSED"]
    assert "1x*" in table


def test_every_target_is_in_the_default_run() -> None:
    targets = {name: report.describe_target(WORKLOADS[name]) for name in command.DEFAULT}
    assert targets == {
        "map_noop": ">= 8x",
        "tree": ">= 8x",
        "chain": ">= 10x",
        "graph": ">= 6x",
        "roundtrip": "<= 1/8x",
        "startup": "<= 2x",
        "cost_growth": "<= 1.3x",
        "held_bytes": "<= 1024 bytes",
        "bytes_local": ">= 1x",
        "bytes_move": ">= 2x",
        "gather_big": ">= 3x",
        "scatter_big": ">= 1x",
        "array_pipeline": "<= 0.7x",
        "array_pipeline_peak": "<= 1x",
        "df_pipeline": "<= 0.9x",
        "df_pipeline_peak": "<= 1x",
        "release": "<= 1x",
        "recover": "<= 1x",
        "recover_child": "<= 1.5 s",
    }


def test_a_peak_is_taken_where_its_workload_runs_and_apart_from_the_others() -> None:
    assert clusters(["tree", "df_pipeline", "chain", "array_pipeline_peak", "df_pipeline_peak"]) == [
        ["tree", "chain"],
        ["df_pipeline", "df_pipeline_peak"],
        ["array_pipeline_peak"],
    ]


def test_contender_that_is_not_installed_is_left_out_with_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ray, "missing", classmethod(lambda cls: "ray"))
    assert command.present(["celery-mem", "ray"]) == ["celery-mem"]
    assert capsys.readouterr().out == "ray is left out: there is no ray to import here\n"


def test_unknown_workload_is_refused_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(["--only", "map_noop,trees"])
    assert "no such name: trees; there are: map_noop, tree" in capsys.readouterr().err


class InProcess:
    """Runs each call at once; `wrong` is added to every result."""

    def __init__(self, wrong: int = 0) -> None:
        self.wrong = wrong
        self.memory = nullcontext()

    def submit(self, function: Callable[..., Any], *args: Any, **kw: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*map(value_of, args)))
        except Exception as error:
            future.set_exception(error)
        return future

    def map(self, function: Callable[..., Any], *iterables: Any) -> list[Future[Any]]:
        return [self.submit(function, *args) for args in zip(*iterables, strict=True)]

    def result(self, reference: Future[Any]) -> Any:
        return reference.result() + self.wrong

    def gather(self, references: list[Future[Any]]) -> list[Any]:
        return [self.result(reference) for reference in references]

    def wait(self, references: list[Future[Any]]) -> None:
        pass

    def scatter(self, values: list[Any]) -> list[Future[Any]]:
        return [self.submit(lambda value=value: value) for value in values]

    def compute(self, collection: Any) -> Any:
        return collection.compute(scheduler="sync") + self.wrong

    def persist(self, collection: Any) -> Any:
        return collection.persist(scheduler="sync")

    def drain(self) -> None:
        pass


def value_of(argument: Any) -> Any:
    if isinstance(argument, list):
        return [value_of(item) for item in argument]
    return argument.result() if isinstance(argument, Future) else argument


CHECKED = [map_noop, tree, chain, graph, data.bytes_local, data.bytes_move, data.gather_big, data.scatter_big]
CHECKED += [data.array_pipeline, data.df_pipeline]


@pytest.mark.parametrize("workload", CHECKED)
def test_workload_checks_its_values(workload: Callable[[Any, int], float]) -> None:
    assert workload(InProcess(), 40) > 0
    with pytest.raises(WrongResultError):
        workload(InProcess(wrong=1), 40)


def test_release_is_timed_until_the_contender_has_drained() -> None:
    slow = InProcess()
    slow.drain = lambda: time.sleep(0.02)  # type: ignore[method-assign]
    assert 20 <= data.release(slow, 3) < 1000


def test_peak_counts_processes_below_and_shared_memory_once(tmp_path: Path) -> None:
    (tmp_path / "unmapped").write_bytes(bytes(50 << 20))
    touch = "import mmap, os; m = mmap.mmap(-1, 100 << 20); m.write(bytes(100 << 20)); os.fork(); m[::4096]"
    wait = "; print('touched', flush=True); input()"
    with PeakMemory() as before:
        pass
    with PeakMemory(f"{tmp_path}/*") as peak:
        child = subprocess.Popen(
            [sys.executable, "-c", touch + wait], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        for _ in range(2):
            child.stdout.readline()
        time.sleep(0.3)  # two samples fit in
        child.communicate(b"\n\n")
    assert 100 <= peak.mib - before.mib < 180


def test_limits_of_the_machine_are_all_measured() -> None:
    limits = measure_limits(scale=0.01)
    assert len(limits) == 6
    assert min(limits.values()) > 0


def test_graph_has_ten_thousand_nodes_at_full_size() -> None:
    sums = (WORKLOADS["graph"].size - 1) // 11
    assert 10 * sums + sums + 1 == 10_000


# --- the soak's own bookkeeping -------------------------------------------------------------------


class InProcessClient(InProcess):
    def submit(self, function: Callable[..., Any], *args: Any, **kw: Any) -> Future[Any]:
        while True:
            future = super().submit(function, *args)
            if not kw.get("retries") or future.exception() is None:
                return future

    def compute(self, collection: Any) -> Future[Any]:
        return self.submit(collection.compute)

    def cancel(self, futures: list[Future[Any]]) -> None:
        for future in futures:
            future.__class__ = Cancelled

    def retry(self, futures: list[Future[Any]]) -> None:
        pass

    def close(self) -> None:
        pass


class Cancelled(Future):  # type: ignore[type-arg]
    def cancelled(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> Any:
        raise CancelledError


def test_traffic_predicts_every_outcome() -> None:
    quick = {**traffic.Traffic.WEIGHTS, "idle": 0, "nap": 0}
    one = traffic.Traffic(InProcessClient, random.Random(7))
    one.WEIGHTS = quick  # type: ignore[misc]
    one.run(1.5, lambda counts: None)
    assert one.held == []
    assert one.counts["verified"] > 100
    assert one.counts["cancel"] > 0


def test_traffic_notices_a_wrong_value() -> None:
    one = traffic.Traffic(InProcessClient, random.Random(7))
    future: Future[int] = Future()
    future.set_result(1)
    with pytest.raises(traffic.MismatchError, match="got 1, expected 2"):
        one.verify(traffic.Held(future, 2))


def test_thirds_compare_the_start_with_the_end() -> None:
    samples = [{"used_memory": float(n)} for n in (1, 2, 3, 50, 50, 50, 7, 8, 9)]
    assert thirds(samples) == (2.0, 8.0)
