"""How clients are made, what is wrong with an address, and how clients end."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from celery import Celery

import celery_mem
from celery_mem import Client, LocalCluster
from celery_mem.errors import (
    ClosedClientError,
    ConfigError,
    FutureCancelledError,
    RedisUnavailableError,
    StateLostError,
    StoreFullError,
)
from celery_mem.graph.keys import key_of
from celery_mem.state.audit import audit, read
from tests.conftest import delete_namespace, server_program
from tests.on_cluster import count_call, inc, task_keys, until


@contextlib.contextmanager
def redis_with(folder: Path, *options: str) -> Iterator[str]:
    """A Redis of one's own with further options; the address of its socket."""
    program = server_program()
    if program is None:
        pytest.skip("no redis-server")
    path = folder / "own.sock"
    command = [
        program,
        "--port",
        "0",
        "--unixsocket",
        str(path),
        "--save",
        "",
        "--dir",
        str(folder),
        *options,
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            assert until(path.exists)
            yield f"unix://{path}"
        finally:
            process.terminate()


def count_bytes(data: bytes, _: int) -> int:
    return len(data)


class TestAddress:
    @pytest.mark.parametrize(
        ("address", "says"),
        [
            ("nonsense", "not a Redis address"),
            ("http://localhost:6379", "not a Redis address"),
            ("redis://", "no host"),
            ("redis://localhost:port", "not a Redis address"),
            ("unix://", "no socket path"),
            (7, "not 7"),
        ],
    )
    def test_that_is_none_is_refused_at_once(self, address, says):
        with pytest.raises(ConfigError, match=says):
            Client(address)

    def test_where_nobody_listens_is_an_error_within_the_timeout(self, tmp_path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for address in (f"redis://127.0.0.1:{port}", f"unix://{tmp_path}/nobody.sock"):
            started = time.monotonic()
            with pytest.raises(RedisUnavailableError, match="no Redis at"):
                Client(address, timeout=0.3)
            assert time.monotonic() - started < 2

    def test_where_somebody_listens_and_never_answers_is_an_error_within_the_timeout(self):
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            started = time.monotonic()
            with pytest.raises(RedisUnavailableError, match="no Redis at"):
                Client(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout=0.3)
            assert time.monotonic() - started < 2

    def test_where_something_else_answers_is_an_error_that_says_so(self):
        with socket.socket() as web:
            web.bind(("127.0.0.1", 0))
            web.listen()

            def answer() -> None:
                connection, _ = web.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    connection.recv(1000)

            thread = threading.Thread(target=answer)
            thread.start()
            with pytest.raises(RedisUnavailableError, match="is no Redis"):
                Client(f"redis://127.0.0.1:{web.getsockname()[1]}", timeout=0.3)
            thread.join()

    def test_of_the_environment_counts_where_none_is_given(self, cluster, monkeypatch):
        monkeypatch.setenv("CELERY_MEM_URL", cluster.url)
        with Client() as client:
            assert client.submit(inc, 1).result() == 2
        monkeypatch.delenv("CELERY_MEM_URL")
        monkeypatch.setenv("REDIS_URL", cluster.url)
        with Client(set_as_default=False) as client:
            assert client.submit(inc, 1).result() == 2

    def test_of_the_environment_where_nobody_listens_is_an_error_within_the_timeout(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("CELERY_MEM_URL", f"unix://{tmp_path}/nobody.sock")
        with pytest.raises(RedisUnavailableError, match="no Redis at"):
            Client(timeout=0.2)

    def test_may_be_a_celery_app(self, cluster):
        app = Celery("shop", broker=cluster.url.replace("unix://", "redis+socket://"), set_as_current=False)
        app.conf.task_default_queue = "celery-mem.mem"
        for address in (app, celery_mem.install(app, url=cluster.url, inline_limit=1234)):
            with Client(address, set_as_default=False) as client:
                assert client.submit(inc, 1).result() == 2
        assert client.settings.inline_limit == 1234

    def test_of_a_closed_cluster_is_refused(self):
        with LocalCluster(n_workers=0, coordinators=0) as cluster:
            pass
        with pytest.raises(ConfigError, match="closed"):
            Client(cluster)

    def test_never_shows_its_password(self, tmp_path):
        with pytest.raises(RedisUnavailableError) as caught:
            Client("redis://user:secret@127.0.0.1:1/0", timeout=0.1)
        assert "secret" not in str(caught.value)


class TestPassword:
    def test_a_wrong_one_is_refused_at_once(self, tmp_path):
        with redis_with(tmp_path, "--requirepass", "s3cret") as url:
            for wrong in (url, url.replace("unix://", "unix://:wrong@")):
                started = time.monotonic()
                with pytest.raises(RedisUnavailableError, match="password"):
                    Client(wrong)
                assert time.monotonic() - started < 2

    def test_the_right_one_opens(self, tmp_path):
        with (
            redis_with(tmp_path, "--requirepass", "s3cret") as url,
            Client(url.replace("unix://", "unix://:s3cret@"), set_as_default=False) as client,
        ):
            assert client.scatter(5).result(timeout=20) == 5
            assert "s3cret" not in repr(client) + client._repr_html_()


class TestSettings:
    def test_an_unknown_one_is_refused_with_the_nearest(self, cluster):
        with pytest.raises(ConfigError, match="did you mean inline_limit"):
            Client(cluster, inline_limits=5)

    def test_count_for_this_client(self, connect):
        assert connect(inline_limit=10).settings.inline_limit == 10

    def test_the_name_begins_the_id(self, connect):
        client = connect(name="people-know-me")
        assert client.id.startswith("people-know-me-")
        assert client.id in client.info()["clients"]


class TestClose:
    def test_is_silent(self, cluster, caplog, capfd):
        caplog.set_level(logging.INFO)
        for _ in range(5):
            client = Client(cluster, set_as_default=False)
            client.submit(inc, 1).result()
            client.close()
            Client(cluster, set_as_default=False).close()
        assert caplog.text == ""
        assert capfd.readouterr() == ("", "")

    def test_takes_no_time(self, cluster):
        started = time.monotonic()
        for _ in range(5):
            Client(cluster, set_as_default=False).close()
        assert time.monotonic() - started < 2

    def test_ends_its_threads(self, cluster):
        before = set(threading.enumerate())
        client = Client(cluster, set_as_default=False)
        client.submit(inc, 1).add_done_callback(lambda f: None)
        client.close()
        assert until(lambda: set(threading.enumerate()) <= before)

    def test_after_its_redis_has_gone_is_quick_and_without_warning(self, tmp_path, caplog):
        with redis_with(tmp_path) as url:
            client = Client(url, set_as_default=False)
            kept = client.scatter(1)
        started = time.monotonic()
        caplog.clear()
        client.close()
        assert time.monotonic() - started < 5
        assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
        assert kept.cancelled()

    def test_everything_is_refused_afterwards(self, connect):
        client = connect()
        future = client.submit(inc, 1)
        client.close()
        assert client.closed
        for use in (
            lambda: client.submit(inc, 1),
            lambda: client.map(inc, [1]),
            lambda: client.scatter(1),
            lambda: client.scatter([]) or client.future("x"),
            lambda: client.get({"x": 1}, "x"),
            client.info,
            client.processing,
            lambda: client.who_has("x"),
            lambda: client.wait_for_workers(1),
        ):
            with pytest.raises(ClosedClientError, match="closed"):
                use()
        with pytest.raises(FutureCancelledError, match="its client was closed"):
            future.result()
        assert "closed" in repr(client)
        assert "closed" in client._repr_html_()

    def test_a_client_that_started_a_cluster_ends_it(self):
        script = """
            import os
            from celery_mem import Client
            client = Client()
            assert client.submit(abs, -2).result(timeout=60) == 2
            folder = os.path.dirname(client.cluster.url.removeprefix("unix://"))
            client.close()
            print(client.cluster.closed, os.path.exists(folder))
            """
        env = {k: v for k, v in os.environ.items() if k not in ("CELERY_MEM_URL", "REDIS_URL")}
        import textwrap

        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            capture_output=True,
            text=True,
            timeout=100,
            env=env,
            check=False,
        )
        assert (done.stdout, done.stderr) == ("True False\n", "")


class TestShows:
    def test_where_it_is(self, client, cluster):
        assert cluster.url in repr(client)
        assert client.id in repr(client)
        assert "'mem'" in repr(client)
        html = client._repr_html_()
        assert cluster.url in html
        assert client.id in html

    def test_that_it_cannot_be_pickled(self, client):
        with pytest.raises(TypeError, match=r"Client\.current"):
            pickle.dumps(client)


class TestBrokenConnections:
    def test_dropped_at_any_time_lose_and_repeat_nothing(self, connect, cluster, gate):
        client = connect()
        session = client.session
        stop = threading.Event()

        def cut() -> None:
            """Cut the client's own connections, in the middle of whatever it does."""
            pauses = random.Random(0)
            while not stop.wait(pauses.uniform(0.001, 0.02)):
                link = pauses.choice([session.store.link, session.bulk, session.listener.link])
                sock = getattr(link._conn, "_sock", None)
                if sock is not None:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)

        cutter = threading.Thread(target=cut)
        cutter.start()
        try:
            for i in range(20):
                futures = client.map(count_call, [gate] * 20, [f"{i}-{j}" for j in range(20)])
                last = client.submit(sum, futures)
                large = client.scatter(bytes(300_000), hash=False)
                assert client.gather([last, client.submit(len, large)], timeout=60) == [20, 300_000]
                assert len(large.result(timeout=60)) == 300_000
                del futures, last, large
        finally:
            stop.set()
            cutter.join()
        assert until(lambda: not task_keys(cluster))


class TestLostState:
    def test_after_redis_was_emptied_futures_go_on_where_the_client_knows_how(self, tmp_path):
        with redis_with(tmp_path) as url, Client(url, set_as_default=False) as client:
            small, large = client.scatter(1), client.scatter(bytes(300_000))
            waiting = client.submit(inc, small)
            client.session.flush()
            dependent = client.submit(len, large)
            client.session.flush()
            delete_namespace(client.session.store)
            assert client.scatter(3).result(timeout=20) == 3
            assert small.result() == 1
            assert waiting.status == "pending"
            for future in (large, dependent):
                with pytest.raises(StateLostError, match=r"emptied or replaced.*submit it again") as caught:
                    future.result(timeout=20)
                assert caught.value.key == future.key
            client.session.flush_releases()
            contents = read(client.session.store)
            assert {key_of(text) for text in contents.records} == {small.key, waiting.key}
            assert audit(client.session.store) == []

    def test_nothing_but_what_is_pending_is_kept(self, connect, gate):
        client = connect()
        session = client.session
        first = client.submit(inc, 1)
        first.result()
        with session.order:
            assert session.ledger.nbytes == 0
        chain = [client.submit(gate.pass_, 1)]
        for _ in range(20):
            chain.append(client.submit(inc, chain[-1]))
        with session.order:
            assert session.ledger.nbytes > 20 * 300
        gate.open()
        client.gather(chain)
        with session.order:
            assert session.ledger.nbytes == 0

    def test_payloads_are_kept_up_to_a_limit(self, connect):
        client = connect(resubmit_bytes=2000)
        futures = [client.submit(count_bytes, bytes(500), i) for i in range(10)]
        with client.session.order:
            assert 0 < client.session.ledger.nbytes <= 2000
        client.gather(futures)

    def test_after_a_lease_ran_out_futures_go_on(self, connect, cluster):
        client = connect()
        held = client.submit(inc, 1)
        held.result()
        client.session.store.expire_client(client.id)
        assert client.submit(inc, held).result(timeout=20) == 3
        assert held.result(timeout=20) == 2
        assert client.submit(inc, 3).result(timeout=20) == 4

    def test_a_large_result_that_went_with_the_lease_says_so(self, connect):
        client = connect()
        held = client.submit(bytes, 100_000)
        assert len(held.result(timeout=20)) == 100_000
        client.session.store.expire_client(client.id)
        with pytest.raises(StateLostError, match="its lease ran out"):
            held.result(timeout=20)
        with pytest.raises(StateLostError, match="its lease ran out"):
            client.gather([held], timeout=20)

    def test_a_full_redis_refuses_and_goes_on_once_there_is_room(self, tmp_path):
        options = ("--maxmemory", "8mb", "--maxmemory-policy", "noeviction")
        with redis_with(tmp_path, *options) as url, Client(url, set_as_default=False) as client:
            kept = []

            def fill() -> None:
                for i in range(100):
                    kept.append(client.scatter(bytes([i]) * 300_000))

            with pytest.raises(StoreFullError, match="maxmemory"):
                fill()
            assert len(kept) > 3
            kept.clear()
            client.session.flush_releases()
            with redis.Redis.from_url(url) as r:
                assert not r.keys("{mem}:t:*")
                assert until(lambda: r.info("memory")["used_memory"] < 6_000_000)
            assert client.scatter(bytes(300_000)).result(timeout=20) == bytes(300_000)
