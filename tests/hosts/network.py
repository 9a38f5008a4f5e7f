"""Several hosts on this machine, made of Linux namespaces.

```
 hub: a network namespace with a bridge, the switch
  ├── a  10.77.0.1    each host: a network, process, mount, name and IPC namespace of its own,
  ├── b  10.77.0.2    with its own /dev/shm and /tmp; the rest of the file system is shared
  └── c  10.77.0.3    and counts as the installed software
```

The namespaces have no names: they live as long as a process in them, and each host's first process dies with
the test run, also when that is killed (see `celery_mem.local.supervisor`; `unshare --kill-child` passes it
on). So nothing is left for anybody to remove, and nothing touches the network of the machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import psutil

from celery_mem.local.processes import Processes
from celery_mem.local.redis import find_redis_server
from tests.deployment import PATIENCE_S, ROOT, wait_until
from tests.hosts.remote import Remote

INIT = Path(__file__).with_name("init.py")
NEW_NAMESPACES = ["unshare", "--net", "--mount", "--mount-proc", "--uts", "--ipc"]
NEW_NAMESPACES += ["--pid", "--fork", "--kill-child"]
NETWORK = "10.77.0"
SHM_BYTES = 512 << 20


@lru_cache
def why_not() -> str:
    """Return why hosts cannot be made here; empty if they can."""
    if sys.platform != "linux":
        return "namespaces are of Linux"
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            return f"no program {program}: install {package}"
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    probe = "mount -t tmpfs tmpfs /dev/shm && ip link add s type bridge && ip link add v type veth"
    tried = subprocess.run([*NEW_NAMESPACES, "sh", "-c", probe], check=False, capture_output=True, text=True)
    return f"namespaces are refused: {tried.stderr.strip()}" if tried.returncode else ""


class Host:
    """One of the hosts.

    Attributes:
        name: what `hostname` says there.
        address: where the others reach it.
        pid: its first process, as this machine numbers it.
    """

    def __init__(self, name: str, address: str, pid: int) -> None:
        self.name = name
        self.address = address
        self.pid = pid

    def command(self, argv: Sequence[str], env: Mapping[str, str]) -> list[str]:
        """Return the command that runs `argv` on this host; of this process's environment it gets PATH."""
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            **env,
        }
        enter = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--ipc", "--pid"]
        return [*enter, "env", "-i", *(f"{name}={value}" for name, value in environ.items()), *argv]

    def path(self, path: str) -> Path:
        """Return where this process finds a path of that host."""
        return Path(f"/proc/{self.pid}/root{path}")

    def files(self, folder: str = "/dev/shm") -> list[str]:
        """Return all files in a folder of that host, by their paths there."""
        root = str(self.path("/")).rstrip("/")
        return sorted(
            str(Path(where, name)).removeprefix(root)
            for where, _, names in os.walk(self.path(folder))
            for name in names
        )

    def processes(self) -> list[psutil.Process]:
        """Return the live processes of that host but its first."""
        own = _process_namespace(self.pid)
        found = (process for process in psutil.process_iter() if process.pid != self.pid)
        return [process for process in found if _process_namespace(process.pid) == own]


def _process_namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""  # it is gone, if only a zombie


class Hosts:
    """Hosts, a switch between them, and the processes that tests run on them.

    Args:
        names: one host each, with addresses from 10.77.0.1 on.
    """

    def __init__(self, names: Sequence[str]) -> None:
        folder = tempfile.mkdtemp(prefix="celery-mem-")
        self.processes = Processes(folder, os.environ, grace_s=0.5)
        self._remotes: list[Remote] = []
        self._by_name: dict[str, Host] = {}
        try:
            self._hub = self._start_hub()
            for name in names:
                self._start_host(name)
            for number, name in enumerate(names, 1):
                self._by_name[name] = Host(name, f"{NETWORK}.{number}", self._first_process(name))
            self._connect()
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Host:
        return self._by_name[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._by_name.values())

    # --- the network ---

    def cut(self, name: str) -> None:
        """Pull a host's cable out of the switch: packets get lost, connections hear nothing."""
        self._ip(self._hub, f"link set port-{name} down")

    def heal(self, name: str) -> None:
        """Plug it in again."""
        self._ip(self._hub, f"link set port-{name} up")

    def _start_hub(self) -> int:
        self.processes.start("hub", ["unshare", "--net", "sleep", "infinity"], stage=0)
        self.processes.wait_until_started()
        pid = self.processes.pids()["hub"]
        own = os.stat("/proc/self/ns/net").st_ino
        wait_until(lambda: os.stat(f"/proc/{pid}/ns/net").st_ino != own, "the hub's namespace")
        return pid

    def _start_host(self, name: str) -> None:
        redis = Path(find_redis_server().path).parent
        kept = dict.fromkeys(map(str, [ROOT, sys.prefix, sys.base_prefix, redis]))
        init = [sys.executable, "-I", "-S", str(INIT), name, str(SHM_BYTES), *kept]
        self.processes.start(f"host-{name}", [*NEW_NAMESPACES, *init], stage=0)

    def _first_process(self, name: str) -> int:
        def is_up() -> bool:
            assert not (trouble := self.processes.trouble(f"host-{name}")), trouble
            return self.log(f"host-{name}") == "up"

        wait_until(is_up, f"host {name}")
        return self._only_child(f"host-{name}")

    def _connect(self) -> None:
        bridge = ["link add switch type bridge", "link set switch up"]
        for host in self:
            bridge += [
                f"link add port-{host.name} type veth peer name eth0 netns {host.pid}",
                f"link set port-{host.name} master switch up",
            ]
        self._ip(self._hub, *bridge)
        for host in self:
            address = f"address add {host.address}/24 dev eth0"
            self._ip(host.pid, "link set lo up", address, "link set eth0 up")

    def _ip(self, pid: int, *commands: str) -> None:
        """Run `ip` in the network of a process."""
        subprocess.run(
            ["nsenter", f"--target={pid}", "--net", "ip", "-batch", "-"],
            input="\n".join(commands),
            text=True,
            check=True,
        )

    # --- processes ---

    def start(self, host: str, name: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Start a process on a host."""
        self.processes.start(name, self[host].command(argv, env))
        self.processes.wait_until_started()

    def talk(self, host: str, env: Mapping[str, str]) -> Remote:
        """Start a Python process on a host that runs what it is told."""
        command = self[host].command([sys.executable, "-m", "tests.hosts.remote"], env)
        self._remotes.append(Remote(command))
        return self._remotes[-1]

    def pid(self, name: str) -> int:
        """Return the process id of a process, as this machine numbers it."""
        return self._only_child(name)

    def send(self, name: str, number: int) -> None:
        """Send a signal to one process, not to its children."""
        os.kill(self.pid(name), number)

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """Send a signal to one process, and wait until it has ended."""
        self.send(name, number)
        gone = self.processes.wait_for(lambda: name not in self.processes.pids(), PATIENCE_S)
        assert gone, f"{name} does not end\n{self.logs()}"

    def _only_child(self, name: str) -> int:
        # `unshare` and `nsenter` stay beside what they start: only a child can be in a new process namespace.
        outside = psutil.Process(self.processes.pids()[name])
        (child,) = wait_until(outside.children, f"{name} to begin")
        return child.pid

    def log(self, name: str, lines: int = 200) -> str:
        """Return the last lines that a process wrote."""
        return self.processes.log_tail(name, lines)

    def logs(self) -> str:
        """Return the ends of all logs."""
        names = sorted(path.stem for path in Path(self.processes.folder).glob("*.log"))
        return "\n".join(f"--- {name}\n{self.log(name, 40)}" for name in names)

    def wait_until(self, condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
        """Wait as `tests.deployment.wait_until` does; if in vain, show the logs."""
        try:
            return wait_until(condition, what, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    # --- life ---

    def close(self) -> None:
        """End all processes, and with them the hosts."""
        for remote in self._remotes:
            remote.close()
        self.processes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
