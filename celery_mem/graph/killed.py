"""The error of a task whose slots died too often, made where nothing may be pickled."""

from __future__ import annotations

import json


def killed_error(slot: str) -> bytes:
    """Return the error, in the form of graph/errors.py."""
    text = f"the process that ran this task was killed again and again, the last time {slot}"
    head = {"type": "celery_mem.errors.KilledWorker", "message": text, "traceback": "", "frames": None}
    return json.dumps(head).encode() + b"\n"
