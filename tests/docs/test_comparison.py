"""docs/comparison.md names every target that the tables of docs/benchmarks.md miss, and no other."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
ROW = re.compile(r"^\| `(\w+)` \|(.*)\| (at most|at least) ([\d.,/]+) \|$", re.MULTILINE)


def misses(cells: str, kind: str, target: str) -> bool:
    """Whether a row of a table misses its target: the ratio is its last cell that is filled."""
    filled = [cell.strip() for cell in cells.split("|") if cell.strip()]
    ratio = Fraction(re.findall(r"[\d.,]+", filled[-1])[0].replace(",", ""))
    limit = Fraction(target.replace(",", ""))
    return ratio > limit if kind == "at most" else ratio < limit


def test_a_missed_target_is_found() -> None:
    assert misses(" 3.38 GB/s | 0.98 | 0.92 ", "at least", "1")
    assert not misses(" 490 bytes | | | ", "at most", "1,024")
    assert misses(" 0.87 ms | 10 ms | 0.126 ", "at most", "1/8")


def test_the_targets_that_are_missed_are_named() -> None:
    printed = (DOCS / "benchmarks.md").read_text().split("## A printed table")[1].split("## Recovery")[0]
    rows = ROW.findall(printed)
    assert len(rows) > 10
    missed = {name for name, *row in rows if misses(*row)}
    section = (DOCS / "comparison.md").read_text().split("## What we missed")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == missed
