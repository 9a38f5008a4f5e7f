"""The hosts themselves: what they share, what they do not, and that they end with the test run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.deployment import ROOT
from tests.hosts.network import Hosts, why_not
from tests.hosts.remote import At
from tests.local.conftest import all_gone
from tests.on_cluster import until

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"no hosts: {why_not()}")

KEPT_UP = """
import sys
from tests.hosts.network import Hosts
hosts = Hosts(["a", "b"])
hosts.start("b", "sleeper", ["sh", "-c", "setsid sleep 1000"], {})
hosts.pid("sleeper")
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(["a", "b"]) as hosts:
        yield hosts


def listen(at: At) -> int:
    at.server = socket.create_server(("0.0.0.0", 0))
    return at.server.getsockname()[1]


def ask(at: At, address: str, port: int) -> str:
    try:
        with socket.create_connection((address, port), timeout=0.3):
            return "answers"
    except TimeoutError:
        return "silent"
    except OSError as error:
        return str(error)


def test_hosts_reach_one_another_while_their_cables_are_in(hosts: Hosts) -> None:
    with closing(hosts.talk("a", {})) as a, closing(hosts.talk("b", {})) as b:
        where = (hosts["a"].address, a(listen))
        assert b(ask, *where) == "answers"
        hosts.cut("a")
        assert b(ask, *where) != "answers"
        hosts.heal("a")
        assert until(lambda: b(ask, *where) == "answers")  # the switch takes a moment to see the cable


def test_nothing_on_this_machine_is_reachable_from_a_host_nor_the_other_way_round(hosts: Hosts) -> None:
    with closing(hosts.talk("a", {})) as a, socket.create_server(("0.0.0.0", 0)) as here:
        assert "refused" in a(ask, "127.0.0.1", here.getsockname()[1])
        with pytest.raises(OSError, match=r"timed out|unreachable|refused"):
            socket.create_connection((hosts["a"].address, a(listen)), timeout=0.3)


def test_each_host_has_its_own_name_folders_and_processes(hosts: Hosts) -> None:
    def look(at: At) -> tuple[str, set[str], bool]:
        Path("/dev/shm/mine").touch()
        Path("/tmp/mine").touch()
        folders = {path.name for folder in ("/dev/shm", "/tmp") for path in Path(folder).glob("mine*")}
        return socket.gethostname(), folders, os.getpid() < 100

    with closing(hosts.talk("a", {})) as a, closing(hosts.talk("b", {})) as b:
        assert a(look) == ("a", {"mine"}, True)
        a(lambda at: Path("/dev/shm/mine").rename("/dev/shm/mine-of-a"))
        assert b(look) == ("b", {"mine"}, True)
    assert hosts["a"].files("/dev/shm") == ["/dev/shm/mine-of-a"]
    assert hosts["b"].files("/dev/shm") == ["/dev/shm/mine"]


def test_hosts_end_with_a_run_that_is_killed() -> None:
    command = [sys.executable, "-c", KEPT_UP]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"up\n"
        family = psutil.Process(run.pid).children(recursive=True)
        assert {"unshare", "nsenter", "sleep"} <= {process.name() for process in family}
        run.send_signal(signal.SIGKILL)
    assert all_gone(family)


def test_hosts_end_when_all_that_watches_over_them_is_killed_at_once(tmp_path: Path) -> None:
    command, env = [sys.executable, "-c", KEPT_UP], os.environ | {"TMPDIR": str(tmp_path)}  # for what is left
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"up\n"
        family = psutil.Process(run.pid).children(recursive=True)
        watchers = [process for process in family if "supervisor.py" in " ".join(process.cmdline())]
        assert len(watchers) == 2
        for pid in (run.pid, *(watcher.pid for watcher in watchers)):
            os.kill(pid, signal.SIGSTOP)  # none sees another die
        for pid in (*(watcher.pid for watcher in watchers), run.pid):
            os.kill(pid, signal.SIGKILL)
    assert all_gone(family)
