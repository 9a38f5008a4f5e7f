"""What every workload needs to be believed: arguments nobody used before, and values compared."""

from __future__ import annotations

import itertools

_fresh = itertools.count(1)


class WrongResultError(AssertionError):
    """A contender returned a value that is not the right one; its timing means nothing."""


def fresh_numbers(n: int) -> range:
    """`n` successive integers that no earlier call in this process returned."""
    first = next(_fresh) * 1_000_000
    return range(first, first + n)


def check_equal(got: object, expected: object) -> None:
    """Compare what came back with what is right, before any figure is believed."""
    if got != expected:
        raise WrongResultError(f"got {str(got)[:80]}, expected {str(expected)[:80]}")


def check_close(got: float, expected: float) -> None:
    """The same for sums of floats, whose last digits depend on the order of summation."""
    if not abs(got - expected) <= 1e-9 * abs(expected):
        raise WrongResultError(f"got {got!r}, expected {expected!r}")
