"""How much memory there is, as containers and hosts say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from celery_mem.memory.limits import (
    _host_memory,
    available_memory,
    child_processes,
    memory_limit,
    private_memory,
)

MIB = 1 << 20


def group(root: Path, path: str, name: str, text: str) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n"}, None),
        ("0::/a/b\n", {"a/b/memory.max": f"{64 * MIB}\n"}, 64 * MIB),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": f"{32 * MIB}"}, 32 * MIB),
        ("0::/\n", {"memory.max": f"{16 * MIB}\n"}, 16 * MIB),
        ("0::/not/in/this/container\n", {"memory.max": f"{16 * MIB}\n"}, 16 * MIB),
        ("5:cpu:/x\n4:memory:/x\n", {"memory/x/memory.limit_in_bytes": f"{8 * MIB}\n"}, 8 * MIB),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("", {}, None),
    ],
)
def test_the_least_limit_of_all_control_groups_counts(
    tmp_path: Path, membership: str, files: dict[str, str], limit: int | None
) -> None:
    for path, text in files.items():
        group(tmp_path / "cgroup", os.path.dirname(path), os.path.basename(path), text)
    (tmp_path / "membership").write_text(membership)
    found = available_memory(str(tmp_path / "cgroup"), str(tmp_path / "membership"))
    assert found == (_host_memory() if limit is None else limit)


def test_a_limit_that_was_told_goes_before_the_systems_which_is_shared() -> None:
    assert memory_limit(5, share=2) == 5
    assert memory_limit(0, share=2) == available_memory() // 2


def test_private_memory_counts_what_a_process_made_and_not_the_files_it_maps(tmp_path: Path) -> None:
    code = """
import mmap, os, sys
path, kind = sys.argv[1:]
with open(path, "wb") as f: f.write(bytes(64 << 20))
if kind == "mapped":
    with open(path, "rb") as f: kept = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
    sum(kept[::4096])
else:
    kept = b"x" * (64 << 20)
print("ready", flush=True)
sys.stdin.read()
"""
    sizes = {}
    for kind in ("mapped", "made"):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / kind), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert process.pid in child_processes(os.getpid())
            sizes[kind] = private_memory([process.pid, 2**22 + 1])  # one that is gone counts nothing
            process.communicate()
    assert sizes["mapped"] < 32 * MIB
    assert sizes["made"] > 64 * MIB
