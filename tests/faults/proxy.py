"""A TCP proxy before a Redis that cuts connections in the middle of what they carry."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from typing import Self


class Proxy:
    """Listens on a loopback port and forwards to a Redis on a unix socket.

    Every connection, by its number, is given a direction and a number of bytes; when so many have gone that
    way, it is cut: Redis may have got half a command, or carried one out of whose reply the caller gets half.

    Args:
        path: the socket.
        seed: of the numbers of bytes.
        mean: of the numbers of bytes.
    """

    def __init__(self, path: str, *, seed: int = 0, mean: float = 10_000) -> None:
        self.path = path
        self.n_cuts = 0
        self._mean = mean
        self._random = random.Random(seed)
        self._is_calm = False
        self._ends: set[asyncio.StreamWriter] = set()
        self._budgets: list[list[float]] = []  # of the live connections: bytes to Redis, bytes from it
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        serving = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20), self._loop
        )
        self._server = serving.result(10)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    def calm(self) -> None:
        """Cut no more."""
        self._is_calm = True

    def cut_soon(self, chance: random.Random, most: int = 5_000) -> int:
        """Cut about half of the connections, each within so many bytes; works when calm, too.

        Returns:
            How many are to be cut.
        """

        async def choose() -> int:
            chosen = [budgets for budgets in self._budgets if chance.random() < 0.5]
            for budgets in chosen:
                budgets[chance.randrange(2)] = -chance.uniform(1, most)
            return len(chosen)

        return asyncio.run_coroutine_threadsafe(choose(), self._loop).result(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            redis_reader, redis_writer = await asyncio.open_unix_connection(self.path, limit=1 << 20)
        except OSError:
            writer.transport.abort()
            return
        budgets = [float("inf"), float("inf")]
        budgets[self._random.randrange(2)] = self._random.expovariate(1 / self._mean)
        self._budgets.append(budgets)
        pumps = [
            asyncio.ensure_future(self._pump(reader, redis_writer, budgets, 0)),
            asyncio.ensure_future(self._pump(redis_reader, writer, budgets, 1)),
        ]
        self._ends |= {writer, redis_writer}
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, redis_writer):
            end.close()  # after what was written has gone: the half of a command does arrive
            with contextlib.suppress(OSError):
                await end.wait_closed()
        await asyncio.wait(pumps)
        self._budgets = [other for other in self._budgets if other is not budgets]
        self._ends -= {writer, redis_writer}

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budgets: list[float], way: int
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                is_doomed = budgets[way] < 0  # by `cut_soon`; below zero it counts up
                left = abs(budgets[way])
                if len(data) >= left and (is_doomed or not self._is_calm):
                    self.n_cuts += 1
                    writer.write(data[: int(left)])
                    return
                if is_doomed or len(data) < left:
                    budgets[way] += len(data) if is_doomed else -len(data)
                writer.write(data)
                await writer.drain()

    def close(self) -> None:
        """Cut everything and end."""

        async def end() -> None:
            self._server.close()
            for stream in self._ends:
                stream.transport.abort()
            while len(asyncio.all_tasks()) > 1:  # this one
                await asyncio.sleep(0.001)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
