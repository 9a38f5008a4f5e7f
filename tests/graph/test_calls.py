"""Calls as they travel: functions, arguments with places, tokens."""

from __future__ import annotations

import enum
import functools
import math
import operator
import sys
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
from dask._task_spec import List, Task, TaskRef

from celery_mem.errors import DeserializationError, SerializationError, VersionMismatchError
from celery_mem.graph import calls
from celery_mem.graph.calls import (
    call,
    decode_call,
    decode_function,
    encode_call,
    encode_function,
    encode_node,
    name_of,
    token_of,
)
from celery_mem.graph.nodes import is_node
from celery_mem.memory.serialize import note_future

Point = namedtuple("Point", "x y")
FACTOR = 2


class Ref:
    """Stands in for a future."""

    __celery_mem_future__ = True

    def __init__(self, key):
        self.key = key

    def __reduce__(self):
        note_future(self.key)
        return Ref, (self.key,)

    def __dask_tokenize__(self):
        return "Ref", self.key


class Box:
    def __init__(self, content):
        self.content = content


class Color(enum.IntEnum):
    RED = 1


class Accumulator:
    def __init__(self):
        self.n = 0

    def __call__(self):
        return self.n

    def method(self):
        return self.n


def module_function(x, y=1):
    return x + y


def encoded(*args, **kwargs):
    return encode_call(args, kwargs, Ref, lambda ref: ref.key)


def arrived(payload, **values):
    """What a worker makes of a payload; futures that arrive as themselves count too."""
    return decode_call(payload.data, payload.deps, [values[key] for key in payload.deps])


def token(*args, func=module_function, **kwargs):
    return token_of(encode_function(func), args, kwargs, lambda ref: ref.key)


class TestFunction:
    @pytest.mark.parametrize("func", [module_function, len, math.sin, np.sin, np.add, Point, str, lambda: 5])
    def test_comes_back(self, func):
        args = (
            []
            if func.__name__ == "<lambda>"
            else [1, 2]
            if func in (Point, np.add, module_function)
            else ["1"]
        )
        if func in (math.sin, np.sin):
            args = [1.0]
        assert decode_function(encode_function(func).code)(*args) == func(*args)

    def test_has_the_same_hash_each_time(self):
        assert encode_function(module_function) == encode_function(module_function)
        assert encode_function(operator.add).hash != encode_function(operator.sub).hash

    def test_is_pickled_once_if_it_cannot_change(self, monkeypatch):
        def closes_over(x, factor=3):
            return x * factor * FACTOR

        pickled = []
        real = calls.dumps
        monkeypatch.setattr(calls, "dumps", lambda *args: (pickled.append(args[1]), real(*args))[1])
        for _ in range(3):
            encode_function(closes_over)
            encode_function(module_function)
        assert pickled.count("function closes_over") == 1
        assert pickled.count("function module_function") <= 1

    def test_is_pickled_anew_if_what_it_refers_to_is_another(self, monkeypatch):
        offset = 1

        def closure():
            return offset

        def uses_global():
            return FACTOR  # not imported where it runs: it goes by value

        before = encode_function(closure), encode_function(uses_global)
        offset = 2
        monkeypatch.setitem(globals(), "FACTOR", 5)
        after = encode_function(closure), encode_function(uses_global)
        assert before[0].hash != after[0].hash
        assert [decode_function(f.code)() for f in (before[0], after[0])] == [1, 2]

    def test_with_a_state_is_pickled_each_time(self):
        accumulator, items = Accumulator(), []
        functions = [accumulator, accumulator.method, functools.partial(len, items), lambda: len(items)]
        before = [encode_function(f).code for f in functions]
        accumulator.n = 1
        items.append(1)
        after = [encode_function(f).code for f in functions]
        assert [decode_function(c)() for c in before] == [0] * 4
        assert [decode_function(c)() for c in after] == [1] * 4

    def test_that_refers_to_itself_comes_back(self):
        def countdown(n):
            return n and countdown(n - 1)

        assert decode_function(encode_function(countdown).code)(5) == 0

    def test_is_pickled_anew_once_its_closure_is_complete(self):
        def function():
            return later

        with pytest.raises(NameError):
            decode_function(encode_function(function).code)()
        later = 1
        assert decode_function(encode_function(function).code)() == 1

    def test_tells_of_futures_inside(self):
        ref = Ref("k")
        assert encode_function(lambda: ref).contains == ("k",)
        assert encode_function(functools.partial(len, ref)).contains == ("k",)
        assert encode_function(len).contains == ()

    def test_with_much_data_is_refused(self, monkeypatch):
        monkeypatch.setattr(calls, "MAX_CODE", 10_000)
        with pytest.raises(SerializationError, match="pass the data as an argument"):
            encode_function(functools.partial(len, b"x" * 20_000))

    def test_of_another_version_is_refused_and_says_which(self):
        code = encode_function(len).code
        major, minor = sys.version_info[:2]
        other = code.replace(f"[{major}, {minor}]".encode(), b"[3, 1]")
        with pytest.raises(VersionMismatchError, match=rf"python 3\.1 there and {major}\.{minor} here"):
            decode_function(other)

    def test_that_is_none_of_ours_is_refused(self):
        with pytest.raises(DeserializationError):
            decode_function(b"garbage")

    @pytest.mark.parametrize(
        ("func", "name"),
        [
            (module_function, "module_function"),
            (lambda: 1, "lambda"),
            (functools.partial(functools.partial(module_function, 1), 2), "module_function"),
            (Accumulator(), "Accumulator"),
            (np.sin, "sin"),
            ("".join, "join"),
        ],
    )
    def test_has_a_short_name(self, func, name):
        assert name_of(func) == name

    def test_whose_name_is_no_name_gets_one(self):
        def f():
            pass

        f.__name__ = "1 bad\nname"
        assert name_of(f) == "f_1badname"
        f.__name__ = ""
        assert name_of(f) == "function"


class TestCall:
    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [((), {}), ((1, "a", None), {}), ((), {"k": 2.5}), (([1], {"x": (2,)}), {"y": {3}})],
    )
    def test_without_futures_arrives_as_it_was(self, args, kwargs):
        payload = encoded(*args, **kwargs)
        assert payload.deps == ()
        assert arrived(payload) == (args, kwargs)

    def test_has_values_in_the_place_of_futures_at_any_depth(self):
        a, b = Ref("a"), Ref("b")
        args = (a, [b, (a, {"k": b})], {a}, frozenset([b]), Point(a, 1), OrderedDict(z=b), [1, 2])
        payload = encoded(*args, named=[a])
        assert payload.deps == ("a", "b")
        got, named = arrived(payload, a=10, b=20)
        assert got == (
            10,
            [20, (10, {"k": 20})],
            {10},
            frozenset([20]),
            Point(10, 1),
            OrderedDict(z=20),
            [1, 2],
        )
        assert [type(x) for x in got[2:6]] == [set, frozenset, Point, OrderedDict]
        assert named == {"named": [10]}

    def test_has_one_object_for_futures_of_one_key(self):
        (first, [second]), _ = arrived(encoded(Ref("a"), [Ref("a")]), a=[1])
        assert first is second

    def test_puts_a_value_that_is_a_container_into_a_set_only_if_it_can(self):
        with pytest.raises(DeserializationError, match="unhashable"):
            arrived(encoded({Ref("a")}), a=[1])

    def test_depends_on_futures_in_objects_which_arrive_as_they_are(self):
        payload = encoded(Ref("a"), Box(Ref("b")), Box(Ref("a")))
        assert payload.deps == ("a", "b")
        (value, b, a), _ = arrived(payload, a=1, b=2)
        assert (value, b.content.key, a.content.key) == (1, "b", "a")

    def test_leaves_dict_keys_alone(self):
        key = Ref("k")
        payload = encoded({key: 1})
        assert payload.deps == ("k",)  # found while pickling

    def test_asks_for_the_key_of_each_future(self):
        def refuse(ref):
            raise ValueError("not here")

        with pytest.raises(ValueError, match="not here"):
            encode_call(([Ref("a")],), {}, Ref, refuse)

    def test_may_nest_another_call_while_it_is_unpickled(self):
        inner = encoded(Ref("x"))

        class Nested:
            def __reduce__(self):
                return _decode_inner, (inner.data,)

        payload = encoded([Ref("a"), Nested(), Ref("b")])
        assert arrived(payload, a=1, b=2)[0] == ([1, "inner", 2],)

    def test_of_a_function_as_argument_calls_it(self):
        assert call(module_function, 1, y=2) == 3


def _decode_inner(data):
    return decode_call(data, ["x"], ["inner"])[0][0]


class TestNode:
    def node(self, *args, deps=(), **kwargs):
        return encode_node(args, kwargs, list(deps), TaskRef, is_node, str)

    def test_has_values_in_the_place_of_references(self):
        payload = self.node(TaskRef("a"), 5, k=TaskRef("b"), deps=["b", "a"])
        assert payload.deps == ("b", "a")
        assert payload.data[:1] == calls.CALL
        assert arrived(payload, a=1, b=2) == ((1, 5), {"k": 2})

    def test_evaluates_nested_nodes_before_the_call(self):
        nested = List(TaskRef("a"), Task("inner", operator.neg, TaskRef("b")))
        payload = self.node(nested, deps=["a", "b"])
        assert payload.data[:1] == calls.NODE
        assert arrived(payload, a=1, b=2) == (([1, -2],), {})

    def test_evaluates_nodes_among_named_arguments(self):
        payload = self.node(k=List(TaskRef("a")), deps=["a"])
        assert arrived(payload, a=1) == ((), {"k": [1]})

    def test_depends_on_futures_in_objects_too(self):
        assert self.node(TaskRef("a"), Box(Ref("z")), deps=["a"]).deps == ("a", "z")


class TestToken:
    def test_is_equal_for_equal_calls(self):
        assert token(1, "a", k=None) == token(1, "a", k=None)
        assert token([1], k={"x": 2}) == token([1], k={"x": 2})
        assert token(np.arange(3)) == token(np.arange(3))
        assert token(a=1, b=2) == token(b=2, a=1)
        assert token(a=[1], b=2) == token(b=2, a=[1])

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (1, 2),
            (1, 1.0),
            (1, True),
            (0.0, -0.0),
            ("1", 1),
            ("1", b"1"),
            (Color.RED, 1),
            ((1,), 1),
            ([1], (1,)),
            (None, 0),
            (Ref("a"), ("a",)),
            (Ref("a"), Ref("b")),
            (2**70, 2**71),
            (float("nan"), 1.0),
            ("a" * 1000, "a" * 1001),
        ],
    )
    def test_differs_for_different_arguments(self, one, other):
        assert token(one) != token(other)
        assert token(one) == token(one)

    def test_differs_by_function_and_by_the_way_arguments_are_given(self):
        assert token(1) != token(1, func=operator.neg)
        assert token(1, 2) != token(1, y=2)
        assert token("y", 2) != token(y=2)
        assert token((1, 2)) != token(1, 2)

    def test_does_not_depend_on_who_else_holds_the_objects(self):
        text = "".join(["in", "terned"])
        assert token(text, text) == token("".join(["inter", "ned"]), sys.intern("interned"))

    def test_takes_futures_by_key(self):
        assert token(Ref("a")) == token(Ref("a"))
        assert token([Ref("a")]) == token([Ref("a")])
