"""A Redis with a replica, behind one address that leads to either: a fail-over that loses the last writes."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

from redis import Redis
from redis.exceptions import RedisError

from tests.conftest import server_program
from tests.deployment import wait_until


class Pair:
    """Two servers, `servers[0]` the master at first, and a relay at `url` that leads to the master."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="celery-mem-")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.servers: list[Redis] = []
        self.ports: list[int] = []
        for _ in range(2):
            self._start_server()
        self.servers[1].replicaof("127.0.0.1", str(self.ports[0]))
        wait_until(lambda: self.servers[1].info("replication")["master_link_status"] == "up", "a replica")
        self.relay = Relay(self.ports[0])
        self.url = self.relay.url

    def _start_server(self) -> None:
        program = server_program()
        assert program is not None
        port = self._free_port()
        options = ["--port", str(port), "--save", "", "--repl-diskless-sync-delay", "0", "--dir", self.folder]
        self.processes.append(subprocess.Popen([program, *options], stdout=subprocess.DEVNULL))
        self.ports.append(port)
        redis = Redis(port=port)
        self.servers.append(redis)

        def answers() -> bool:
            with contextlib.suppress(RedisError):
                return bool(redis.ping())
            return False

        wait_until(answers, "a server")

    @staticmethod
    def _free_port() -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port: int = free.getsockname()[1]
            return port

    def stop_replication(self) -> None:
        """From now on the replica hears nothing: what is written is lost with the master."""
        self.servers[0].config_set("repl-timeout", 3600)
        self.servers[1].replicaof("127.0.0.1", "1")  # where nobody is: it keeps what it has

    def fail_over(self) -> None:
        """The master dies, the replica takes its place."""
        self.kill_master()
        self.servers[1].replicaof("NO", "ONE")
        self.relay.target = self.ports[1]
        self.relay.cut()

    def start_sentinel(self) -> str:
        """Have a Sentinel watch the master; returns the address that goes by it."""
        port = self._free_port()
        path = Path(self.folder) / "sentinel.conf"
        path.write_text(
            f"port {port}\ndir {self.folder}\nsentinel monitor pair 127.0.0.1 {self.ports[0]} 1\n"
            "sentinel down-after-milliseconds pair 500\nsentinel failover-timeout pair 2000\n"
        )
        program = server_program()
        assert program is not None
        command = [program, str(path), "--sentinel"]
        self.processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        redis = Redis(port=port)

        def knows_both() -> bool:
            with contextlib.suppress(RedisError):
                return len(redis.sentinel_slaves("pair")) == 1
            return False

        wait_until(knows_both, "the Sentinel to know both servers")
        redis.close()
        return f"sentinel://127.0.0.1:{port}/pair/0"

    def kill_master(self) -> None:
        """The master dies; what becomes of it is left to the Sentinel."""
        self.processes[0].kill()
        self.processes[0].wait()

    def close(self) -> None:
        """End all processes."""
        self.relay.close()
        for process in self.processes:
            process.kill()
            process.wait()
        shutil.rmtree(Path(self.folder), ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Relay:
    """A TCP address that leads to a server of this host, which may change; it can be silent, and late.

    Attributes:
        target: port, or path of the socket, where new connections lead to.
    """

    def __init__(self, target: int | str) -> None:
        self.target = target
        self.held: list[tuple[asyncio.StreamWriter, bytes]] = []  # what was held back
        self._is_open = threading.Event()  # of use in the loop's thread as a plain flag
        self._is_open.set()
        self._holds_back = False
        self._ends: set[asyncio.StreamWriter] = set()
        self._clients: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20))
        self.address = ("127.0.0.1", self._server.sockets[0].getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.address[1]}/0"

    def _do(self, coroutine):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def silence(self) -> None:
        """Swallow everything, with no word to anybody, and let nobody connect."""
        self._is_open.clear()

    def speak(self) -> None:
        """Serve again; connections from before stay dead, and nobody is told."""
        self._is_open.set()

    def cut(self) -> None:
        """End all connections."""

        async def end() -> None:
            for writer in list(self._ends):
                writer.transport.abort()

        self._do(end())

    def hold_back(self) -> None:
        """Keep what clients send from now on, instead of passing it on."""

        async def begin() -> None:
            self._holds_back = True

        self._do(begin())

    def cut_clients(self) -> None:
        """End the connections towards clients; those to the server stay, new ones are served as usual."""

        async def end() -> None:
            self._holds_back = False
            for writer in list(self._clients):
                writer.transport.abort()

        self._do(end())

    def deliver(self) -> None:
        """Send what was held back, on the old connections."""

        async def send() -> None:
            for writer, data in self.held:
                with contextlib.suppress(OSError):
                    writer.write(data)
                    await writer.drain()
            self.held = []

        self._do(send())
        time.sleep(0.05)  # for the server to read it, or to refuse

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not self._is_open.is_set():
            await asyncio.sleep(0.02)
        try:
            if isinstance(self.target, str):
                far = await asyncio.open_unix_connection(self.target, limit=1 << 20)
            else:
                far = await asyncio.open_connection("127.0.0.1", self.target, limit=1 << 20)
        except OSError:
            writer.transport.abort()
            return
        far_reader, far_writer = far
        self._ends |= {writer, far_writer}
        self._clients.add(writer)
        there = asyncio.ensure_future(self._pump(reader, far_writer, is_request=True))
        back = asyncio.ensure_future(self._pump(far_reader, writer, is_request=False))
        await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
        self._clients.discard(writer)
        writer.transport.abort()
        if not any(held is far_writer for held, _ in self.held):
            far_writer.transport.abort()
        await asyncio.wait([there, back])
        self._ends.discard(writer)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_request: bool
    ) -> None:
        is_dead = False
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                is_dead = is_dead or not self._is_open.is_set()
                if is_dead:
                    continue  # for good: what is lost in the middle is never made up for
                if is_request and self._holds_back:
                    self.held.append((writer, data))
                    continue
                writer.write(data)
                await writer.drain()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections, and serve no more."""

        async def end() -> None:
            self._server.close()
            me = asyncio.current_task()
            tasks = [t for t in asyncio.all_tasks() if t is not me]
            for writer in list(self._ends):
                writer.transport.abort()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._do(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
