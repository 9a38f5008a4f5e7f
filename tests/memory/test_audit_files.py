"""Files and records that do not agree are named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from celery_mem.memory.audit_files import FileViolation, audit_files
from celery_mem.memory.files import NodeFolder
from celery_mem.memory.process import own_identity
from celery_mem.memory.roots import remove_all_dead
from celery_mem.state.store import NewData, Store

DEAD = "1-1"  # process 1 did not start at that time


@pytest.fixture
def store(make_store: Callable[..., Store], tmp_path: Path) -> Store:
    """A namespace with a node whose folder is on this host, and one that is not."""
    store = make_store(shm_folder=str(tmp_path))
    store.renew_client("alice", join=True)
    folder = NodeFolder.create(str(tmp_path), "test", "here", own_identity())
    store.heartbeat("here", slots="1", dir=folder.path)
    store.heartbeat("far", slots="1", dir="/nowhere")
    folder.write("token", b"head")
    data = [NewData(key, 4, "bytes", "n", "token", (), place) for key, place in (("x", "here"), ("y", "far"))]
    store.put("alice", 1, data)
    return store


def folder_of(store: Store) -> NodeFolder:
    folder = NodeFolder.open(store.node_infos()["here"]["dir"])
    assert folder is not None
    return folder


def test_files_and_records_that_agree_are_no_violation(store):
    assert audit_files(store) == []


def test_a_copy_without_a_file_is_named(store):
    folder_of(store).drop(["token"])
    (found,) = audit_files(store)
    assert (found.rule, found.key) == ("copy without file", "x")
    assert "is not in" in str(found)


def test_a_file_without_a_key_is_named_once_it_is_old(store):
    folder = folder_of(store)
    folder.write("other", b"head")
    assert audit_files(store) == []
    os.utime(f"{folder.path}/files/other", (0, 0))
    assert [(v.rule, v.key) for v in audit_files(store)] == [("file without key", "other")]


def test_what_a_dead_worker_left_is_named_and_removed(store, tmp_path):
    dead = NodeFolder.create(str(tmp_path), "test", "gone", DEAD)
    assert audit_files(store) == [FileViolation("dead folder", dead.path, "is there still")]
    assert dead.path in remove_all_dead(store.settings.shm_folder)
    assert audit_files(store) == []
    assert folder_of(store).has("token")
