"""Reading a result from wherever it is, and publishing it for other hosts."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from celery_mem.memory import blobs, publisher, reader
from celery_mem.memory.asking import Listener, socket_name
from celery_mem.memory.files import NodeFolder
from celery_mem.memory.process import own_identity
from celery_mem.memory.publisher import Publisher, find_here
from celery_mem.memory.reader import Found, Gone, Reader, Sources
from celery_mem.memory.serialize import dumps, loads
from celery_mem.memory.transit import publish, transit_name
from celery_mem.state.store import REDIS

HERE, THERE = "celery@here", "celery@there"
KEY = "a key with spaces"


@pytest.fixture
def store(make_store):
    return make_store()


class World:
    """Two nodes and what Redis knows of one result; the agent of the other host answers in threads."""

    def __init__(self, store, root):
        self.store, self.root = store, root
        self.folders, self.sources, self.mailed, self.threads = {}, None, [], []
        self.publishers, self.dead, self.readers = {}, set(), []

    def node(self, name, *, is_reachable=True):
        folder = NodeFolder.create(str(self.root), "test", name, own_identity())
        self.folders[name] = folder
        path = folder.path if is_reachable else "/nowhere/at-all"
        self.store.link.call("HSET", self.store.keys.of("node", name), "dir", path)
        self.publishers[name] = Publisher(
            self.store.link.twin(), self.store.keys, lambda t: find_here(folder, t), piece_bytes=100_000
        )
        return folder

    def mail(self, node, message):
        self.mailed.append((node, message))
        if node in self.dead:
            return False
        letter, token, reply, key = message.split(" ", 3)
        assert letter == "p"
        thread = threading.Thread(target=self.publishers[node].serve, args=(token, reply, key))
        self.threads.append(thread)
        thread.start()
        return True

    def reader(self, node="", **options):
        made = Reader(
            self.store.link,
            self.store.keys,
            locate=lambda key: self.sources,
            mail=self.mail,
            node=node,
            folder=self.folders.get(node),
            **options,
        )
        self.readers.append(made)
        return made

    def says(self, *places, token="1", owner=""):
        self.sources = Sources(token, owner, 0, places)
        return self.sources

    def settle(self):
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        self.threads.clear()

    def residue(self):
        self.settle()
        found = []
        for name in self.store.link.call("KEYS", "*"):
            if not name.startswith(self.store.keys.prefix.encode()):
                continue
            is_late_news = b"}:re:" in name and 0 <= self.store.link.call("PTTL", name) <= 2000
            if b"}:b:" in name or (b"}:re:" in name and not is_late_news):
                found.append(name)
        return found

    def close(self):
        self.settle()
        for made in self.readers:
            made.close()
        for p in self.publishers.values():
            p.link.close()
        for folder in self.folders.values():
            folder.destroy()


@pytest.fixture
def world(store, tmp_path, monkeypatch):
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    world = World(store, tmp_path)
    yield world
    world.close()


DATA = {"a": np.arange(200_000), "b": "text"}
FRAMES = dumps(DATA)


def write(folder, token="1"):
    folder.write(token, FRAMES.head, FRAMES.buffers)


def check(found: Found):
    value = loads(found.head, found.buffers)
    assert (value["a"] == DATA["a"]).all()
    assert value["b"] == "text"
    value["a"][:] = 0  # everything that is read may be written to
    assert DATA["a"][1] == 1
    assert found.nbytes == FRAMES.nbytes
    return found


def test_the_lines_of_an_input_are_parsed():
    assert Sources.parse(b"7\ncelery@h|12-3.0\n500\ncelery@h\n@redis") == Sources(
        "7", "celery@h|12-3.0", 500, ("celery@h", "@redis")
    )
    assert Sources.parse(b"c.1\n\n5") == Sources("c.1", "", 5, ())


class TestThisHost:
    def test_the_own_nodes_file_comes_first(self, world):
        write(world.node(HERE))
        found = check(world.reader(HERE).read(KEY, world.says(THERE, HERE)))
        assert (found.is_kept, found.lost) == (False, ())

    def test_a_client_maps_what_any_node_of_the_host_has(self, world):
        write(world.node(HERE))
        world.node(THERE)
        found = check(world.reader().read(KEY, world.says(THERE, HERE)))
        assert found.lost == (THERE,)

    def test_the_maker_is_asked_to_write_it(self, world):
        folder = world.node(HERE)
        asked = []

        def handler(question):
            asked.append(question)
            write(folder)
            return "y 1"

        listener = Listener(folder.path, socket_name("77-1"), handler).start()
        check(world.reader().read(KEY, world.says(HERE, owner=f"{HERE}|77-1.0")))
        listener.close()
        assert asked == ["w 1"]

    def test_a_maker_that_is_dead_has_nothing(self, world):
        world.node(HERE)
        with pytest.raises(Gone) as caught:
            world.reader().read(KEY, world.says(HERE, owner=f"{HERE}|77-1.0"))
        assert (caught.value.key, caught.value.token, caught.value.places) == (KEY, "1", (HERE,))
        assert "is not at celery@here" in str(caught.value)

    def test_a_node_that_started_anew_is_found_in_its_new_folder(self, world):
        world.node(HERE)
        r = world.reader()
        with pytest.raises(Gone):
            r.read(KEY, world.says(HERE))
        world.folders[HERE].destroy()
        write(world.node(HERE))
        check(r.read(KEY, world.says(HERE)))


class TestRedis:
    def put(self, world):
        name = world.store.keys.blob("1", KEY)
        publish(world.store.link, name, FRAMES.head, FRAMES.buffers, piece_bytes=100_000, lease_s=60)

    def test_a_blob_is_read_into_plain_memory_by_a_client(self, world):
        self.put(world)
        assert not check(world.reader().read(KEY, world.says(REDIS))).is_kept

    def test_and_into_the_nodes_files_by_a_slot(self, world):
        self.put(world)
        folder = world.node(HERE)
        assert check(world.reader(HERE).read(KEY, world.says(REDIS))).is_kept
        assert folder.has("1")
        assert not check(world.reader(HERE).read(KEY, world.says(REDIS))).is_kept
        assert os.listdir(f"{folder.path}/work") == []

    def test_or_into_memory_where_the_node_has_no_room(self, world):
        self.put(world)
        world.node(HERE).destroy()
        assert not check(world.reader(HERE).read(KEY, world.says(REDIS))).is_kept

    def test_a_blob_that_is_not_there_is_gone(self, world):
        with pytest.raises(Gone, match="is not at @redis"):
            world.reader().read(KEY, world.says(REDIS))

    def test_what_blobs_wrote_is_read_too(self, world):
        blobs.write(
            world.store.link,
            blobs.write_commands(world.store.keys.blob("1", KEY), FRAMES, piece_bytes=64 << 20, lease_s=60),
        )
        check(world.reader().read(KEY, world.says(REDIS)))


class TestOtherHosts:
    def test_a_result_is_published_read_and_nothing_stays(self, world):
        write(world.node(THERE, is_reachable=False))
        check(world.reader().read(KEY, world.says(THERE)))
        assert world.residue() == []
        assert [m.split(" ")[0] for _, m in world.mailed] == ["p"]

    def test_the_readers_node_keeps_it(self, world):
        write(world.node(THERE, is_reachable=False))
        here = world.node(HERE)
        assert check(world.reader(HERE).read(KEY, world.says(THERE))).is_kept
        assert here.has("1")
        assert world.residue() == []

    def test_what_its_maker_has_not_written_is_asked_for(self, world):
        folder = world.node(THERE, is_reachable=False)
        others = Listener(folder.path, socket_name("76-1"), lambda q: "n 1").start()
        maker = Listener(folder.path, socket_name("77-1"), lambda q: write(folder) or "y 1").start()
        check(world.reader().read(KEY, world.says(THERE, owner=f"{THERE}|77-1.0")))
        maker.close()
        others.close()

    def test_what_is_not_there_is_gone(self, world):
        world.node(THERE, is_reachable=False)
        with pytest.raises(Gone, match="is not at celery@there"):
            world.reader().read(KEY, world.says(THERE))
        assert world.residue() == []

    def test_a_node_that_is_gone_has_nothing(self, world):
        world.node(THERE, is_reachable=False)
        world.dead.add(THERE)
        with pytest.raises(Gone):
            world.reader().read(KEY, world.says(THERE))

    def test_waiting_ends_when_redis_says_that_the_place_is_lost(self, world, monkeypatch):
        monkeypatch.setattr(reader, "_WAIT_S", 0.05)
        world.node(THERE, is_reachable=False)

        def unheard(node, message):
            world.sources = None
            return True

        monkeypatch.setattr(world, "mail", unheard)
        with pytest.raises(Gone, match="any place"):
            world.reader().read(KEY, world.says(THERE))

    def test_an_agent_that_missed_it_is_asked_again(self, world, monkeypatch):
        monkeypatch.setattr(reader, "_WAIT_S", 0.05)
        monkeypatch.setattr(reader, "_ASK_AGAIN_S", 0.05)
        write(world.node(THERE, is_reachable=False))
        mail, calls = world.mail, []

        def deaf(node, message):
            calls.append(message)
            return True if len(calls) < 3 else mail(node, message)

        monkeypatch.setattr(world, "mail", deaf)
        check(world.reader().read(KEY, world.says(THERE)))
        assert len(calls) >= 3

    def test_many_readers_share_one_copy(self, world, monkeypatch):
        write(world.node(THERE, is_reachable=False))
        published = []
        monkeypatch.setattr(publisher, "publish", lambda *a, **k: published.append(1) or publish(*a, **k))
        sources, errors = world.says(THERE), []

        def read():
            try:
                found = world.reader().read(KEY, sources)
                assert loads(found.head, found.buffers)["a"][5] == 5
            except BaseException as error:
                errors.append(error)

        readers = [threading.Thread(target=read) for _ in range(6)]
        for thread in readers:
            thread.start()
        for thread in readers:
            thread.join(30)
        assert errors == []
        assert len(published) < 6
        assert world.residue() == []

    def test_a_copy_whose_reader_died_vanishes_by_itself(self, world):
        write(world.node(THERE, is_reachable=False))
        reply = world.store.keys.of("reply", "dead")
        world.publishers[THERE].serve("1", reply, KEY)
        for name in (transit_name(world.store.keys, "1", KEY), reply):
            assert 0 < world.store.link.call("PTTL", name) <= 120_000


class TestMoving:
    def test_one_that_moved_is_looked_for_where_it_is_now(self, world):
        world.node(HERE)
        write(world.node(THERE))
        old = world.says(HERE)
        world.says(THERE)
        found = check(world.reader().read(KEY, old))
        assert found.lost == ()

    def test_one_that_was_made_again_has_another_token(self, world):
        write(world.node(HERE), "2")
        old = world.says(HERE)
        world.says(HERE, token="2")
        check(world.reader().read(KEY, old))

    def test_one_that_redis_does_not_know_is_gone_without_a_place(self, world):
        world.node(HERE)
        old = world.says(HERE)
        world.sources = None
        with pytest.raises(Gone) as caught:
            world.reader().read(KEY, old)
        assert caught.value.places == ()
