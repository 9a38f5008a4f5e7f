"""Where node folders are made, and how those of dead workers go."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from celery_mem.config import Settings
from celery_mem.memory import roots
from celery_mem.memory.files import NodeFolder
from celery_mem.memory.process import own_identity
from celery_mem.memory.roots import choose_root, is_dead, remove_dead_folders

DEAD = "999999999-1"


@pytest.fixture
def temp(tmp_path, monkeypatch):
    path = tmp_path / "temp"
    path.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(path))
    monkeypatch.setattr(roots, "_disk", lambda: str(path))  # also where the temp folder is in memory
    return path


@pytest.fixture
def shm(tmp_path):
    path = tmp_path / "shm"
    path.mkdir()
    return path


def settings(shm, **more):
    return Settings(url="redis://localhost", shm_folder=str(shm), **{"shm_min": 1, **more})


class TestChoice:
    def test_the_folder_that_is_named(self, shm, temp, caplog):
        assert choose_root(settings(shm)) == str(shm)
        assert caplog.records == []

    @pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
    def test_shared_memory_by_itself(self, temp):
        assert choose_root(settings("")) == "/dev/shm"

    def test_no_shared_memory_means_the_temp_folder(self, shm, temp, caplog):
        shm.rmdir()
        assert choose_root(settings(shm)) == str(temp)
        (record,) = caplog.records
        assert record.getMessage() == (
            f"results go to files in {temp} and not to shared memory: there is no {shm}"
        )

    def test_a_small_one_too(self, shm, temp, caplog, monkeypatch):
        """Docker's has 64 MB."""
        real = os.statvfs

        class Small:
            f_bavail, f_frsize = 16_000, 4096

        monkeypatch.setattr(os, "statvfs", lambda p: Small if p == str(shm) else real(p))
        assert choose_root(settings(shm, shm_min=256 << 20)) == str(temp)
        (record,) = caplog.records
        assert "has 66 MB free and mem_shm_min is 268 MB" in record.getMessage()

    def test_nothing_at_all_means_redis(self, shm, temp, caplog):
        assert choose_root(settings(shm, shm_min=1 << 60)) == ""
        (record,) = caplog.records
        assert "results go through Redis" in record.getMessage()

    def test_a_folder_that_somebody_else_made_ours_is_refused(self, shm, temp, caplog):
        (shm / f"celery-mem-{os.geteuid()}").symlink_to(temp)
        assert choose_root(settings(shm)) == str(temp)
        assert "is not a folder of this user alone" in caplog.text


class TestTheDead:
    def make(self, root, process=DEAD):
        return NodeFolder.create(str(root), "test", "celery@here", process)

    def test_folders_of_dead_workers_are_removed_with_what_they_spilled(self, shm, temp):
        dead, alive = self.make(shm), self.make(shm, own_identity())
        dead.is_memory = True
        dead.write("1", b"head", [bytes(300_000)])
        dead.spill("1")
        assert os.listdir(temp / f"celery-mem-{os.geteuid()}")
        assert remove_dead_folders(str(shm)) == [dead.path]
        assert NodeFolder.open(alive.path) is not None
        alive.destroy()
        assert (os.listdir(shm), os.listdir(temp)) == ([], [])
        assert remove_dead_folders(str(shm)) == []

    def test_what_was_spilled_is_removed_after_a_restart_of_the_machine_too(self, shm, temp):
        dead, alive = self.make(shm), self.make(shm, own_identity())
        for folder in (dead, alive):
            folder.is_memory = True
            folder.write("1", b"head", [bytes(300_000)])
            folder.spill("1")
        shutil.rmtree(dead.path)
        (spilled,) = remove_dead_folders(str(shm))
        assert os.path.basename(dead.path) in spilled
        assert alive.read("1") is not None
        alive.destroy()
        assert os.listdir(temp) == []

    def test_one_that_is_being_made_is_left_alone_until_it_is_old(self, shm, temp, monkeypatch):
        folder = self.make(shm)
        new = os.path.join(os.path.dirname(folder.path), ".new-x")
        os.rename(folder.path, new)
        assert remove_dead_folders(str(shm)) == []
        monkeypatch.setattr(roots, "_GRACE_S", -1)
        assert remove_dead_folders(str(shm)) == [new]

    def test_a_worker_of_another_container_lives_while_its_agent_listens(self, shm, temp, monkeypatch):
        import socket

        monkeypatch.setattr("celery_mem.memory.files.pid_namespace", lambda: "another")
        folder = self.make(shm)
        monkeypatch.setattr(roots, "_GRACE_S", -1)
        monkeypatch.chdir(folder.path)  # a socket's path must be short, and that of a test's folder is not
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as agent:
            agent.bind("agent.sock")
            assert not is_dead(folder.path)
        assert is_dead(folder.path)

    def test_a_worker_that_was_killed_leaves_a_folder_that_the_next_one_removes(self, shm, temp):
        code = (
            "import sys, os, signal; from celery_mem.memory.files import NodeFolder;"
            "from celery_mem.memory.process import own_identity;"
            "f = NodeFolder.create(sys.argv[1], 'test', 'celery@here', own_identity());"
            "f.write('1', b'head', [bytes(1000)]); os.kill(os.getpid(), signal.SIGKILL)"
        )
        subprocess.run([sys.executable, "-c", code, str(shm)], check=False)
        assert len(remove_dead_folders(str(shm))) == 1
        assert os.listdir(shm) == []
