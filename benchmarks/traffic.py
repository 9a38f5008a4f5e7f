"""Random traffic of one client: submit, hold, release, cancel, and every value compared with plain Python.

`Traffic` knows for each future that it holds what its outcome must be. Clients share work in two ways:
leaves are pure calls on a small pool of numbers, so that several clients hold the same key, and
pickled futures travel between them through a list in Redis (`mailbox`), which may arrive after the
sender has let go.
"""

from __future__ import annotations

import json
import pickle
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, ClassVar

from celery_mem.errors import DataLostError

# --- task functions -------------------------------------------------------------------------------


def inc(x: int) -> int:
    return x + 1


def total(values: list[int]) -> int:
    return sum(values)


def nap(x: int, milliseconds: int) -> int:
    time.sleep(milliseconds / 1e3)
    return x


def zeros(nbytes: int, tag: int) -> bytes:
    return tag.to_bytes(8, "big") + bytes(nbytes)


def size(data: bytes) -> int:
    return len(data)


class ExpectedError(Exception):
    """What `fail` raises; arrives at every dependent too."""


def fail(tag: int) -> int:
    raise ExpectedError(tag)


def sometimes(x: int, tag: str) -> int:
    """Fail every other time, at random; with many retries it ends well."""
    if random.random() < 0.5:
        raise ExpectedError(tag)
    return x


# --- one client ---------------------------------------------------------------------------------------


class MismatchError(AssertionError):
    """A future did not have the outcome that it had to have."""


@dataclass(slots=True)
class Held:
    """A future and its outcome to come: a value, or the type of an error."""

    future: Any
    expected: Any
    # Invariant: a future from the mailbox may turn out cancelled or lost, one of our own may not.
    borrowed: bool = False

    @property
    def is_number(self) -> bool:
        return isinstance(self.expected, int)

    @property
    def fails(self) -> bool:
        return self.expected is ExpectedError


class Traffic:
    """Random operations of one client process.

    Args:
        connect: returns a new client of the cluster under test.
        mailbox: a redis connection for futures on their way to other clients; None sends none.
        max_held: above it, half of what is held is released.
    """

    MAILBOX = "soak:mailbox"
    WEIGHTS: ClassVar[dict[str, float]] = {
        "leaf": 30,
        "join": 25,
        "many": 5,
        "nap": 8,
        "large": 3,
        "failing": 4,
        "flaky": 2,
        "scatter": 3,
        "delayed": 2,
        "check": 25,
        "release": 30,
        "cancel": 10,
        "retry": 2,
        "send": 4,
        "receive": 4,
        "idle": 1,
        "reconnect": 0.3,
    }

    def __init__(
        self, connect: Callable[[], Any], rng: random.Random, mailbox: Any = None, max_held: int = 300
    ) -> None:
        self.connect, self.rng, self.mailbox, self.max_held = connect, rng, mailbox, max_held
        self.client = connect()
        self.held: list[Held] = []
        self.counts: Counter[str] = Counter()

    def run(self, seconds: float, report: Callable[[Counter[str]], None]) -> None:
        """Do random operations for a while, then release everything and close the client."""
        names, weights = list(self.WEIGHTS), list(self.WEIGHTS.values())
        now = time.monotonic()
        end, next_report = now + seconds, now + 1.0
        while now < end:
            name = self.rng.choices(names, weights)[0]
            getattr(self, name)()
            self.counts[name] += 1
            if len(self.held) > self.max_held:
                self.keep(self.rng.sample(self.held, self.max_held // 2))
            now = time.monotonic()
            if now >= next_report:
                report(self.counts)
                next_report = now + 1.0
        for entry in self.held:
            self.verify(entry)
        self.keep([])
        self.client.close()
        report(self.counts)

    # Work.

    def add(self, future: Any, expected: Any, **kw: bool) -> None:
        self.held.append(Held(future, expected, **kw))
        self.counts["futures"] += 1

    def leaf(self) -> None:
        x = self.rng.randrange(500)
        self.add(self.client.submit(inc, x, priority=self.rng.choice((0, 0, 0, 1, -1))), x + 1)

    def join(self) -> None:
        inputs = self.sample([e for e in self.held if e.is_number or e.fails], 1, 6)
        fails = any(entry.fails for entry in inputs)
        expected = ExpectedError if fails else sum(entry.expected for entry in inputs)
        self.add(self.client.submit(total, [entry.future for entry in inputs]), expected)

    def many(self) -> None:
        first, n = self.rng.randrange(500), self.rng.randrange(100)
        for x, future in enumerate(self.client.map(inc, range(first, first + n)), start=first):
            self.add(future, x + 1)

    def nap(self) -> None:
        x = self.rng.randrange(10**9)
        self.add(self.client.submit(nap, x, self.rng.randrange(1, 30)), x)

    def large(self) -> None:
        nbytes, tag = self.rng.choice((70_000, 300_000, 2_000_000)), self.rng.randrange(100)
        data = self.client.submit(zeros, nbytes, tag)
        if self.rng.random() < 0.5:
            self.add(self.client.submit(size, data), nbytes + 8)
        else:
            self.add(data, zeros(nbytes, tag))

    def failing(self) -> None:
        self.add(self.client.submit(fail, self.rng.randrange(50)), ExpectedError)

    def flaky(self) -> None:
        x = self.rng.randrange(10**9)
        self.add(self.client.submit(sometimes, x, uuid.uuid4().hex, retries=60), x)

    def scatter(self) -> None:
        x = self.rng.randrange(10**6)
        [future] = self.client.scatter([x])
        self.add(future, x)

    def delayed(self) -> None:
        from dask import delayed

        first = self.rng.randrange(10**6)
        leaves = [delayed(inc)(x) for x in range(first, first + 5)]
        self.add(self.client.compute(delayed(total)(leaves)), 5 * first + 15)

    # What happens to it.

    def check(self) -> None:
        for entry in self.sample(self.held, 1, 10):
            self.verify(entry)

    def release(self) -> None:
        dropped = {id(entry) for entry in self.sample(self.held, 1, 20)}
        self.keep([entry for entry in self.held if id(entry) not in dropped])

    def cancel(self) -> None:
        self.client.cancel([entry.future for entry in self.sample(self.held, 1, 5)])
        # Other copies of the same keys, and dependents that nobody else holds, are cancelled with them.
        self.keep([entry for entry in self.held if not entry.future.cancelled()])

    def retry(self) -> None:
        if failed := [entry for entry in self.held if entry.fails and entry.future.done()]:
            self.client.retry([self.rng.choice(failed).future])

    def send(self) -> None:
        if self.mailbox is not None:
            for entry in self.sample([e for e in self.held if e.is_number], 1, 1):
                self.mailbox.lpush(self.MAILBOX, pickle.dumps((entry.future, entry.expected)))
                self.mailbox.ltrim(self.MAILBOX, 0, 99)

    def receive(self) -> None:
        letter = self.mailbox.rpop(self.MAILBOX) if self.mailbox is not None else None
        if letter is not None:
            future, expected = pickle.loads(letter)  # unpickling holds the key, if it is still there
            try:
                future.result(timeout=120)
            except (CancelledError, DataLostError):
                return  # its sender let go of it, or of the scattered data that it is made from
            self.add(future, expected, borrowed=True)

    def idle(self) -> None:
        time.sleep(self.rng.uniform(0, 0.5))

    def reconnect(self) -> None:
        self.keep([])
        self.client.close()
        self.client = self.connect()

    # Helpers.

    def sample(self, entries: list[Held], low: int, high: int) -> list[Held]:
        return self.rng.sample(entries, min(len(entries), self.rng.randint(low, high)))

    def keep(self, entries: list[Held]) -> None:
        self.counts["released"] += len(self.held) - len(entries)
        self.held = entries

    def verify(self, entry: Held) -> None:
        """Wait for a future and compare its outcome with the one it must have."""
        self.counts["verified"] += 1
        try:
            got = entry.future.result(timeout=120)
        except ExpectedError:
            got = ExpectedError
        except DataLostError:
            # A task that failed let go of its inputs. Run again, it misses scattered ones that nobody held.
            if not entry.fails:
                raise
            got = ExpectedError
        except CancelledError:
            if entry.borrowed:
                self.keep([other for other in self.held if other is not entry])
                return
            raise
        if got != entry.expected:
            raise MismatchError(f"{entry.future}: got {str(got)[:60]}, expected {str(entry.expected)[:60]}")


def run_client(spec: dict[str, Any]) -> int:
    """Be one client process of the soak: counts go to stdout as JSON lines, a fault as `error`."""
    import redis

    from celery_mem import Client

    rng = random.Random(spec["seed"])
    mailbox = redis.Redis.from_url(spec["url"])

    def say(**entry: Any) -> None:
        print(json.dumps(entry), flush=True)

    try:
        traffic = Traffic(
            lambda: Client(spec["url"], namespace=spec["namespace"]), rng, mailbox, spec["max_held"]
        )
        traffic.run(spec["seconds"], lambda counts: say(counts=counts))
    except Exception as error:
        import traceback

        traceback.print_exc(file=sys.stderr)
        say(error=f"{type(error).__name__}: {error}")
        return 1
    return 0
