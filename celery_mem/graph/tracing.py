"""OpenTelemetry: the span that is current where a task is submitted goes along with its call.

Only with the package `opentelemetry-api`, and only while there is such a span: a process that never imported
the package has none, and is not made to import it.
"""

from __future__ import annotations

import functools
import json
import struct
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

TRACED = b"o"
"""Before the first byte of a call that belongs to a trace: this, a length, and so many bytes of JSON."""
OFF = "off"
_LENGTH = struct.Struct("<I")
_API = "opentelemetry.trace"


def current_context(mode: str) -> bytes:
    """Return what tells a worker of the current span: the headers of W3C Trace Context, as JSON.

    Args:
        mode: the setting `mem_tracing`.
    Returns:
        nothing if there is no span.
    """
    if not _is_in_span(mode):
        return b""
    from opentelemetry import propagate

    headers: dict[str, str] = {}
    propagate.inject(headers)
    return json.dumps(headers, separators=(",", ":")).encode() if headers else b""


def with_context(payload: bytes, context: bytes) -> bytes:
    """Return the payload of a call that belongs to a trace; as it is if there is no context."""
    return TRACED + _LENGTH.pack(len(context)) + context + payload if context else payload


def context_of(payload: bytes) -> tuple[bytes, bytes]:
    """Return the context of a call, and its payload without that."""
    if payload[:1] != TRACED:
        return b"", payload
    begin = 1 + _LENGTH.size
    end = begin + _LENGTH.unpack_from(payload, 1)[0]
    return payload[begin:end], payload[end:]


def _is_in_span(mode: str) -> bool:
    if mode == OFF or (trace := sys.modules.get(_API)) is None:
        return False
    current = getattr(trace, "get_current_span", None)  # None while another thread imports it
    return current is not None and bool(current().get_span_context().is_valid)


_Method = TypeVar("_Method", bound=Callable[..., Any])


def traced(method: _Method) -> _Method:
    """Make calls of a method spans of their own, named after it, where they happen inside a span.

    Its object has `settings`.
    """
    name = f"celery_mem.{method.__name__}"

    @functools.wraps(method)
    def inside_span(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_in_span(self.settings.tracing):
            return method(self, *args, **kwargs)
        with tracer().start_as_current_span(name):
            return method(self, *args, **kwargs)

    return cast(_Method, inside_span)


def tracer() -> Any:
    """Return the tracer of this package; raises ImportError without OpenTelemetry."""
    from opentelemetry import trace

    from celery_mem import __version__

    return trace.get_tracer("celery_mem", __version__)
