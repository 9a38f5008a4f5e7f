"""What an agent is asked by mail, and what it does of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from celery_mem.worker.mailbox import Mailbox
from tests.deployment import wait_until
from tests.worker.conftest import Space


class Desk:
    """Notes what a mailbox passes on."""

    def __init__(self) -> None:
        self.dropped: list[str] = []
        self.moved: list[tuple[str, list[str]]] = []
        self.stopped: list[tuple[str, str, str]] = []
        self.restarts: list[str] = []
        self.door = threading.Event()
        self.door.set()

    def drop(self, tokens: list[str]) -> None:
        self.dropped += tokens

    def move(self, verb: str, fields: list[str]) -> None:
        assert self.door.wait(30)
        if fields[-1] == "bad":
            raise ValueError("as asked")
        self.moved.append((verb, fields))


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def mailbox(space: Space, desk: Desk) -> Iterator[Mailbox]:
    space.store.heartbeat("node", queue="queue", slots="1")
    mailbox = Mailbox(
        "node",
        space.store,
        drop=desk.drop,
        move=desk.move,
        stop=lambda *stop: desk.stopped.append(stop),
        restart=desk.restarts.append,
    )
    yield mailbox
    desk.door.set()
    mailbox.close()
    space.store.link.call("UNLINK", mailbox.name)
    space.store.leave_node("node")


def test_messages_are_read_in_one_go(space: Space, desk: Desk, mailbox: Mailbox) -> None:
    assert space.store.mail("node", "d 1 2", "s 3 a key", "d 4", "nonsense", "p 5 list ('k', 1)", "f 6 99 x")
    assert space.store.mail("node", "x node|1-2.3 17 ('k', 1)", "r token")
    assert mailbox.read_once() == 8
    assert desk.dropped == ["1", "2", "4"]
    assert desk.stopped == [("node|1-2.3", "17", "('k', 1)")]
    assert desk.restarts == ["token"]
    mailbox.start()
    wait_until(lambda: len(desk.moved) == 3, "the rest to be moved")
    assert sorted(desk.moved) == [
        ("f", ["6", "99", "x"]),
        ("p", ["5", "list", "('k', 1)"]),
        ("s", ["3", "a key"]),
    ]


def test_what_moves_data_does_not_hold_up_what_frees_it(space: Space, desk: Desk, mailbox: Mailbox) -> None:
    desk.door.clear()
    mailbox.start()
    space.store.mail("node", "s 1 large")
    space.store.mail("node", "d 2")
    wait_until(lambda: desk.dropped == ["2"], "the other to be dropped")
    assert desk.moved == []


def test_one_message_that_fails_does_not_stop_the_others(
    space: Space, desk: Desk, mailbox: Mailbox, caplog: Any
) -> None:
    mailbox.start()
    space.store.mail("node", "s 1 bad", "s 2 good")
    wait_until(lambda: desk.moved == [("s", ["2", "good"])], "the good one")
    assert "result bad could not be moved" in caplog.text
