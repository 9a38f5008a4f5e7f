"""Keys as text: canonical, reversible, keeping types apart."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from celery_mem.graph.keys import key_of, text_of

texts = st.text(st.characters(), max_size=12)
plain = st.one_of(texts, st.integers(), st.floats(allow_nan=False, allow_infinity=False))
keys = st.recursive(plain, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=8)


def same(a, b):
    """Equal, and of the same types throughout; 0.0 and -0.0 differ."""
    if type(a) is not type(b):
        return False
    if type(a) is tuple:
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and (type(a) is not float or math.copysign(1, a) == math.copysign(1, b))


@given(keys)
@example("inf")
@example("nan")
@example("True")
@example("None")
@example("")
@example("a b\nc")
@example("1")
@example("('x', 1)")
@example("\ud800")
@example("x\u2028")
@example(("a'b\"c", (-1, 1e300, ("",))))
def test_every_key_comes_back_as_it_was(key):
    assert same(key_of(text_of(key)), key)


@given(keys, keys)
def test_different_keys_have_different_texts(a, b):
    assert (text_of(a) == text_of(b)) == same(a, b)


@given(keys)
@example("@x")
def test_a_text_fits_where_it_is_written(key):
    text = text_of(key)
    assert "\n" not in text
    assert text
    assert not text.startswith("@")
    text.encode()


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("inc-1a2b", "inc-1a2b"),
        ("with space", "with space"),
        ("ünï", "ünï"),
        ("1", "'1'"),
        (1, "1"),
        (1.0, "1.0"),
        (("add", 0, 1), "('add', 0, 1)"),
        ("('add', 0, 1)", "\"('add', 0, 1)\""),
        (("x",), "('x',)"),
        ((), "()"),
        ("inf", "'inf'"),
    ],
)
def test_the_text_is_what_a_person_expects(key, text):
    assert text_of(key) == text


@pytest.mark.parametrize(
    "key", [None, True, b"x", 1j, [1], {1}, {"a": 1}, object(), ("x", None), ("x", (b"y",)), frozenset()]
)
def test_a_key_of_another_type_is_refused(key):
    with pytest.raises(TypeError, match="a key is a string, an int, a float or a tuple of these"):
        text_of(key)


@pytest.mark.parametrize("key", [float("nan"), float("inf"), ("x", -float("inf"))])
def test_a_key_that_is_not_finite_is_refused(key):
    with pytest.raises(TypeError, match="finite"):
        text_of(key)


def test_the_part_at_fault_is_named():
    with pytest.raises(TypeError, match=r"NoneType: \('x', None\) \(its part None\)"):
        text_of(("x", None))
