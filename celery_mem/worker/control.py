"""The folder of sockets by which the processes of a node speak with its agent: one user's, on one host."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any, NamedTuple

from celery_mem.memory.asking import NobodyThere, tell
from celery_mem.memory.roots import AGENT_SOCKET
from celery_mem.state.keys import NODE
from celery_mem.state.store import Store

if TYPE_CHECKING:
    from celery_mem.config import Settings
    from celery_mem.memory.files import NodeFolder

TELL_S = 0.2


class Control(NamedTuple):
    """Where the sockets are, empty if nowhere, and the kind of the worker's pool."""

    folder: str
    pool: str


def make_control(folder: NodeFolder | None) -> str:
    """Make the folder, in that of the node's results if there is one."""
    if folder is None:
        return tempfile.mkdtemp(prefix="celery-mem-")
    path = f"{folder.path}/control"
    os.mkdir(path, 0o700)
    return path


def control_of(app: Any, settings: Settings, node: str) -> Control:
    """Return what the worker of this process made."""
    found: Control | None = getattr(app, "mem_control", None)
    if found is not None:
        return found
    store = Store.connect(settings)  # a pool child that was not forked
    fields = store.link.call("HMGET", store.keys.of("node", node), NODE["control"], NODE["pool"])
    store.link.close()
    return Control(*((text or b"").decode() for text in fields))


def note_generation(folder: str, generation: str, *, first: bool = False) -> None:
    """Write down which namespace the processes of the node belong to, for the agent and those after it.

    Args:
        first: only if nothing is written yet.
    """
    new = f"{folder}/generation.{os.getpid()}"
    with open(new, "w", encoding="ascii") as file:
        file.write(generation)
    with contextlib.suppress(FileExistsError):
        (os.link if first else os.rename)(new, f"{folder}/generation")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)


def noted_generation(folder: str) -> str:
    """Return what `note_generation` wrote last; empty if it did not."""
    try:
        with open(f"{folder}/generation", encoding="ascii") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def report_exits(pool: Any, folder: str) -> None:
    """Tell the agent how children of a prefork pool end: only their parent gets to know.

    The pool looks for ended children in one method, and forgets them there.
    """
    look = pool._join_exited_workers

    def look_and_tell(*args: Any, **kwargs: Any) -> Any:
        before = {worker.pid: worker for worker in pool._pool}
        found = look(*args, **kwargs)
        left = {worker.pid for worker in pool._pool}
        for pid, worker in before.items():
            if pid not in left:
                with contextlib.suppress(NobodyThere, TimeoutError):
                    tell(folder, AGENT_SOCKET, f"g {pid} {worker.exitcode or 0}", timeout=TELL_S)
        return found

    pool._join_exited_workers = look_and_tell


def remove_control(folder: str) -> None:
    """Remove a folder that is not part of another one."""
    shutil.rmtree(folder, ignore_errors=True)
