"""Slots in this process, on namespaces of their own in the Redis of the run."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_mem import Client, Future
from celery_mem.config import Settings
from celery_mem.graph.keys import text_of
from celery_mem.state.audit import audit, read
from celery_mem.state.store import Store, Tickets
from celery_mem.worker.process import own_identity
from celery_mem.worker.slot import Slot
from tests.conftest import delete_namespace
from tests.deployment import wait_until

_numbers = itertools.count()


class Space:
    """A namespace with a client; slots are run by the test itself, in its thread or in others."""

    def __init__(self, url: str) -> None:
        # Waits are short: a slot here goes home as soon as it finds nothing.
        self.settings = Settings(url=url, namespace=f"slots{next(_numbers)}", linger=0.01, slice=60.0)
        self.client = Client(url, namespace=self.settings.namespace, set_as_default=False)
        self.store = Store.connect(self.settings)
        self.sent: list[Tickets] = []
        self._slots: list[Slot] = []
        self._threads: list[threading.Thread] = []

    def slot(self, **changes: Any) -> Slot:
        """Make a slot; `changes` are settings."""
        name = f"node|{own_identity()}.{len(self._slots) + 1}"
        slot = Slot(name, "node", self.settings.replace(**changes), self.send)
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
        try:
            wait_until(lambda: not audit(self.store), "a namespace without violations", 5)
            assert read(self.store).records == {}
        except AssertionError as error:
            raise AssertionError(f"{error}: {audit(self.store)}") from None
        finally:
            delete_namespace(self.store)
            self.store.link.close()


@pytest.fixture
def space(redis_server: str) -> Iterator[Space]:
    space = Space(redis_server)
    yield space
    space.close()
