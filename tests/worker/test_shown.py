"""Short forms run no code of users and cost as much as what they show, not as what there is."""

from __future__ import annotations

import collections
import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy
import pytest

from celery_mem.worker.shown import MOST_TEXT, short, shown_name


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("code of users ran")


HOSTILE = dict.fromkeys(
    ["__repr__", "__str__", "__format__", "__len__", "__iter__", "__hash__", "__eq__", "__lt__", "__bool__"],
    refuse,
)
HOSTILE["__getattribute__"] = refuse


class HostileType(type):
    __hash__ = refuse  # type: ignore[assignment]
    __eq__ = __getattribute__ = refuse


def hostile(name: str, *bases: type) -> Any:
    return HostileType(name, bases, dict(HOSTILE))


@pytest.mark.parametrize("base", [object, dict, list, tuple, set, str, bytes, int, float, collections.deque])
def test_of_a_class_of_users_only_its_name_is_asked(base: type) -> None:
    for name in ("Own", base.__name__):  # also one that is called like a built-in
        value = object.__new__(hostile(name)) if base is object else base.__new__(hostile(name, base))
        assert short(value) == f"<{name}>"
        assert short([value, {1: value}]) == f"[<{name}>, {{1: <{name}>}}]"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((), "()"),
        ((1,), "(1,)"),
        ([1, 2.5, None, True, 2j], "[1, 2.5, None, True, ...]"),
        ({"b": 1, "a": {2}}, "{'b': 1, 'a': {2}}"),
        ([[[1]], [[]]], "[[[...]], [[]]]"),
        (({1: {2: {}}},), "({1: {...}},)"),
        (set(), "set()"),
        (frozenset(), "frozenset()"),
        (frozenset({1}), "frozenset({1})"),
        (b"ab", "b'ab'"),
        (numpy.zeros((2, 3)), "<ndarray (2, 3)>"),
        (numpy.float64(1), "<float64>"),
        (collections.deque([1]), "<deque>"),
        (test_of_a_class_of_users_only_its_name_is_asked, "<function>"),
        (2**199, str(2**199)),
        (-(1 << 4_000_000), "<int of 4000001 bits>"),
    ],
    ids=range(16),
)
def test_plain_values_show(value: Any, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize("x", ["x", b"x"])
def test_of_long_texts_the_ends_show(x: Any) -> None:
    text = 10_000_000 * x
    assert len(short(text)) <= MOST_TEXT + 3
    assert short(text).count("x") == MOST_TEXT - 4


def test_of_a_large_set_as_much_is_read_as_shows() -> None:
    compared = []

    class Counted:
        def __lt__(self, other: object) -> bool:
            compared.append(other)
            return False

    assert short({Counted() for _ in range(1000)}).count("Counted") == 4
    assert short({Counted(): 1 for _ in range(1000)}).count("Counted") == 4
    assert compared == []


class WithName:
    @property
    def __name__(self) -> str:
        return str(refuse())

    def __call__(self) -> None:
        """Do nothing."""


class Named:
    def __init__(self) -> None:
        self.__name__ = "its own"

    def __call__(self) -> None:
        """Do nothing."""

    def method(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (refuse, "refuse"),
        (lambda: None, "lambda"),
        (len, "len"),
        (str.upper, "upper"),
        (dict, "dict"),
        (functools.partial(functools.partial(refuse, 1), 2), "refuse"),
        (functools.cache(refuse), "refuse"),
        (operator.itemgetter(1), "itemgetter"),
        (numpy.add, "add"),
        (numpy.concatenate, "concatenate"),
        (Named().method, "method"),
        (Named(), "itsown"),
    ],
)
def test_a_function_shows_under_its_name(func: Callable[..., Any], name: str) -> None:
    assert shown_name(func) == name


def test_a_class_of_users_is_not_asked_for_its_name() -> None:
    assert shown_name(hostile("Odd")) == "Odd"
    assert shown_name(object.__new__(hostile("Odd"))) == "Odd"
    assert shown_name(WithName()) == "WithName"
