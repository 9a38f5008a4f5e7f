"""Results on their way between hosts, in a stream."""

from __future__ import annotations

import os
import socket
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.exceptions import ResponseError

from celery_mem.errors import RedisUnavailableError
from celery_mem.memory import blobs
from celery_mem.memory.serialize import Frames
from celery_mem.memory.transit import publish, receive
from tests.conftest import fake_link

NAME = "{test}:b:transit-1:key"


@pytest.fixture(params=["redis", "fakeredis"])
def link(request, make_store):
    link = make_store().link if request.param == "redis" else fake_link()
    yield link
    link.call("UNLINK", NAME)


class Memory:
    """What `receive` fills."""

    def __init__(self):
        self.parts = []

    def make(self, sizes):
        self.parts = [bytearray(n) for n in sizes]
        return [memoryview(p) for p in self.parts]


def fetch(link, **options):
    memory = Memory()
    return [bytes(p) for p in memory.parts] if receive(link, NAME, memory.make, **options) else None


PARTS = [b"head", b"", os.urandom(300_000), b"x" * 5, os.urandom(70_000)]


@pytest.mark.parametrize("piece_bytes", [4, 1000, 65_536, 100_000, 1 << 20])
def test_parts_come_back_whole_whatever_the_size_of_pieces(link, piece_bytes):
    parts = PARTS if piece_bytes > 4 else [b"head", b"abcdefghijk", b""]
    seen = []
    n = publish(link, NAME, parts[0], parts[1:], piece_bytes=piece_bytes, lease_s=60, on_piece=seen.append)
    assert seen == list(range(n))
    assert fetch(link) == parts
    assert 0 < link.call("PTTL", NAME) <= 60_000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6), st.integers(1, 50))
def test_parts_of_any_size_come_back(make_store, parts, piece_bytes):
    if not _links:
        _links.append(make_store().link)
    publish(_links[0], NAME, parts[0], parts[1:], piece_bytes=piece_bytes, lease_s=60)
    assert fetch(_links[0]) == parts
    _links[0].call("UNLINK", NAME)


_links = []


def test_it_reads_what_blobs_write_and_the_reverse(link):
    frames = Frames(PARTS[0], [memoryview(p) for p in PARTS[1:]], ())
    blobs.write(link, blobs.write_commands(NAME, frames, piece_bytes=1000, lease_s=60))
    assert fetch(link) == PARTS
    publish(link, NAME, PARTS[0], PARTS[1:], piece_bytes=1000, lease_s=60)
    head, buffers = blobs.read(link, NAME)
    assert [bytes(p) for p in (head, *buffers)] == PARTS


def test_what_is_not_there_is_not_received(link):
    assert fetch(link) is None
    publish(link, NAME, PARTS[0], PARTS[1:], piece_bytes=1000, lease_s=60)
    link.call("HDEL", NAME, "7")
    assert fetch(link) is None
    assert link.call("PING") in (b"PONG", True)  # and the link is as good as before


def test_a_reader_may_start_before_the_writer_is_done(link):
    """A piece that is not there yet is waited for, while pieces behind it are there already."""
    publish(link, NAME, PARTS[0], PARTS[1:], piece_bytes=10_000, lease_s=60)
    late = {i: link.call("HGET", NAME, i) for i in (0, 3, 4, 8, 37)}
    link.call("HDEL", NAME, *late)
    waits = []

    def wait():
        waits.append(1)
        i = min(late)
        link.call("HSET", NAME, i, late.pop(i))
        return True

    assert fetch(link, wait=wait) == PARTS
    assert len(waits) == 5


def test_an_error_reply_is_raised_and_the_link_goes_on(link):
    link.call("HSET", NAME, "h", (8).to_bytes(8, "little"))
    link.call("UNLINK", NAME)

    def make(sizes):
        link.call("UNLINK", NAME)
        link.call("SET", NAME, "a string")
        return [memoryview(bytearray(n)) for n in sizes]

    link.call("HSET", NAME, "h", (8).to_bytes(8, "little"))
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        receive(link, NAME, make)
    assert link.call("GET", NAME) == b"a string"


class Proxy:
    """Passes bytes on to a Redis and breaks each connection after some bytes from it."""

    def __init__(self, path, limit):
        self.path, self.limit, self.broken = path, limit, 0
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.url = f"redis://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            try:
                ours, _ = self.listener.accept()
            except OSError:
                return
            theirs = socket.socket(socket.AF_UNIX)
            theirs.connect(self.path)
            for args in ((ours, theirs, 1 << 60), (theirs, ours, self.limit)):
                threading.Thread(target=self.pump, args=args, daemon=True).start()

    def pump(self, source, target, limit):
        try:
            while limit > 0 and (data := source.recv(min(limit, 65_536))):
                target.sendall(data)
                limit -= len(data)
            self.broken += limit <= 0
        except OSError:
            pass
        for sock in (source, target):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()


@pytest.fixture
def broken_link(redis_server):
    from celery_mem.state.link import Link, make_pool

    proxies, links = [], []

    def make(limit, **options):
        proxies.append(Proxy(redis_server.removeprefix("unix://"), limit))
        links.append(Link(make_pool(proxies[-1].url), **options))
        return links[-1], proxies[-1]

    yield make
    for link in links:
        link.close()
    for proxy in proxies:
        proxy.listener.close()


def test_a_connection_that_breaks_again_and_again_is_replaced(make_store, broken_link):
    link, proxy = broken_link(150_000)
    store = make_store()
    publish(store.link, NAME, PARTS[0], PARTS[1:], piece_bytes=50_000, lease_s=60)
    assert fetch(link) == PARTS
    assert proxy.broken >= 2
    store.link.call("UNLINK", NAME)


def test_one_that_never_gets_on_is_given_up(make_store, broken_link):
    link, _ = broken_link(40_000, retry_timeout=0.3)
    store = make_store()
    publish(store.link, NAME, PARTS[0], PARTS[1:], piece_bytes=50_000, lease_s=60)
    with pytest.raises(RedisUnavailableError, match="keeps breaking"):
        fetch(link)
    store.link.call("UNLINK", NAME)


def test_a_result_of_more_than_512_megabytes(make_store):
    import numpy as np

    link = make_store().link
    big = np.zeros((600 << 20) // 8)
    big[-1] = 5
    publish(link, NAME, b"head", [big], piece_bytes=64 << 20, lease_s=60)
    out = np.empty_like(big)
    assert receive(link, NAME, lambda sizes: [memoryview(bytearray(sizes[0])), memoryview(out).cast("B")])
    assert out[-1] == 5
    link.call("UNLINK", NAME)
