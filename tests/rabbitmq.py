"""A RabbitMQ of one test module: its own ports, node name, cookie and data, and it ends with the module."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

import amqp

from celery_mem.local.processes import Processes

PATIENCE_S = 60.0
PLACES = ("/usr/lib/rabbitmq/bin", "/usr/local/sbin", "/opt/homebrew/sbin", "/opt/rabbitmq/sbin")
"""Before the PATH, where Debian has a script that runs the server as a user who may not read our folder."""
ONE_QUIET_SCHEDULER = "+S 1:1 +sbwt none -kernel inet_dist_use_interface {127,0,0,1}"


def lacks() -> str:
    """What is missing to run RabbitMQ here, in words; empty if nothing is."""
    missing = [
        name for name, path in (("rabbitmq-server", _server()), ("epmd", shutil.which("epmd"))) if not path
    ]
    return f"no {' and no '.join(missing)}: apt install rabbitmq-server" if missing else ""


def _server() -> str | None:
    return shutil.which("rabbitmq-server", path=os.pathsep.join(PLACES)) or shutil.which("rabbitmq-server")


def _free_ports(n: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class RabbitMQ:
    """A server that can be stopped and started again.

    Args:
        processes: among which its own two are.

    Attributes:
        url: its address, with the only user that it has.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.folder = Path(tempfile.mkdtemp(prefix="rabbitmq-", dir=processes.folder))
        self.port, epmd_port, dist_port = _free_ports(3)
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        (self.folder / "enabled_plugins").write_text("[].\n")
        self._env = {
            "HOME": str(self.folder),  # where the cookie is made
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "celery-mem-test@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(dist_port),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(self.folder / "none"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ONE_QUIET_SCHEDULER,
            "RUNNING_UNDER_SYSTEMD": "true",  # its script becomes the server, and so ends with it
        }
        # Erlang would start one that stays.
        self._start("epmd", ["epmd", "-port", str(epmd_port), "-address", "127.0.0.1"])
        self.start()

    def start(self) -> None:
        """Start the server, again if it was killed, and wait until it answers."""
        program = _server()
        assert program is not None
        command = ["env", *(f"{k}={v}" for k, v in self._env.items()), program]
        self._processes.start_and_wait("rabbitmq", command, self.answers, PATIENCE_S)

    def _start(self, name: str, command: list[str]) -> None:
        self._processes.start(name, command, stage=0)
        self._processes.wait_until_started()

    def answers(self) -> bool:
        """Whether the server takes connections."""
        try:
            self.connect().close()
        except (OSError, amqp.AMQPError):
            return False
        return True

    def connect(self) -> amqp.Connection:
        """A connection of the test itself."""
        connection = amqp.Connection(f"127.0.0.1:{self.port}", connect_timeout=2, read_timeout=10)
        connection.connect()
        return connection

    def waiting(self, queue: str) -> int | None:
        """How many messages wait in a queue; None if there is no such queue."""
        connection = self.connect()
        try:
            return int(connection.channel().queue_declare(queue, passive=True).message_count)
        except amqp.NotFound:
            return None
        finally:
            connection.close()
