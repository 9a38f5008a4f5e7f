"""Live results that library functions read where they lie; nobody's data changes, whatever they do."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.worker.conftest import Node, Space

N = 1_000_000
calls: list[str] = []


def ones() -> Any:
    return np.ones(N, "u1")


def frame() -> Any:
    return pd.DataFrame({"a": np.arange(N), "b": np.ones(N)})


def add_one(x: Any) -> int:
    x += 1
    return int(x.sum(dtype="u8"))


def note_and_add_one(seen: str, x: Any) -> int:
    calls.append(seen)
    return add_one(x)


def own_function() -> Any:
    return note_and_add_one


def head_of(parts: Any) -> tuple[int, bool]:
    """The sum of the first part, and whether all are the task's own."""
    writable = all(part.flags.writeable for part in parts)
    return int(parts[0].sum(dtype="u8")), writable


class Loans:
    """What was lent and what was copied for readers in a node's process."""

    def __init__(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lent: list[str] = []
        self.copied: list[str] = []
        for name, seen in (("lend", self.lent), ("copy", self.copied)):
            monkeypatch.setattr(node.live, name, self._spied(getattr(node.live, name), seen))

    @staticmethod
    def _spied(call: Any, seen: list[str]) -> Any:
        def spied(token: str) -> Any:
            seen.append(token)
            return call(token)

        return spied


@pytest.fixture
def node(space: Space) -> Node:
    return space.node(write_behind=60.0)


@pytest.fixture
def loans(node: Node, monkeypatch: pytest.MonkeyPatch) -> Loans:
    return Loans(node, monkeypatch)


def test_a_library_function_reads_what_is_there(space: Space, node: Node, loans: Loans) -> None:
    x = space.submit(ones)
    total = space.submit(np.sum, x)
    more = space.submit(operator.add, x, x)
    space.slot(node).run_ticket("1")
    assert total.result(timeout=5) == N
    assert loans.lent
    assert not loans.copied
    assert more.result(timeout=5).flags.writeable


def test_what_writes_in_spite_of_its_library_has_inputs_of_its_own(
    space: Space, node: Node, loans: Loans
) -> None:
    x = space.submit(ones)
    twice = [space.submit(operator.iadd, x, n) for n in (1, 2)]
    mine = space.submit(add_one, x)
    total = space.submit(np.sum, x, dtype="u8")
    space.slot(node).run_ticket("1")
    assert [int(f.result(timeout=5).sum(dtype="u8")) for f in twice] == [2 * N, 3 * N]
    assert mine.result(timeout=5) == 2 * N
    assert total.result(timeout=5) == N
    assert len(loans.lent) == 2  # the first addition, and the sum: the second one is known by then


@pytest.mark.parametrize("is_input", [False, True])
def test_a_function_of_somebody_else_among_the_arguments_is_called_once(
    space: Space, node: Node, loans: Loans, is_input: bool
) -> None:
    calls.clear()
    x = space.submit(ones)
    func = space.submit(own_function) if is_input else note_and_add_one
    changed = space.submit(operator.call, func, "once", x)
    total = space.submit(np.sum, x, dtype="u8")
    space.slot(node).run_ticket("1")
    assert changed.result(timeout=5) == 2 * N
    assert calls == ["once"]
    assert total.result(timeout=5) == N


def test_part_of_an_input_is_copied_and_may_be_written(space: Space, node: Node, loans: Loans) -> None:
    x = space.submit(ones)
    part = space.submit(operator.getitem, x, slice(0, N // 2))
    changed = space.submit(add_one, part)
    total = space.submit(np.sum, x, dtype="u8")
    again = space.submit(np.sum, part, dtype="u8")
    space.slot(node).run_ticket("1")
    assert changed.result(timeout=5) == N
    assert total.result(timeout=5) == N
    assert again.result(timeout=5) == N // 2
    assert part.result(timeout=5).flags.writeable


def test_inputs_inside_a_result_are_its_own_too(space: Space, node: Node, loans: Loans) -> None:
    x = space.submit(ones)
    pair = space.submit(np.split, x, 2)
    seen = space.submit(head_of, pair)
    space.slot(node).run_ticket("1")
    assert seen.result(timeout=5) == (N // 2, True)
    assert loans.lent


def test_frames_too(space: Space, node: Node, loans: Loans) -> None:
    x = space.submit(frame)
    column = space.submit(operator.getitem, x, ["a"])
    total = space.submit(pd.DataFrame.sum, x)
    space.slot(node).run_ticket("1")
    got = column.result(timeout=5)
    got.loc[0, "a"] = 7
    assert got["a"].iloc[0] == 7
    assert total.result(timeout=5)["b"] == N
    assert loans.lent


def test_an_error_is_that_of_the_call(space: Space, node: Node, loans: Loans) -> None:
    x = space.submit(ones)
    bad = space.submit(np.reshape, x, (3, 7))
    space.slot(node).run_ticket("1")
    with pytest.raises(ValueError, match="cannot reshape"):
        bad.result(timeout=5)
