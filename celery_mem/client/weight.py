"""What the arguments of one call weigh: large ones are better scattered, and too large ones are refused."""

from __future__ import annotations

import os
import sys
import warnings

from celery_mem.config import Settings
from celery_mem.errors import PayloadTooLargeError

LIGHT = 10_000
"""Bytes of arguments that count for nothing: a million tasks with a number each are no heavy call."""
_OWN = os.path.dirname(os.path.dirname(__file__)) + os.sep


class Weight:
    """The pickled arguments of one call together.

    Args:
        settings: `payload_limit` and `payload_warning`, of which 0 is none.
    """

    def __init__(self, settings: Settings) -> None:
        self._limit = settings.payload_limit
        self._warns_above = settings.payload_warning
        self._nbytes = 0
        self._largest = 0, ""

    def add(self, key: str, nbytes: int) -> None:
        """Add the arguments of a task, which are more than `LIGHT`.

        Raises:
            PayloadTooLargeError: they are above `mem_payload_limit`.
        """
        if 0 < self._limit < nbytes:
            raise PayloadTooLargeError(key, nbytes, int(self._limit))
        self._nbytes += nbytes
        self._largest = max(self._largest, (nbytes, key))
        if 0 < self._warns_above < self._nbytes:
            self._warns_above = 0  # once in a call
            size, name = self._largest
            warnings.warn(
                f"the arguments of this call take {self._nbytes / 1e6:,.1f} MB so far, of which "
                f"{size / 1e6:,.1f} are those of task {name}; all go through Redis. Scatter large data and "
                "pass the future, client.submit(f, client.scatter(data)), or let the tasks load it. "
                "mem_payload_warning sets from what size on this is said",
                UserWarning,
                stacklevel=_depth_of_caller(),
            )


def _depth_of_caller() -> int:
    """Return the stack level, as seen by the caller, of the first frame that is not of this package."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        depth, frame = depth + 1, frame.f_back
    return depth
