"""Whatever somebody without a key writes into records, streams and blobs: nothing runs, all live on."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError

from celery_mem.coordinator.daemon import Coordinator
from celery_mem.errors import CeleryMemError
from celery_mem.graph.errors import error_summary
from celery_mem.graph.keys import text_of
from celery_mem.graph.overview import overview
from celery_mem.memory import blobs
from celery_mem.memory.serialize import dumps
from celery_mem.memory.transit import receive
from celery_mem.monitor.reading import memory_picture
from celery_mem.state.inspect import describe_task
from celery_mem.state.keys import TASK
from tests.conftest import delete_namespace
from tests.security.conftest import KEY, Intruder
from tests.worker.conftest import Space

REFUSALS = (CeleryMemError, ResponseError)
"""What a call may end with on altered records: a text of ours, or of the script that met them."""
ROUNDS = 4
RECORD = ("payload", "given", "deps", "recipe", "value", "result", "error", "blame", "constraint", "prefer")


def double(x: Any) -> Any:
    return 2 * x


@pytest.fixture
def space(redis_server: str, tmp_path: Path) -> Iterator[Space]:
    """A namespace that is in no order in the end, and is deleted as it is."""
    space = Space(redis_server, tmp_path, secret_key=KEY, node_memory=False)
    yield space
    delete_namespace(space.store)
    space.client.close()
    space.store.link.close()


class Nowhere:
    """The outside of a coordinator that has no broker."""

    def send_tickets(self, tickets: Any) -> None: ...

    def stop_worker(self, node: str) -> None: ...

    def delete_queue(self, queue: str) -> None: ...


def altered(chance: random.Random, old: bytes, bomb: bytes) -> bytes:
    """Return what an intruder may write in place of `old`."""
    at = chance.randrange(len(old) + 1)
    return chance.choice(
        [
            b"",
            old[:at],
            old + bomb,
            bomb,
            b"p" + bomb,
            b"cp" + bomb,
            b"S" + bytes(32) + bomb,
            b"S" + old[1:33] + bomb,
            chance.randbytes(chance.randrange(80)),
            old[:at] + bytes([chance.randrange(256)]) + old[at + 1 :],
        ]
    )


@pytest.mark.parametrize("field", RECORD)
def test_altered_records_run_nothing_and_stop_nobody(space: Space, intruder: Intruder, field: str) -> None:
    chance = random.Random(field)
    slot, coordinator = space.slot(), Coordinator(space.store.twin(), Nowhere())
    spoilt = []
    for n in range(ROUNDS):
        x, y = space.submit(double, f"{n}x"), space.submit(double, f"{n}y")
        slot.run_ticket("1")
        assert x.result(timeout=10) == f"{n}x{n}x"
        old = intruder.link.call("HGET", intruder._name(x), TASK[field]) or b""
        intruder.write(x, field, altered(chance, old, intruder.pickle()))
        z = space.submit(double, x)
        given = intruder.link.call("HGET", intruder._name(z), TASK[field]) or b""
        intruder.write(z, field, altered(chance, given, intruder.pickle()))
        spoilt += [x, y, z]
        slot.run_ticket("1")
        coordinator.run_once(1e9 * (n + 1))
        for look in (overview, memory_picture, partial(describe_task, key_text=text_of(x.key))):
            with contextlib.suppress(*REFUSALS):
                look(space.store)
        assert not intruder.trace.exists()
    for future in spoilt:
        intruder.link.call("DEL", intruder._name(future))
    after = space.submit(double, "after")
    slot.run_ticket("1")
    assert after.result(timeout=10) == "afterafter"
    assert not intruder.trace.exists()


@pytest.mark.parametrize(
    "data", [b"", b"3\n", b"[]\n", b'"x"\n', b"null\n", b"\xff\xfe\n", b"[" * 100_000, b"S", b"{}\n\x80\x05"]
)
def test_an_error_of_any_bytes_has_a_summary(data: bytes) -> None:
    assert error_summary(data) == ("?", "", "")


def test_altered_notices_cost_no_other_notice(space: Space, intruder: Intruder) -> None:
    chance = random.Random("notices")
    future = space.submit(double, 1)
    session = space.client.session
    stream = space.store.keys.of("notices", session.id)
    key = text_of(future.key).encode()
    for _ in range(100):
        name = chance.choice([key, b"", b"\xff", b"unknown"])
        notice = chance.choice([b"", b"x", b"1", b"1 ", b"-1 m", b"9" * 5000 + b" m", b"1 l\xff", b"x r"])
        intruder.link.call("XADD", stream, "*", name, notice)
    other = space.submit(double, 2)
    space.slot().run_ticket("1")
    assert other.result(timeout=10) == 4
    assert session.listener.is_alive()


@pytest.mark.parametrize("field", ["h", "c"])
def test_a_blob_with_an_altered_head_or_checksum_is_damaged(
    space: Space, intruder: Intruder, field: str
) -> None:
    link, name = intruder.link, space.store.keys.blob("token", "key")
    frames = dumps(bytearray(1000))
    for wrong in (b"", b"!", b"p" + intruder.pickle(), b"\xff" * 8, b"\xff" * 9):
        link.call("DEL", name)
        blobs.write(link, blobs.write_commands(name, frames, piece_bytes=1 << 20, lease_s=60))
        assert blobs.read(link, name) is not None
        link.call("HSET", name, field, wrong)
        if len(wrong) != 8:  # a size that was made up is a matter of `receive`
            assert blobs.read(link, name) is None
        assert not receive(link, name, lambda sizes: [memoryview(bytearray(size)) for size in sizes])
        assert not intruder.trace.exists()
