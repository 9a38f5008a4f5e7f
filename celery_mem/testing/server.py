"""A Redis inside this process, as connections of `state/link.py` see it."""

from __future__ import annotations

from typing import Any

import fakeredis
from redis import ConnectionPool


class Connection(fakeredis.FakeRedisConnection):
    """A connection to a simulated server, whose waiting reads can be ended from outside.

    Such a server runs a command in the thread that sends it, so to shut down a socket wakes nobody up.
    """

    def connect(self) -> None:
        """Connect, and have a shutdown of the socket end what waits on it."""
        if self._sock is not None:
            return
        super().connect()
        server, sock = self._server, self.get_socket()
        self.send_command("CLIENT", "ID")  # type: ignore[no-untyped-call]
        number = self.read_response()

        def shutdown(_: int) -> None:
            fakeredis.FakeRedis(server=server, protocol=2).client_unblock(number, error=True)

        sock.shutdown = shutdown  # type: ignore[method-assign]


def make_pool(version: tuple[int, ...] = (7,)) -> ConnectionPool:
    """Return connections to a new and empty server."""
    server = fakeredis.FakeServer(version=version)
    client: Any = fakeredis.FakeRedis(server=server, protocol=2)
    pool: ConnectionPool = client.connection_pool
    pool.connection_class = Connection
    return pool
