"""Keys of tasks as text and back. Dask keys are strings, numbers and nested tuples of them.

The text names a key in Redis, in Flower and on the command line. It is canonical (one text per key),
reversible, and keeps types apart: `1`, `1.0` and `'1'` are three keys. A plain name stands for itself, all
else is written as a Python literal.
"""

from __future__ import annotations

import ast
import math
from typing import TypeAlias

Key: TypeAlias = str | int | float | tuple["Key", ...]

_AMBIGUOUS = frozenset({"inf", "nan", "True", "False", "None"})


def text_of(key: Key) -> str:
    """Return the text form of `key`.

    Raises:
        TypeError: `key` is no string, int, float or nested tuple of them.
    """
    if type(key) is str:
        return key if _is_plain(key) else repr(key)
    _check(key, key)
    return repr(key)


def key_of(text: str) -> Key:
    """Return the key whose text form is `text`."""
    if _is_plain(text):
        return text
    if text in ("inf", "-inf", "nan"):
        return float(text)
    key: Key = ast.literal_eval(text)
    return key


def _is_plain(text: str) -> bool:
    # Texts that no literal begins like. Holders are lines "id epoch", and "@" marks a result among them.
    first = text[:1]
    return (first.isalpha() or first == "_") and text.isprintable() and text not in _AMBIGUOUS


def _check(key: object, whole: object) -> None:
    kind = type(key)
    if kind in (str, int):
        return
    if kind is float:
        if not math.isfinite(key):  # type: ignore[arg-type]
            raise TypeError(f"a key must be finite to be found again: {whole!r}")
        return
    if kind is tuple:
        for part in key:  # type: ignore[attr-defined]
            _check(part, whole)
        return
    where = "" if key is whole else f" (its part {key!r})"
    raise TypeError(
        f"a key is a string, an int, a float or a tuple of these, not {kind.__name__}: {whole!r}{where}"
    )
