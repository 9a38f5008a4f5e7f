"""Functions that tests run on workers. Those that take a `where` count their runs there: (url, name)."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import operator
import os
import signal
import time
from typing import Any
from uuid import uuid4

from redis import Redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

Where = tuple[str, str]


@functools.cache
def _redis(url: str, pid: int) -> Redis:
    patient = Retry(ConstantBackoff(0.1), 300)  # tests kill Redis under the feet of their tasks
    return Redis.from_url(url, protocol=2, socket_timeout=120, retry=patient)


def redis_of(url: str) -> Redis:
    """A connection for the tasks of this process."""
    return _redis(url, os.getpid())


def note(where: Where) -> None:
    """Count one run: in a set, so that a command that is sent twice counts once."""
    redis_of(where[0]).sadd(f"runs:{where[1]}", uuid4().hex)


def inc(x: Any) -> Any:
    return x + 1


def add(*xs: Any) -> Any:
    return functools.reduce(operator.add, xs)


def counted(where: Where, *xs: Any, seconds: float = 0) -> Any:
    """Count this run, take a while, return the sum."""
    note(where)
    if seconds:
        time.sleep(seconds)
    return sum(xs)


def counted_here(where: Where, seconds: float) -> int:
    """Count this run, take a while, return the process that ran it."""
    note(where)
    time.sleep(seconds)
    return os.getpid()


def spin(where: Where, *, swallows: bool = False) -> None:
    """Run for ever; note how it ends, and if told so, go on all the same."""
    note(where)
    n = 0
    while True:
        try:
            while True:
                n += 1
        except BaseException as error:
            redis_of(where[0]).rpush(f"ended:{where[1]}", f"{type(error).__name__} {error}")
            if not swallows:
                raise


def hold_the_gil(where: Where) -> None:
    """Be for ever in compiled code that gives nobody else in this process a turn."""
    note(where)
    collections.deque(itertools.repeat(None), maxlen=0)


def spin_at_first(where: Where, times: int) -> str:
    """Run for ever the first few times."""
    note(where)
    while redis_of(where[0]).scard(f"runs:{where[1]}") <= times:
        pass
    return "done"


def nap(seconds: float, x: Any) -> Any:
    time.sleep(seconds)
    return x


def wait_for_word(where: Where, result: Any = None) -> Any:
    """Count this run and return when somebody pushes a word to the list `go:<name>`."""
    note(where)
    redis_of(where[0]).blpop([f"go:{where[1]}"], 60)
    return result


def large(where: Where, n: int, fill: int = 1) -> Any:
    """Return a large object, which becomes a blob."""
    import numpy

    note(where)
    return numpy.full(n, fill, dtype="u1")


def step(where: Where, x: Any) -> Any:
    """Count this run and return another array."""
    note(where)
    return x + 1


def total(where: Where, x: Any) -> int:
    note(where)
    return int(x.sum(dtype="u8"))


def here(_: Any = None) -> int:
    """Return the process that runs this."""
    return os.getpid()


def die(where: Where, times: int) -> str:
    """Kill the own process until this has run more than `times` times."""
    note(where)
    if redis_of(where[0]).scard(f"runs:{where[1]}") <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def fibonacci(n: int) -> int:
    """Submit and wait, all the way down."""
    from celery_mem import Client

    if n < 2:
        return n
    client = Client.current()
    left, right = client.submit(fibonacci, n - 1), client.submit(fibonacci, n - 2)
    return int(left.result() + right.result())


def total_and(where: Where, x: Any, y: int) -> int:
    note(where)
    return int(x.sum(dtype="u8")) + y


def large_after_word(where: Where, n: int) -> Any:
    wait_for_word(where)
    import numpy

    return numpy.ones(n, dtype="u1")


hoarded: list[bytes] = []


def hoard(nbytes: int) -> int:
    """Keep so much memory for good; returns the process."""
    hoarded.append(b"x" * nbytes)
    return os.getpid()


def add_slowly(where: Where, x: Any, y: Any) -> Any:
    """Count this run, take a moment, add two arrays."""
    note(where)
    time.sleep(0.01)
    return x + y


def fail_with(text: str, _: Any = None) -> None:
    raise ValueError(text)


def fail_at_first(where: Where, x: Any) -> Any:
    """Fail in the first run."""
    note(where)
    if redis_of(where[0]).scard(f"runs:{where[1]}") < 2:
        raise ValueError("not yet")
    return x


def spin_on(where: Where, _: Any) -> None:
    spin(where)


def wait_for_inner(where: Where, node: str) -> None:
    """Have a task run in this slot that cannot be stopped, and wait for it."""
    from celery_mem import Client

    note(where)
    Client.current().submit(hold_for_ever, (where[0], "inner"), key="inner", workers=node).result()


def hold_for_ever(where: Where) -> None:
    note(where)
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def node_name(_: Any) -> str:
    from celery_mem.graph import inside

    assert inside.worker is not None
    return inside.worker.node
