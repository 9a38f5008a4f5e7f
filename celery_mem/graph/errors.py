"""A task's error as it travels: readable without unpickling, and the exception itself where it can be rebuilt.

The bytes are one line of JSON (class, message, traceback as text and as frames), then the pickled exception.
"""

from __future__ import annotations

import json
import pickle
import traceback
from types import TracebackType
from typing import Any

from tblib import Traceback

from celery_mem.errors import CeleryMemError, RemoteError
from celery_mem.memory.serialize import dumps, loads_inline

MAX_PICKLE = 1 << 20
MAX_TEXT = 64 << 10


def encode_error(error: BaseException, *, skip_frames: int = 0) -> bytes:
    """Return the bytes of an error.

    Args:
        skip_frames: frames at the top of the traceback that belong to us, not to the task.
    """
    tb = error.__traceback__
    for _ in range(skip_frames):
        tb = tb.tb_next if tb is not None else None
    text = "".join(traceback.format_exception(type(error), error, tb))
    head = {
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "message": _message(error)[:MAX_TEXT],
        "traceback": text[-MAX_TEXT:],
        "frames": None if tb is None else Traceback(tb).as_dict(),
    }
    return json.dumps(head, default=str).encode() + b"\n" + _pickled(error)


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its text cannot be made)"


def _pickled(error: BaseException) -> bytes:
    try:
        body = dumps(error, "exception").inline()
        if len(body) <= MAX_PICKLE and type(loads_inline(body)) is type(error):
            return body
    except Exception:  # noqa: S110 (any class may fail here in any way; RemoteError stands in)
        pass
    return b""


def decode_error(data: bytes) -> tuple[BaseException, TracebackType | None]:
    """Return the exception and the traceback of the task that raised it.

    An exception that cannot be rebuilt here becomes a RemoteError with its class name, text and traceback.
    """
    line, _, body = data.partition(b"\n")
    try:
        head: dict[str, Any] = json.loads(line)
    except ValueError:
        return CeleryMemError(f"the stored error is unreadable ({len(data)} bytes)"), None
    error: BaseException | None = None
    if body:
        try:
            error = loads_inline(body)
        except (CeleryMemError, pickle.PickleError):
            error = None
    if not isinstance(error, BaseException):
        error = RemoteError(head.get("type", "?"), head.get("message", ""), head.get("traceback", ""))
        error.add_note(
            "The exception could not be rebuilt in this process. Traceback of the task:\n"
            + error.traceback_text
        )
    frames = head.get("frames")
    tb = Traceback.from_dict(frames).as_traceback() if frames else None
    return error, tb


def error_summary(data: bytes) -> tuple[str, str, str]:
    """Return class name, message and traceback text of an error, without unpickling."""
    try:
        head = json.loads(data.partition(b"\n")[0])
    except ValueError:
        return "?", "", ""
    return str(head.get("type", "?")), str(head.get("message", "")), str(head.get("traceback", ""))
