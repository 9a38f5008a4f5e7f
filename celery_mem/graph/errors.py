"""A task's error as it travels: readable without unpickling, and the exception itself if it can be rebuilt.

The bytes are one line of JSON, then pickles. The JSON says class, message and traceback of the error, and in
`chain` class, message and frames of the error and of each one behind it (`raise ... from ...`). The pickles
are those exceptions, in the same order.
"""

from __future__ import annotations

import json
import pickle
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

from tblib import Traceback

from celery_mem.errors import CeleryMemError, RemoteError
from celery_mem.memory.seal import strip
from celery_mem.memory.serialize import dumps, loads_inline

MAX_PICKLE = 1 << 20
MAX_TEXT = 64 << 10
MAX_FRAMES = 100
MAX_CHAIN = 8


class _Link(NamedTuple):
    """An error of a chain, and which attribute of the one before it says so."""

    error: BaseException
    how: str


def encode_error(error: BaseException, *, skip_frames: int = 0, key: str = "") -> bytes:
    """Return the bytes of an error. Never fails, whatever the exception's class does.

    Args:
        skip_frames: frames at the top of the traceback that belong to us, not to the task.
        key: key text of the task that raised it.
    """
    tb = error.__traceback__
    for _ in range(skip_frames):
        tb = tb.tb_next if tb is not None else None
    links = list(_chain(error))
    head = {
        "key": key,
        "type": _name(error),
        "message": message_of(error),
        "traceback": text_of(error, tb)[-MAX_TEXT:],
        "chain": [
            {
                "type": _name(link.error),
                "message": message_of(link.error),
                "how": link.how,
                "frames": _frames(tb if link.error is error else link.error.__traceback__),
            }
            for link in links
        ],
    }
    body = pickle.dumps([_pickled(link.error) for link in links])
    return json.dumps(head, default=str).encode() + b"\n" + body


def _chain(error: BaseException) -> Iterator[_Link]:
    seen: set[int] = set()
    link: _Link | None = _Link(error, "")
    while link is not None and id(link.error) not in seen and len(seen) < MAX_CHAIN:
        yield link
        error = link.error
        seen.add(id(error))
        if error.__cause__ is not None:
            link = _Link(error.__cause__, "__cause__")
        elif error.__context__ is not None and not error.__suppress_context__:
            link = _Link(error.__context__, "__context__")
        else:
            link = None


def text_of(error: BaseException, tb: TracebackType | None) -> str:
    """Return the lines that Python would print. Never fails, whatever the exception's class does."""
    try:
        return "".join(traceback.format_exception(type(error), error, tb))
    except Exception:
        return f"{_name(error)}: (its traceback cannot be printed)"


def _name(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


def message_of(error: BaseException) -> str:
    """Return the text of an error. Never fails, whatever the exception's class does."""
    try:
        return str(error)[:MAX_TEXT]
    except Exception:
        return "(its text cannot be made)"


def _frames(tb: TracebackType | None) -> list[tuple[str, str, int, str]]:
    """File, function, line and module of each frame; of very many only the first and last ones."""
    frames = []
    while tb is not None:
        code = tb.tb_frame.f_code
        module = str(tb.tb_frame.f_globals.get("__name__", "?"))
        frames.append((code.co_filename, code.co_name, tb.tb_lineno, module))
        tb = tb.tb_next
    half = MAX_FRAMES // 2
    return frames if len(frames) <= MAX_FRAMES else frames[:half] + frames[-half:]


def _pickled(error: BaseException) -> bytes:
    """Return the exception as it can be rebuilt anywhere; empty if it cannot."""
    for form in (_ByItself(error), _ByItsArgs(error)):
        try:
            body = dumps(form, "exception").inline()
            if len(body) <= MAX_PICKLE and type(loads_inline(body)) is type(error):
                return body
        except Exception:  # noqa: S112 (any class may fail here in any way; RemoteError stands in)
            continue
    return b""


class _ByItself:
    """Pickles an exception in its class's own way, whatever a library has taught pickle to do instead.

    One that Dask uses takes tracebacks along, and leaves out what a UnicodeDecodeError is made of.
    """

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return self.error.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


class _ByItsArgs:
    """Pickles an exception whose `__init__` does not take its own `args`, as one with two arguments often."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self.error), self.error.args, self.error.__dict__)


def _rebuild(kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


def decode_error(data: bytes) -> tuple[BaseException, TracebackType | None]:
    """Return the exception, with those behind it, and the traceback of the task that raised it.

    An exception that cannot be rebuilt here becomes a RemoteError with its class name, text and traceback.
    """
    line, _, body = data.partition(b"\n")
    try:
        head: dict[str, Any] = json.loads(line)
    except ValueError:
        return CeleryMemError(f"the stored error is unreadable ({len(data)} bytes)"), None
    pickles: list[bytes] = pickle.loads(body) if body else []
    parts: list[dict[str, Any]] = head.get("chain") or [head]
    errors = [
        _decoded(part, pickles[i] if i < len(pickles) else b"", "" if i else head.get("traceback", ""))
        for i, part in enumerate(parts)
    ]
    tracebacks = [_traceback(part.get("frames")) for part in parts]
    for i, part in enumerate(parts):
        if i > 0:
            setattr(errors[i - 1], part["how"], errors[i].with_traceback(tracebacks[i]))
    try:
        return errors[0], tracebacks[0]
    finally:
        # The frames in the tracebacks were made below this one and refer to it. If it referred to them, the
        # error would live until the cyclic collector runs, and with it the futures in the frames it passes.
        del errors, tracebacks


def _decoded(part: dict[str, Any], body: bytes, traceback_text: str) -> BaseException:
    if body:
        try:
            error = loads_inline(body)
            if isinstance(error, BaseException):
                return error
        except CeleryMemError:
            pass
    error = RemoteError(part.get("type", "?"), part.get("message", ""), traceback_text)
    if traceback_text:
        error.add_note(
            "The exception could not be rebuilt in this process. Traceback of the task:\n" + traceback_text
        )
    return error


def _traceback(frames: list[tuple[str, str, int, str]] | None) -> TracebackType | None:
    found: dict[str, Any] | None = None
    for filename, name, line, module in reversed(frames or ()):
        found = {
            "tb_frame": {
                "f_globals": {"__name__": module},
                "f_code": {"co_filename": filename, "co_name": name},
                "f_lineno": line,
            },
            "tb_lineno": line,
            "tb_next": found,
        }
    return None if found is None else Traceback.from_dict(found).as_traceback()


def error_summary(data: bytes) -> tuple[str, str, str]:
    """Return class name, message and traceback text of an error, without unpickling; of any bytes at all."""
    try:
        head = json.loads(strip(data).partition(b"\n")[0])
    except (ValueError, RecursionError):
        return "?", "", ""
    if not isinstance(head, dict):
        return "?", "", ""
    return str(head.get("type", "?")), str(head.get("message", "")), str(head.get("traceback", ""))


def error_line(data: bytes) -> str:
    """Return class and message of an error as a traceback ends with them, without unpickling."""
    kind, message, _ = error_summary(data)
    return f"{kind.rpartition('.')[2]}: {message}"
