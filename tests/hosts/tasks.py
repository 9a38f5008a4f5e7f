"""Functions that these tests run on workers."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import numpy

from tests.tasks import note, redis_of

MIB = 1 << 20


def meet(name: str, n: int) -> str:
    """Wait until `n` tasks have come here under this name; returns the host."""
    redis = redis_of(os.environ["CELERY_MEM_URL"])
    if redis.incr(f"meet:{name}") == n:
        redis.rpush(f"met:{name}", *range(n))
        redis.expire(f"met:{name}", 60)
        redis.unlink(f"meet:{name}")
    assert redis.blpop([f"met:{name}"], 30), "not all came"
    return socket.gethostname()


def make(nbytes: int, fill: int, *meeting: Any) -> tuple[str, Any]:
    """Return the host and an array."""
    host = meet(*meeting) if meeting else socket.gethostname()
    return host, numpy.full(nbytes, fill, dtype="u1")


def total(made: list[tuple[str, Any]], *meeting: Any) -> tuple[str, list[tuple[str, int]]]:
    """Return the host, and of each input where it was made and its sum."""
    sums = [(host, int(array.sum(dtype="u8"))) for host, array in made]
    return (meet(*meeting) if meeting else socket.gethostname()), sums


def spoil(made: tuple[str, Any], *meeting: Any) -> tuple[str, int]:
    """Write all over the input; returns the host and the sum of what was there before."""
    _, array = made
    before = int(array.sum(dtype="u8"))
    array += 1
    return (meet(*meeting) if meeting else socket.gethostname()), before


def produce(name: str, nbytes: int, fill: int) -> Any:
    """Count this run under `name` and return an array."""
    note((os.environ["CELERY_MEM_URL"], name))
    return numpy.full(nbytes, fill, dtype="u1")


def linger(name: str) -> str:
    """Count this run and return the host, once somebody has set `go:<name>`."""
    url = os.environ["CELERY_MEM_URL"]
    note((url, name))
    # Asked again and again: a word that is waited for may be handed to a host that nobody hears any more.
    while not redis_of(url).exists(f"go:{name}"):
        time.sleep(0.05)
    return socket.gethostname()


def consume(array: Any) -> tuple[str, int]:
    """Return the host and the sum of an array."""
    return socket.gethostname(), int(array.sum(dtype="u8"))
