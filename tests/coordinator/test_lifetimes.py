"""The duties for what outlives clients and nodes: durable copies, their files, errors that nobody hears."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from celery_mem.graph.errors import encode_error
from celery_mem.memory.durable import durable_files
from celery_mem.state.audit import audit
from celery_mem.state.store import DURABLE, Failed, Store
from tests.coordinator.scene import Scene, token_of


@pytest.fixture
def scene(make_store: Callable[..., Store], tmp_path: Path) -> Any:
    scene = Scene(make_store(durable_url=f"file://{tmp_path}"))
    for node in ("a@one", "b@one"):
        scene.node(node)
    yield scene
    assert audit(scene.store) == []


def write(scene: Scene, key: str) -> Path:
    """Write the durable file of a key as an agent does, and tell Redis."""
    files = durable_files(scene.store.settings)
    assert files is not None
    files.write(token_of(key), b"head", [])
    assert scene.store.gain(DURABLE, [(key, token_of(key))]) == []
    return Path(files.url.removeprefix("file://")) / token_of(key)


def wait(scene: Scene, seconds: float) -> None:
    """Let time pass in which the agents do nothing but live."""
    for node in scene.store.node_infos():
        scene.store.heartbeat(node)
    scene.pass_time(seconds)
    for node in scene.store.node_infos():
        scene.store.heartbeat(node)
    scene.run()


def test_a_durable_copy_that_does_not_come_is_asked_for_again(scene: Scene) -> None:
    scene.data("with space", 100, "b@one")
    scene.store.make_durable(["with space"])
    wanted = f"k {token_of('with space')} with space"
    assert scene.mail("b@one") == [wanted]  # it never reads it
    scene.run()
    wait(scene, 9)
    assert scene.mail("b@one") == []
    wait(scene, 2)
    assert scene.mail("b@one") == [wanted]
    write(scene, "with space")
    wait(scene, 30)
    assert scene.mail("b@one") == []


def test_the_file_of_a_durable_result_goes_with_it(scene: Scene) -> None:
    scene.data("x", 100, "a@one")
    scene.store.make_durable(["x"])
    path = write(scene, "x")
    scene.run()
    assert path.exists()
    scene.store.release("alice", ["x"])
    scene.run_for(1)
    assert not path.exists()
    assert scene.store.debris() == []


def test_files_that_cannot_be_deleted_now_are_deleted_later(scene: Scene, monkeypatch, caplog) -> None:
    scene.data("x", 100, "a@one")
    scene.store.make_durable(["x"])
    path = write(scene, "x")
    scene.store.release("alice", ["x"])
    files = durable_files(scene.store.settings)
    with monkeypatch.context() as patch:
        patch.setattr(files, "drop", lambda token: (_ for _ in ()).throw(OSError("away")))
        scene.run_for(1)
    assert "cannot be deleted: away" in caplog.text
    assert path.exists()
    scene.run_for(31)
    assert not path.exists()


def test_a_file_that_is_about_to_be_deleted_is_not_gained(scene: Scene) -> None:
    scene.data("x", 100, "a@one")
    write(scene, "x")
    scene.store.gain("@redis", [])
    scene.store.shed(DURABLE, [("x", token_of("x"))])
    assert scene.store.debris() == [token_of("x")]
    assert scene.store.gain(DURABLE, [("x", token_of("x"))]) == ["x"]
    scene.run_for(1)
    assert scene.store.debris() == []
    write(scene, "x")


def test_errors_that_nobody_hears_are_logged_once(scene: Scene, caplog) -> None:
    keys = [f"k{i:03}" for i in range(250)]
    scene.submit(*keys)
    scene.store.entrust(keys)
    scene.store.release("alice", keys)
    taken = scene.store.step("s", "a@one", want=1000).taken
    error = encode_error(ValueError("as asked"))
    scene.store.step("s", "a@one", mode="q", failed=[Failed(t.key, t.attempt, error) for t in taken])
    while len(taken) < 250:
        more = scene.store.step("s", "a@one", want=1000).taken
        scene.store.step("s", "a@one", mode="q", failed=[Failed(t.key, t.attempt, error) for t in more])
        taken += more
    with caplog.at_level(logging.ERROR):
        scene.run_for(2)
    logged = [r.message for r in caplog.records if "nobody waited for" in r.message]
    assert len(logged) == len(set(logged)) == 250
    assert logged[0] == f"task {taken[0].key}, which nobody waited for, failed: ValueError: as asked"
