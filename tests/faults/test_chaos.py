"""A short run of benchmarks/chaos.py: real work while processes die or stand still and data goes."""

from __future__ import annotations

from pathlib import Path

from tests.faults.chaos.arena import Arena
from tests.faults.chaos.run import Run
from tests.faults.chaos.schedule import WEIGHTS

SEED = 7
SECONDS = 6.0
SLOW = {"kill an agent", "stop an agent", "stop a node", "kill Redis"}
"""What is dropped while no agent hears is a file until the next one has looked twice, a minute apart."""


def test_real_work_is_right_and_leaves_nothing_while_whatever_can_break_is_broken(tmp_path: Path) -> None:
    with Arena(SEED) as arena:
        weights = {kind: weight for kind, weight in WEIGHTS.items() if kind not in SLOW}
        report = Run(arena, SEED, every_s=0.6, weights=weights, keep=tmp_path).go(SECONDS)
        left = arena.close()
    assert (report.faults, left) == ([], []), f"{report.text()}\nlogs and state are in {tmp_path}"
    assert sum(report.injected.values()) >= 5
    assert sum(report.jobs.values()) >= 5
