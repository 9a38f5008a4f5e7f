"""What the fields of a task record say that hold several things; keys.py has their layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

from celery_mem.errors import UnreadableRecordError

P = ParamSpec("P")
T = TypeVar("T")


class Core(NamedTuple):
    """The field `core`, see `keys.CORE`; `holders` are pairs of id and epoch."""

    state: str
    needed: int
    waiting: int
    attempt: str
    flags: str
    holders: list[tuple[str, int]]


class Recipe(NamedTuple):
    """The field `recipe`, see `keys.RECIPE`."""

    rank: str
    priority: float
    function: str


class Result(NamedTuple):
    """The field `result`: size in bytes, and name of the type."""

    nbytes: int
    type: str


def _says_if_unreadable(reader: Callable[P, T]) -> Callable[P, T]:
    """Have a reader raise UnreadableRecordError where the bytes are none of ours."""
    field = reader.__name__.removeprefix("read_")

    @functools.wraps(reader)
    def read(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return reader(*args, **kwargs)
        except ValueError:
            raise UnreadableRecordError(f"the {field} in the record of a task") from None

    return read


@_says_if_unreadable
def read_core(raw: bytes) -> Core:
    """Take a core apart."""
    head, _, lines = raw.decode(errors="surrogateescape").partition("\n")
    state, needed, waiting, attempt, flags = head.split(" ")
    holders = (line.rpartition(" ") for line in lines.split("\n") if line)
    return Core(
        state, int(needed), int(waiting), attempt, flags, [(h, int(epoch)) for h, _, epoch in holders]
    )


def state_of(raw: bytes | None) -> str:
    """Return the state that a core tells, empty where there is no record."""
    return (raw or b"").partition(b" ")[0].decode(errors="surrogateescape")


@_says_if_unreadable
def read_recipe(raw: bytes | None) -> Recipe | None:
    """Take a recipe apart; None for scattered data, which has none."""
    if raw is None:
        return None
    rank, priority, function = raw.decode(errors="surrogateescape").split(" ")
    return Recipe(rank, float(priority), function)


@_says_if_unreadable
def read_given(raw: bytes | None) -> dict[int, tuple[str, bytes]]:
    """Return the given inputs, see `keys.GIVEN`: place among all inputs, from 1, -> key and value."""
    found: dict[int, tuple[str, bytes]] = {}
    rest = raw or b""
    while rest:
        head, _, rest = rest.partition(b"\n")
        place, nbytes, key = head.decode(errors="surrogateescape").split(" ", 2)
        found[int(place)] = key, rest[: int(nbytes)]
        rest = rest[int(nbytes) :]
    return found


@_says_if_unreadable
def read_result(raw: bytes | None) -> Result | None:
    """Take size and type of a result apart; None where there is none."""
    if raw is None:
        return None
    nbytes, _, type_name = raw.decode(errors="surrogateescape").partition(" ")
    return Result(int(nbytes), type_name)


def read_deaths(raw: bytes | None) -> list[str]:
    """Return how slots died while they ran the task, one text each."""
    return raw.decode(errors="surrogateescape").split("\n") if raw else []
