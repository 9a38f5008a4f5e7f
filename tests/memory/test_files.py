"""Node folders: what is written, read, dropped and spilled, by several processes at once."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_mem.memory import files as files_module
from celery_mem.memory.account import Usage
from celery_mem.memory.files import MAP_LEAST, NodeFolder, NoSpace
from celery_mem.memory.process import own_identity
from celery_mem.memory.recycling import size_class
from celery_mem.memory.serialize import dumps, loads

SHM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="leases and tmpfs are Linux's")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # as of Python 3.12
fork = multiprocessing.get_context("fork")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A root of the test's own, in memory where there is shared memory; the temp folder is on a disk."""
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    monkeypatch.setattr("celery_mem.memory.roots._disk", lambda: str(tmp_path / "temp"))
    if SHM is None:
        yield str(tmp_path)
        return
    import shutil
    import tempfile

    folder = tempfile.mkdtemp(prefix="test-", dir=SHM)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def make_folder(root):
    made = []

    def make(**options):
        made.append(NodeFolder.create(root, "test", "celery@here", own_identity(), **options))
        return made[-1]

    yield make
    for folder in made:
        folder.destroy()


@pytest.fixture
def folder(make_folder):
    return make_folder()


def write(folder, token, obj):
    frames = dumps(obj)
    return folder.write(token, frames.head, frames.buffers)


def read(folder, token):
    found = folder.read(token)
    return None if found is None else loads(found.head, found.buffers)


def array(fill=1.0, nbytes=1 << 20):
    return np.full(nbytes // 8, float(fill))


class TestRoundTrip:
    @pytest.mark.parametrize("n", [0, 1, 1000, MAP_LEAST // 8, 1 << 18])
    def test_objects_come_back_equal(self, folder, n):
        obj = {"a": np.arange(n), "text": "x" * n, "b": np.ones((2, 3))}
        assert write(folder, "1", obj) == dumps(obj).nbytes
        back = read(folder, "1")
        assert back["text"] == obj["text"]
        assert (back["a"] == obj["a"]).all()
        assert (back["b"] == obj["b"]).all()

    def test_objects_without_buffers_and_with_thousands(self, folder):
        write(folder, "1", list(range(200_000)))
        assert read(folder, "1") == list(range(200_000))
        many = [np.full(10, i) for i in range(3000)]
        write(folder, "2", many)
        assert all((a == b).all() for a, b in zip(read(folder, "2"), many, strict=True))

    @given(st.lists(st.binary(max_size=300), min_size=1, max_size=8))
    def test_parts_of_any_size_come_back(self, parts):
        folder = _shared_folder()
        token = os.urandom(8).hex()
        folder.write(token, parts[0], parts[1:])
        found = folder.read(token)
        folder.drop([token])
        assert [bytes(found.head), *map(bytes, found.buffers)] == parts
        assert found.nbytes == sum(map(len, parts))

    def test_buffers_are_aligned_and_writable_and_private(self, folder):
        write(folder, "1", [array(1), array(2)])
        first, second = read(folder, "1")
        assert {a.ctypes.data % 64 for a in (first, second)} == {0}
        first[:] = 7
        assert (read(folder, "1")[0] == 1).all()
        write(folder, "small", np.ones(5000))
        small = read(folder, "small")
        small[0] = 7
        assert read(folder, "small")[0] == 1

    def test_what_is_not_there_is_none(self, folder):
        assert folder.read("1") is None
        assert not folder.has("1")
        assert folder.drop(["1"]) == 0

    @pytest.mark.parametrize("token", ["", "../node", "a/b", ".x", "a\n"])
    def test_a_token_is_no_path(self, folder, token):
        with pytest.raises(ValueError, match="not a token"):
            folder.read(token)
        with pytest.raises(ValueError, match="not a token"):
            folder.write(token, b"x")

    def test_a_token_written_twice_counts_once(self, folder):
        for _ in range(2):
            write(folder, "1", array())
        assert (folder.usage().files, list(folder.tokens())) == (1, ["1"])
        assert folder.usage() == folder.tidy()
        assert folder.drop(["1", "1"]) == 1
        assert folder.usage()[:2] == (0, 0)

    def test_a_damaged_file_is_none_and_says_so(self, folder, caplog):
        write(folder, "1", array())
        path = f"{folder.path}/files/1"
        os.truncate(path, 500_000)
        assert folder.read("1") is None
        assert "result 1 is damaged" in caplog.text

    def test_files_are_this_users_alone(self, folder):
        write(folder, "1", array())
        assert os.stat(folder.path).st_mode & 0o777 == 0o700
        assert os.stat(f"{folder.path}/files/1").st_mode & 0o777 == 0o600
        os.chmod(folder.path, 0o755)
        assert NodeFolder.open(folder.path) is None

    @pytest.mark.skipif(sys.maxsize < 2**32, reason="64 bit")
    def test_a_result_above_two_gigabytes(self, folder):
        free = os.statvfs(folder.path)
        if free.f_bavail * free.f_frsize < 5 << 30:
            pytest.skip("not enough shared memory")
        big = np.zeros((2 << 30) + 5000, "u1")
        big[-1] = 9
        assert folder.write("1", b"head", [big]) == big.nbytes + 4
        found = folder.read("1")
        assert (found.buffers[0].nbytes, found.buffers[0][-1]) == (big.nbytes, 9)


_shared: list[NodeFolder] = []


def _shared_folder():
    """A folder for tests that hypothesis runs many times."""
    if not _shared:
        import atexit
        import tempfile

        _shared.append(NodeFolder.create(tempfile.mkdtemp(), "test", "celery@here", own_identity()))
        atexit.register(_shared[0].destroy)
    return _shared[0]


class TestComingIn:
    def test_nobody_sees_it_before_it_is_whole(self, folder):
        with folder.begin("1", [4, 800_000]) as incoming:
            incoming.parts[0][:] = b"head"
            assert not folder.has("1")
            incoming.parts[1][:] = bytes([5]) * 800_000
            assert incoming.commit() == 800_004
        found = folder.read("1")
        assert (bytes(found.head), set(found.buffers[0])) == (b"head", {5})
        assert folder.usage() == folder.tidy()

    def test_one_that_is_not_finished_leaves_nothing(self, folder):
        with pytest.raises(ZeroDivisionError), folder.begin("1", [4, 800_000]):
            raise ZeroDivisionError
        assert os.listdir(f"{folder.path}/work") == []
        assert folder.usage() == Usage()

    def test_nobody_writes_to_it_afterwards(self, folder):
        incoming = folder.begin("1", [4, 100])
        parts = incoming.parts
        incoming.commit()
        with pytest.raises(ValueError, match="released"):
            parts[0][0] = 1

    def test_a_writer_that_is_killed_leaves_nothing_visible(self, folder):
        def begin():
            incoming = folder.begin("1", [4, 800_000])
            incoming.parts[1][:] = bytes(800_000)
            os.kill(os.getpid(), signal.SIGKILL)

        child = fork.Process(target=begin)
        child.start()
        child.join()
        assert not folder.has("1")
        assert len(os.listdir(f"{folder.path}/work")) == 1
        assert folder.tidy() == Usage()
        assert os.listdir(f"{folder.path}/work") == []


@on_linux
class TestRecycling:
    def test_a_dropped_file_is_written_again(self, folder):
        write(folder, "1", array(1))
        inode = os.stat(f"{folder.path}/files/1").st_ino
        folder.drop(["1"])
        assert folder.usage().pool_nbytes > 1 << 20
        write(folder, "2", array(2, nbytes=(1 << 20) - 50_000))
        assert os.stat(f"{folder.path}/files/2").st_ino == inode
        assert (read(folder, "2") == 2).all()
        assert folder.usage() == folder.tidy()
        assert folder.usage().pool_nbytes == 0

    def test_a_mapped_array_survives_drop_recycling_and_rewriting(self, folder):
        write(folder, "1", array(1))
        kept = read(folder, "1")
        folder.drop(["1"])
        for i in range(2, 10):
            write(folder, str(i), array(i))
            folder.drop([str(i)])
        assert (kept == 1).all()
        del kept
        assert folder.usage() == folder.tidy()

    def test_so_does_a_part_of_one_in_another_process(self, folder):
        write(folder, "1", array(1))
        ours, theirs = fork.Pipe()

        def look():
            part = read(folder, "1")[1000:2000]
            theirs.send("mapped")
            theirs.recv()
            theirs.send(float(part.sum()))

        child = fork.Process(target=look)
        child.start()
        assert ours.recv() == "mapped"
        folder.drop(["1"])
        for i in range(2, 6):
            write(folder, str(i), array(i))
            folder.drop([str(i)])
        ours.send("look")
        assert ours.recv() == 1000
        child.join()

    def test_the_pool_has_a_bound_and_can_be_trimmed(self, make_folder):
        folder = make_folder(recycle_bytes=3 << 20)
        for i in range(6):
            write(folder, str(i), array(i))
        folder.drop(map(str, range(6)))
        assert 1 << 20 < folder.usage().pool_nbytes <= 3 << 20
        assert folder.trim_pool(1 << 20) > 0
        assert folder.usage().pool_nbytes <= 1 << 20
        folder.trim_pool()
        assert folder.usage() == folder.tidy() == Usage()

    def test_a_file_with_a_second_name_is_not_written_again(self, folder, tmp_path):
        write(folder, "1", array(1))
        os.link(f"{folder.path}/files/1", f"{folder.path}/second")
        folder.drop(["1"])
        write(folder, "2", array(2))
        assert os.stat(f"{folder.path}/files/2").st_ino != os.stat(f"{folder.path}/second").st_ino

    @given(st.integers(1, 1 << 36))
    def test_a_size_class_wastes_little(self, nbytes):
        size = size_class(nbytes)
        assert nbytes <= size
        assert size <= max(32 << 10, nbytes * 1.25 + (16 << 10))
        assert size % 4096 == 0
        assert size_class(size) == size

    def test_two_processes_that_claim_at_once_get_different_files(self, folder):
        def churn(name):
            for i in range(300):
                token = f"{name}-{i}"
                write(folder, token, array(hash(token) % 1000, nbytes=300_000))
                if not (read(folder, token) == hash(token) % 1000).all():
                    os._exit(1)
                if i % 3:
                    folder.drop([token])

        children = [fork.Process(target=churn, args=(n,)) for n in "abc"]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [c.exitcode for c in children] == [0, 0, 0]
        tokens = list(folder.tokens())
        assert len(tokens) == 300
        assert all((read(folder, t) == read(folder, t)[0]).all() for t in tokens)
        assert folder.usage() == folder.tidy()

    def test_readers_see_a_whole_result_or_none_while_files_are_written_again(self, folder):
        stop = threading.Event()

        def churn():
            n = 0
            while not stop.is_set():
                n += 1
                write(folder, f"t{n % 4}-{n}", array(n, nbytes=400_000))
                folder.drop([f"t{(n - 2) % 4}-{n - 2}"])

        thread = threading.Thread(target=churn)
        thread.start()
        seen = 0
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            for token in list(folder.tokens()):
                found = read(folder, token)
                if found is not None:
                    seen += 1
                    assert (found == int(token.partition("-")[2])).all()
        stop.set()
        thread.join()
        assert seen > 50


class TestNoSpace:
    def test_a_full_folder_says_so_and_keeps_nothing(self, folder, monkeypatch):
        """Files may grow to 1 MB only: the same errors as a full file system, for any user."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        write(folder, "0", array(0, nbytes=100_000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            with pytest.raises(NoSpace, match="no room in"):
                write(folder, "1", array(1, nbytes=2 << 20))
            with pytest.raises(NoSpace):
                folder.begin("1", [10, 2 << 20])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(folder.tokens()) == ["0"]
        assert os.listdir(f"{folder.path}/work") == []
        assert folder.usage() == folder.tidy()

    @pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a file system")
    def test_a_full_tmpfs_says_so_and_keeps_nothing(self, tmp_path):
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("may not mount")
        try:
            folder = NodeFolder.create(str(tmp_path), "test", "celery@here", own_identity())
            written = []

            def fill():
                for i in range(10):
                    write(folder, str(i), array(i))
                    written.append(i)

            with pytest.raises(NoSpace):
                fill()
            with pytest.raises(NoSpace):
                folder.begin("in", [10, 1 << 20])
            assert 2 <= len(written) <= 3
            assert all((read(folder, str(i)) == i).all() for i in written)
            assert folder.usage() == folder.tidy()
            folder.drop(["0"])
            write(folder, "again", array(5))
            folder.destroy()
            assert os.listdir(tmp_path) == []
        finally:
            gc.collect()
            subprocess.run(["umount", "-l", str(tmp_path)], check=True)

    def test_a_folder_that_was_removed_has_no_space_and_no_results(self, folder):
        write(folder, "1", array())
        other = NodeFolder.open(folder.path)
        folder.destroy()
        with pytest.raises(NoSpace):
            write(other, "2", array())
        assert other.read("1") is None
        assert NodeFolder.open(folder.path) is None


class TestDescriptors:
    def test_thousands_of_mapped_results_take_none(self, folder):
        n = 10_000 if folder.is_memory else 1000
        write(folder, "1", array(nbytes=MAP_LEAST))
        for i in range(2, 20):
            write(folder, str(i), array(nbytes=MAP_LEAST))
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limit[1]))
        try:
            held = [read(folder, str(1 + i % 19)) for i in range(n)]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert sum(a[0] for a in held) == n

    def test_a_mapping_ends_with_its_last_array(self, folder):
        write(folder, "1", [array(), array()])

        def mappings():
            return Path("/proc/self/maps").read_text().count(f"{folder.path}/files/1")

        if not os.path.exists("/proc/self/maps"):
            pytest.skip("no /proc")
        one, two = read(folder, "1")
        part = two[5:10]
        del one, two
        assert mappings() == 1
        del part
        assert mappings() == 0


class TestSpilling:
    @pytest.fixture(params=["local", "distant"])
    def folder(self, request, make_folder):
        folder = make_folder(spill_url="memory://spilled" if request.param == "distant" else "")
        folder.is_memory = True  # also where the tests have none
        return folder

    def test_a_spilled_result_is_read_from_where_it_is(self, folder):
        for i in range(3):
            write(folder, str(i), array(i))
        freed = folder.spill("1")
        assert freed > 1 << 20
        assert not os.path.exists(f"{folder.path}/files/1")
        assert (read(folder, "1") == 1).all()
        assert folder.has("1")
        assert sorted(folder.tokens()) == ["0", "1", "2"]
        usage = folder.usage()
        assert (usage.files, usage.spilled_nbytes > 1 << 20) == (3, True)
        assert usage == folder.tidy()
        other = NodeFolder.open(folder.path)
        assert (read(other, "1") == 1).all()
        assert other.drop(["1"]) == 1
        assert (folder.read("1"), folder.has("1"), folder.usage().spilled_nbytes) == (None, False, 0)

    def test_what_is_not_here_is_not_spilled(self, folder):
        assert folder.spill("1") == 0
        write(folder, "1", array())
        folder.spill("1")
        assert folder.spill("1") == 0

    def test_the_coldest_are_those_nobody_read(self, folder):
        for i in range(3):
            write(folder, str(i), array(i))
            time.sleep(0.01)
        read(folder, "0")
        assert [token for token, _ in folder.coldest()] == ["1", "2", "0"]

    def test_a_result_can_be_read_at_any_moment_of_being_spilled(self, folder, request):
        # The distant place here is simulated: all who read a file of it share one position.
        readers = 1 if "distant" in request.node.name else 2
        tokens = [f"t{i}" for i in range(60)]
        for token in tokens:
            write(folder, token, array(len(token), nbytes=300_000))
        failed, stop = [], threading.Event()

        def look():
            while not stop.is_set():
                failed.extend(t for t in tokens if (found := read(folder, t)) is None or found[0] != len(t))

        threads = [threading.Thread(target=look) for _ in range(readers)]
        for thread in threads:
            thread.start()
        for token in tokens:
            folder.spill(token)
        stop.set()
        for thread in threads:
            thread.join()
        assert failed == []

    def test_one_dropped_while_it_is_spilled_leaves_nothing(self, folder, monkeypatch):
        write(folder, "1", array())
        put = folder._spill.put

        def slowly(token, fd, nbytes):
            put(token, fd, nbytes)
            folder.drop(["1"])

        monkeypatch.setattr(folder._spill, "put", slowly)
        assert folder.spill("1") == 0
        assert (list(folder.tokens()), folder.has("1")) == ([], False)
        assert folder.usage() == folder.tidy()

    def test_nothing_is_left_of_a_folder(self, folder):
        write(folder, "1", array())
        folder.spill("1")
        folder.destroy()
        if isinstance(folder._spill, files_module.make_spill("", "").__class__):
            assert not os.path.exists(folder._spill.path)
        assert folder.read("1") is None

    def test_a_full_disk_says_so_and_keeps_the_result(self, folder, monkeypatch):
        write(folder, "1", array(1))

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(folder._spill, "put", full)
        with pytest.raises(NoSpace):
            folder.spill("1")
        assert (read(folder, "1") == 1).all()


def test_dropping_thousands_is_quick(folder):
    data = np.ones(100_000, "u1")
    tokens = [str(i) for i in range(2000)]
    for token in tokens:
        folder.write(token, b"head", [data])
    started = time.perf_counter()
    assert folder.drop(tokens) == 2000
    assert time.perf_counter() - started < 1  # some 20 ms on a machine of its own
    assert folder.usage() == folder.tidy()


def test_a_folder_tells_whose_it_is(folder):
    about = json.loads(Path(folder.path, "node").read_text())
    assert (about["node"], about["process"]) == ("celery@here", own_identity())
    other = NodeFolder.open(folder.path)
    assert (other.node, other.process, other.path) == (folder.node, folder.process, folder.path)
    assert NodeFolder.open("/nowhere") is None
    assert NodeFolder.open("") is None
