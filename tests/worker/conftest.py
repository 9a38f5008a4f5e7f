"""Slots in this process, on namespaces of their own in the Redis of the run."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_mem import Client, Future
from celery_mem.config import Settings
from celery_mem.graph.keys import text_of
from celery_mem.memory.files import NodeFolder
from celery_mem.memory.process import own_identity
from celery_mem.state.audit import audit, read
from celery_mem.state.store import Store, Tickets
from celery_mem.worker.housekeeping import Housekeeper
from celery_mem.worker.live import LiveResults
from celery_mem.worker.mailbox import Mailbox
from celery_mem.worker.memory import ProcessMemory
from celery_mem.worker.slot import Slot
from tests.conftest import delete_namespace
from tests.deployment import wait_until

_numbers = itertools.count()


class Node:
    """A node whose slots, process and agent are all this process; the test says when the agent does what."""

    def __init__(self, space: Space, name: str, root: Path, settings: Settings) -> None:
        self.name = name
        self.settings = settings
        self.folder = NodeFolder.create(str(root), settings.namespace, name, own_identity())
        self.memory = ProcessMemory(self.folder, name, settings)
        self.store = space.store.twin()
        self.store.settings = settings
        self.house = Housekeeper(name, os.getpid(), self.folder, self.store, 1 << 40)
        self.mailbox = Mailbox(
            name, self.store, drop=self.house.drop, move=self.house.move, stop=_not_here, restart=_not_here
        )
        self.store.heartbeat(name, queue="queue", slots="1", dir=self.folder.path, status="running")

    @property
    def live(self) -> LiveResults:
        """What is not written yet."""
        return self.memory.live

    def read_mail(self) -> None:
        """Have the agent do what it was asked."""
        while self.mailbox.read_once(0.01):
            pass

    def is_empty(self) -> bool:
        """Have the agent read its mail, then tell whether the node has nothing left."""
        self.read_mail()
        return not self.live.tokens() and not list(self.folder.tokens())

    def leave(self) -> None:
        while not self.store.leave_node(self.name).is_over:
            pass

    def close(self) -> None:
        self.live.close()
        self.memory.close()
        self.mailbox.close()
        self.house.close()
        self.store.link.close()
        self.folder.destroy()


def _not_here(*_: str) -> None:
    raise AssertionError("these nodes have no agent that could stop anything")


class Space:
    """A namespace with a client; slots are run by the test itself, in its thread or in others.

    Args:
        settings: further ones, of all.
    """

    def __init__(self, url: str, root: Path, **settings: Any) -> None:
        self.root = root
        self.nodes: list[Node] = []
        # Waits are short: a slot here goes home as soon as it finds nothing.
        self.settings = Settings(
            url=url, namespace=f"slots{next(_numbers)}", linger=0.01, slice=60.0, **settings
        )
        self.client = Client(url, namespace=self.settings.namespace, set_as_default=False, **settings)
        self.store = Store.connect(self.settings)
        self.sent: list[Tickets] = []
        self._slots: list[Slot] = []
        self._threads: list[threading.Thread] = []

    def node(self, name: str = "node", **changes: Any) -> Node:
        """Make a node with memory of its own; `changes` are settings."""
        self.nodes.append(Node(self, name, self.root, self.settings.replace(**changes)))
        return self.nodes[-1]

    def slot(self, node: Node | None = None, **changes: Any) -> Slot:
        """Make a slot, of a node without memory of its own if none is given; `changes` are settings."""
        where = "node" if node is None else node.name
        memory = None if node is None else node.memory
        name = f"{where}|{own_identity()}.{len(self._slots) + 1}"
        slot = Slot(name, where, self.settings.replace(**changes), self.send, memory)
        self._slots.append(slot)
        return slot

    def send(self, tickets: Tickets) -> bool:
        """Stand in for the broker."""
        self.sent.append(tickets)
        return True

    def submit(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Future:
        """Submit as the client does, and wait until the task is in Redis."""
        future = self.client.submit(func, *args, **kwargs)
        self._wait_until_sent([future])
        return future

    def map(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Future]:
        """Submit several, as the client does, and wait until they are in Redis."""
        futures = self.client.map(func, *args, **kwargs)
        self._wait_until_sent(futures)
        return futures

    def _wait_until_sent(self, futures: list[Future]) -> None:
        names = [self.store.keys.of("task", text_of(f.key)) for f in futures]
        wait_until(lambda: self.store.link.call("EXISTS", *names) == len(set(names)), "tasks to arrive", 5)

    def in_thread(self, call: Callable[[], Any]) -> threading.Thread:
        """Run something in a thread that the test's end waits for."""
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        self._threads.append(thread)
        return thread

    def close(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        self.client.close()
        for slot in self._slots:
            slot.close()
        for node in self.nodes:
            wait_until(node.is_empty, f"node {node.name} to have nothing left", 5)
            node.leave()
            node.close()
        try:
            wait_until(lambda: not audit(self.store), "a namespace without violations", 5)
            assert read(self.store).records == {}
        except AssertionError as error:
            raise AssertionError(f"{error}: {audit(self.store)}") from None
        finally:
            delete_namespace(self.store)
            self.store.link.close()


@pytest.fixture
def space(redis_server: str, tmp_path: Path) -> Iterator[Space]:
    space = Space(redis_server, tmp_path)
    yield space
    space.close()
