"""A call as it travels: the function once, by hash; the arguments per task, with places for inputs.

A future directly in the arguments or in built-in containers there becomes a place that the worker fills with
the value. One anywhere else is found while pickling; it too is a dependency, and arrives as a future.
"""

from __future__ import annotations

import functools
import hashlib
import json
import marshal
import struct
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import cloudpickle

from celery_mem.errors import DeserializationError, SerializationError, VersionMismatchError
from celery_mem.memory.serialize import SIMPLE, dumps, inline_simple, loads_inline

CALL = b"c"
NODE = b"d"
PLACED = b"e"
"""First byte of a payload: a plain call, one whose arguments may be Dask nodes, or one with a third part
beside args and kwargs: for each of the args the number of the input that it is, -1 for none."""
TIMED = b"t"
"""Before the first byte of a call with a time limit: this, and the seconds as a double."""

_DOUBLE = struct.Struct("<d")


class Function(NamedTuple):
    """A pickled function: its hash, the bytes, a name for people, and key texts of the futures inside it."""

    hash: str
    code: bytes
    name: str
    contains: tuple[str, ...] = ()


class Payload(NamedTuple):
    """Pickled arguments and the key texts that they need, each once."""

    data: bytes
    deps: tuple[str, ...]


class Place:
    """Where a worker puts an input: it unpickles to the value itself."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[Callable[[int], Any], tuple[int]]:
        return take_input, (self.index,)


class _Inputs(threading.local):
    values: Sequence[Any] = ()


_inputs = _Inputs()


def take_input(index: int) -> Any:
    """Return the input of the payload that this thread is unpickling."""
    return _inputs.values[index]


def name_of(func: Callable[..., Any]) -> str:
    """Return a short name of a function for keys and displays, free of spaces and brackets."""
    while isinstance(func, functools.partial):
        func = func.func
    return tidy_name(str(getattr(func, "__name__", None) or type(func).__name__))


def tidy_name(name: str) -> str:
    """Leave out of a name what would not be plain in a key."""
    name = "".join(c for c in name if c.isalnum() or c in "_-.")
    return name if name[:1].isalpha() or name[:1] == "_" else f"f_{name}"


_functions: weakref.WeakKeyDictionary[Any, tuple[Function, list[Any]]] = weakref.WeakKeyDictionary()

MAX_CODE = 256 << 20


def encode_function(func: Callable[..., Any]) -> Function:
    """Pickle a function; a second time only if what it refers to may have changed meanwhile.

    Raises:
        SerializationError: it cannot be pickled, or carries too much data with it.
    """
    refers_to = _refers_to(func)
    if refers_to is None:
        return _encode_function(func)
    known = _functions.get(func)
    if known is None or not _are_same(known[1], refers_to):
        known = _functions[func] = _encode_function(func), refers_to
    return known[0]


def _encode_function(func: Callable[..., Any]) -> Function:
    name = name_of(func)
    frames = dumps(func, f"function {name}")
    body = frames.inline()
    if len(body) > MAX_CODE:
        raise SerializationError(
            f"function {name} carries {len(body)} bytes of data with it; pass the data as an argument"
        )
    head = json.dumps({"name": name[:200], **_versions()})
    code = head.encode() + b"\n" + body
    return Function(hashlib.blake2b(code, digest_size=16).hexdigest(), code, name, frames.contains)


def _refers_to(func: Callable[..., Any]) -> list[Any] | None:
    """Return the objects that the pickled form of `func` depends on; None: it may depend on others too.

    Nothing for what is imported by its name. For another function its code, and the values of its defaults,
    its closure and the globals that it names, as long as these are modules or cannot change.
    """
    if not isinstance(func, (FunctionType, BuiltinFunctionType, type)):
        return None
    if _is_importable(func):
        return []
    if not isinstance(func, FunctionType) or func.__dict__ or func.__kwdefaults__:
        return None
    values: list[Any] = list(func.__defaults__ or ())
    try:
        values += [cell.cell_contents for cell in func.__closure__ or ()]
    except ValueError:  # a name that is not bound yet
        return None
    names = func.__globals__
    values += [names[name] for name in _names_in(func.__code__) if name in names]
    for value in values:
        if type(value) not in SIMPLE and not isinstance(value, ModuleType) and value is not func:
            return None
    return [func.__code__, *values]


def _is_importable(func: Any) -> bool:
    module = sys.modules.get(func.__module__ or "")
    if module is None or module.__name__ == "__main__" or cloudpickle.list_registry_pickle_by_value():
        return False
    found: Any = module
    for name in func.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is func


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _are_same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


@functools.cache
def _versions() -> dict[str, Any]:
    from importlib.metadata import version

    return {"python": list(sys.version_info[:2]), "dask": version("dask")}


def decode_function(code: bytes) -> Callable[..., Any]:
    """Return the function.

    Raises:
        VersionMismatchError: it was pickled under another minor version of Python, or another Dask.
        DeserializationError: a module that it needs is missing here.
    """
    head, newline, body = code.partition(b"\n")
    try:
        theirs = json.loads(head)
        theirs.pop("name", None)
    except (ValueError, AttributeError):
        raise DeserializationError("the stored function is not one of ours") from None
    ours = _versions()
    if not newline or theirs != ours:
        differ = ", ".join(
            f"{name} {_dotted(theirs.get(name))} there and {_dotted(ours[name])} here"
            for name in ours
            if theirs.get(name) != ours[name]
        )
        raise VersionMismatchError(
            f"client and worker must run the same versions to exchange tasks: {differ}"
        )
    func: Callable[..., Any] = loads_inline(body, "function")
    return func


def _dotted(version: Any) -> str:
    return ".".join(map(str, version)) if isinstance(version, list) else str(version)


def call(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `func`: submitted in place of a function that has futures inside, with that as an argument.

    Workers keep functions; the futures inside would be held as long as they.
    """
    return func(*args, **kwargs)


def encode_call(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    future_type: type,
    text_of_future: Callable[[Any], str],
) -> Payload:
    """Pickle the arguments of a call.

    Args:
        future_type: what counts as a future.
        text_of_future: its key text; may refuse a future that does not belong here.
    """
    index: dict[str, int] = {}

    def place_of(value: Any) -> int | None:
        if isinstance(value, future_type):
            return index.setdefault(text_of_future(value), len(index))
        return None

    short = _encode_short(args, kwargs, place_of)
    if short is not None:
        return Payload(short, tuple(index))
    places: dict[str, Place] = {}
    marked = (
        tuple(_mark(a, places, future_type, text_of_future) for a in args),
        {k: _mark(v, places, future_type, text_of_future) for k, v in kwargs.items()},
    )
    frames = dumps(marked, "arguments")
    return Payload(CALL + frames.inline(), (*places, *(k for k in frames.contains if k not in places)))


def _encode_short(
    args: Sequence[Any], kwargs: Mapping[str, Any], place_of: Callable[[Any], int | None]
) -> bytes | None:
    """Return the payload of a call whose arguments are simple, or inputs, as most are; None of another one.

    Args:
        place_of: number of the input that an argument is; None if it is none.
    """
    if kwargs and any(type(value) not in SIMPLE for value in kwargs.values()):
        return None
    simple, places, has_places = [], [], False
    for value in args:
        if type(value) in SIMPLE:
            simple.append(value)
            places.append(-1)
            continue
        place = place_of(value)
        if place is None:
            return None
        simple.append(None)
        places.append(place)
        has_places = True
    if not has_places:
        return CALL + inline_simple((tuple(args), dict(kwargs)))
    return PLACED + inline_simple((tuple(simple), dict(kwargs), tuple(places)))


def _mark(
    value: Any, places: dict[str, Place], future_type: type, text_of_future: Callable[[Any], str]
) -> Any:
    """Return `value` with places for the futures in built-in containers; itself if there are none."""
    kind = type(value)
    if kind in SIMPLE:
        return value
    if isinstance(value, future_type):
        text = text_of_future(value)
        return places.setdefault(text, Place(len(places)))
    if kind in (list, tuple, set, frozenset):
        if all(type(v) in SIMPLE for v in value):
            return value
        parts = [_mark(v, places, future_type, text_of_future) for v in value]
        if all(a is b for a, b in zip(parts, value, strict=True)):
            return value
        return _Set(kind, parts) if kind in (set, frozenset) else kind(parts)
    if kind in (dict, OrderedDict):
        items = {k: _mark(v, places, future_type, text_of_future) for k, v in value.items()}
        return value if all(items[k] is value[k] for k in items) else kind(items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(_mark(v, places, future_type, text_of_future) for v in value))
    return value


class _Set:
    """A set with places in it: made a set only once they are filled, as their values are what is hashed."""

    def __init__(self, kind: Callable[[list[Any]], Any], parts: list[Any]) -> None:
        self.kind = kind
        self.parts = parts

    def __reduce__(self) -> tuple[Callable[[list[Any]], Any], tuple[list[Any]]]:
        return self.kind, (self.parts,)


def encode_arrangement(arrange: Callable[[list[Place]], Any], keys: Sequence[str]) -> Payload:
    """Pickle an object as the only argument of a call, with inputs in places that are no arguments.

    Args:
        arrange: makes the object from the places of the inputs.
        keys: key text of the input of each place; a key may come more than once.
    """
    index = {text: i for i, text in enumerate(dict.fromkeys(keys))}
    whole = arrange([Place(index[text]) for text in keys])
    frames = dumps(((whole,), {}), "arguments")
    return Payload(CALL + frames.inline(), (*index, *(k for k in frames.contains if k not in index)))


def encode_node(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    deps: Sequence[str],
    ref_type: type,
    is_node: Callable[[Any], bool],
    text_of_key: Callable[[Any], str],
) -> Payload:
    """Pickle the arguments of a Dask node: references directly among them become places, nodes stay nodes.

    Args:
        deps: key texts of everything the node needs.
        ref_type: Dask's reference to a key.
        is_node: tells a nested node.
        text_of_key: text form of a Dask key.
    """
    index = {text: i for i, text in enumerate(deps)}

    def place_of(arg: Any) -> int | None:
        return index[text_of_key(arg.key)] if isinstance(arg, ref_type) else None  # type: ignore[attr-defined]

    short = _encode_short(args, kwargs, place_of)
    if short is not None:
        return Payload(short, tuple(deps))
    nested = False
    out = []
    for arg in args:
        if isinstance(arg, ref_type):
            out.append(Place(index[text_of_key(arg.key)]))  # type: ignore[attr-defined]
        else:
            nested = nested or is_node(arg)
            out.append(arg)
    named = {}
    for name, arg in kwargs.items():
        if isinstance(arg, ref_type):
            named[name] = Place(index[text_of_key(arg.key)])  # type: ignore[attr-defined]
        else:
            nested = nested or is_node(arg)
            named[name] = arg
    frames = dumps((tuple(out), named), "arguments")
    extra = tuple(k for k in frames.contains if k not in index)
    return Payload((NODE if nested else CALL) + frames.inline(), (*deps, *extra))


def call_name(key: str, function: str, deps: Sequence[str]) -> str:
    """Return what a payload belongs to, for its signature: task, function, and inputs in their order."""
    return "\n".join((key, function, *deps))


def with_timeout(payload: bytes, seconds: float | None) -> bytes:
    """Return the payload of a call that may run for so long."""
    return payload if seconds is None else TIMED + _DOUBLE.pack(seconds) + payload


def timeout_of(payload: bytes) -> tuple[float | None, bytes]:
    """Return how long a call may run, in seconds, and its payload without that."""
    if payload[:1] != TIMED:
        return None, payload
    return _DOUBLE.unpack_from(payload, 1)[0], payload[1 + _DOUBLE.size :]


def decode_call(
    payload: bytes,
    deps: Sequence[str],
    values: Sequence[Any],
    accepts: Callable[[Iterable[Any]], bool] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments with the inputs in their places.

    Args:
        deps: key texts, in the order of the payload's places.
        values: the input for each of them.
        accepts: is shown the arguments before Dask's nodes among them are evaluated. None is returned where
            it does not accept them.
    """
    if payload[:1] == PLACED:
        simple, kwargs, places = loads_inline(payload[1:], "arguments")
        args = tuple(values[n] if n >= 0 else a for a, n in zip(simple, places, strict=True))
        return (args, kwargs) if accepts is None or accepts(args) else None
    outer, _inputs.values = _inputs.values, values
    try:
        args, kwargs = loads_inline(payload[1:], "arguments")
    finally:
        _inputs.values = outer
    if accepts is not None and not (accepts(args) and accepts(kwargs.values())):
        return None
    if payload[:1] == NODE:
        from celery_mem.graph.nodes import evaluate

        by_key = dict(zip(deps, values, strict=True))
        args = tuple(evaluate(a, by_key) for a in args)
        kwargs = {k: evaluate(v, by_key) for k, v in kwargs.items()}
    return args, kwargs


def token_of(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], text_of_future: Any) -> str:
    """Return a token that is equal for equal calls: 32 hex digits.

    Simple arguments are hashed as they are; others are given to Dask's tokenize, which costs ten times more.
    """
    simple = _simplified(args, text_of_future)
    if kwargs:
        kwargs = dict(sorted(kwargs.items()))
        named = _simplified(tuple(kwargs.values()), text_of_future)
        simple = None if simple is None or named is None else (simple, tuple(kwargs), named)
    if simple is None:
        from dask.tokenize import tokenize

        token: str = tokenize(func.hash, args, list(kwargs.items()))
        return token
    # Version 2 writes no back references, so equal values give equal bytes whoever else holds them.
    return hashlib.blake2b(marshal.dumps((func.hash, simple), 2), digest_size=16).hexdigest()


def _simplified(args: tuple[Any, ...], text_of_future: Any) -> tuple[Any, ...] | None:
    out = []
    for value in args:
        if type(value) in SIMPLE:
            out.append(value)
        elif getattr(type(value), "__celery_mem_future__", False):
            out.append((text_of_future(value),))
        else:
            return None
    return tuple(out)
