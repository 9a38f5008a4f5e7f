"""Where node folders are made: shared memory if it is of use here, else the temp folder, else nowhere."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from celery_mem.config import Settings
from celery_mem.memory.asking import is_listening
from celery_mem.memory.process import is_alive
from celery_mem.memory.recycling import pid_namespace
from celery_mem.memory.spilling import ABOUT, make_spill

log = logging.getLogger("celery_mem.memory")

SHARED_MEMORY = "/dev/shm"  # noqa: S108 (what is made there belongs to us alone, see own_folder)
AGENT_SOCKET = "agent.sock"
_GRACE_S = 60.0  # for what is being made, and for what another container's process made
_MEMORY_TYPES = (b"tmpfs", b"ramfs")


def choose_root(settings: Settings) -> str:
    """Return the folder under which node folders are made; empty if there is none and Redis has to do.

    One log line says so where it is not shared memory.
    """
    wanted = settings.shm_folder or SHARED_MEMORY
    trouble = _trouble_with(wanted, settings.shm_min)
    if not trouble:
        return wanted
    temp = tempfile.gettempdir()
    in_temp = _trouble_with(temp, settings.shm_min)
    if not in_temp:
        log.warning("results go to files in %s and not to shared memory: %s", temp, trouble)
        return temp
    log.warning("results go through Redis, there is no room on this host: %s; %s", trouble, in_temp)
    return ""


def possible_roots(shm_folder: str) -> list[str]:
    """Return all folders that `choose_root` may have returned on this host.

    Args:
        shm_folder: the setting of this name.
    """
    return list(dict.fromkeys((shm_folder or SHARED_MEMORY, tempfile.gettempdir())))


def own_folder(root: str) -> str:
    """Return `<root>/celery-mem-<uid>`, which is made if it is not there and is nobody else's.

    Raises:
        OSError: it cannot be made, or belongs to somebody else.
    """
    path = f"{root}/celery-mem-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    if not is_private(path):
        raise PermissionError(f"{path} is not a folder of this user alone; remove it")
    return path


def is_private(path: str) -> bool:
    """Tell whether a path is a folder, no link, that only this user may enter."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and found.st_mode & 0o077 == 0


def is_memory(path: str) -> bool:
    """Tell whether files in a folder take memory rather than a disk."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}".encode()
    try:
        with open("/proc/self/mountinfo", "rb") as mounts:
            for line in mounts:
                before, _, after = line.partition(b" - ")
                if before.split()[2] == wanted:
                    return after.split()[0] in _MEMORY_TYPES
    except OSError:
        pass
    return False


def spill_folder(name: str) -> str:
    """Return where the node folder of this name spills to by itself: a local disk, if there is one."""
    return f"{own_folder(_disk())}/{name}.spilled"


def _disk() -> str:
    temp, other = tempfile.gettempdir(), "/var/tmp"  # noqa: S108 (see own_folder)
    return other if is_memory(temp) and os.access(other, os.W_OK) and not is_memory(other) else temp


def read_about(path: str, name: str = "node") -> dict[str, Any] | None:
    """Return what a node folder says of itself; None if it is none."""
    try:
        with open(f"{path}/{name}") as file:
            about = json.load(file)
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) else None


def remove_dead_folders(root: str) -> list[str]:
    """Remove the node folders whose worker is gone, with what they spilled; returns their paths."""
    removed = [path for path in dead_folders(root) if remove_folder(path)]
    with contextlib.suppress(OSError):  # others are in it, or it is not there
        os.rmdir(f"{root}/celery-mem-{os.geteuid()}")
    return removed + remove_dead_spills()


def remove_all_dead(shm_folder: str) -> list[str]:
    """Remove what dead workers left wherever it may be on this host; returns the paths."""
    return [path for root in possible_roots(shm_folder) for path in remove_dead_folders(root)]


def dead_folders(root: str) -> list[str]:
    """Return the paths of node folders whose worker is gone."""
    parent = f"{root}/celery-mem-{os.geteuid()}"
    return [path for path in _folders(parent) if is_dead(path)] if is_private(parent) else []


def remove_dead_spills() -> list[str]:
    """Remove what dead workers spilled to the local disk; a restart may have taken the node folder itself."""
    parent = f"{_disk()}/celery-mem-{os.geteuid()}"
    removed = []
    for name in sorted(os.listdir(parent)) if is_private(parent) else ():
        about = read_about(f"{parent}/{name}", ABOUT)
        if about and about.get("pids") == pid_namespace() and not is_alive(str(about.get("process"))):
            shutil.rmtree(f"{parent}/{name}", ignore_errors=True)
            removed.append(f"{parent}/{name}")
    with contextlib.suppress(OSError):
        os.rmdir(parent)
    return removed


def remove_folder(path: str) -> bool:
    """Remove a node folder and what it spilled; returns whether it was there."""
    about = read_about(path)
    if about and about.get("spill"):
        try:
            make_spill(about["spill"], f"{path}/spilled").destroy()
            if about["spill"].startswith("/"):
                with contextlib.suppress(OSError):
                    os.rmdir(os.path.dirname(about["spill"]))
        except Exception as error:  # any that a file system of fsspec may raise
            log.warning("what %s spilled to %s may be left there: %s", path, about["spill"], error)
    # Out of sight first: nobody opens a folder that is half gone.
    hidden = f"{os.path.dirname(path)}/.old-{os.path.basename(path).lstrip('.')}"
    try:
        os.rename(path, hidden)
    except FileNotFoundError:
        return False
    except OSError:
        hidden = path
    shutil.rmtree(hidden, ignore_errors=True)
    return True


def is_dead(path: str) -> bool:
    """Tell whether the worker whose folder this is is gone."""
    about = read_about(path)
    if about is None or os.path.basename(path).startswith("."):
        return _age(path) > _GRACE_S  # it is being made, or removed
    if about.get("pids") == pid_namespace():
        return not is_alive(str(about.get("process")))
    return _age(path) > _GRACE_S and not is_listening(path, AGENT_SOCKET)


def _age(path: str) -> float:
    try:
        return time.time() - os.lstat(path).st_mtime
    except OSError:
        return 0.0


def _folders(parent: str) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(parent)):
            if not name.endswith(".spilled") and os.path.isdir(f"{parent}/{name}"):
                yield f"{parent}/{name}"


def _trouble_with(root: str, least: int) -> str:
    """Return why a folder is of no use; empty if it is."""
    if not os.path.isdir(root):
        return f"there is no {root}"
    try:
        own_folder(root)
    except OSError as error:
        return f"{root} cannot be written: {error.strerror or error}"
    found = os.statvfs(root)
    free = found.f_bavail * found.f_frsize
    if free < least:
        return f"{root} has {free / 1e6:.0f} MB free and mem_shm_min is {least / 1e6:.0f} MB"
    return ""
