"""A coordinator that dies at any point of what it does: the next one brings it to the same end."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from celery_mem.state.audit import audit, read
from celery_mem.state.store import Done, Store
from tests.coordinator.scene import Scene, fresh_coordinator

SIZE = 100_000


class Died(BaseException):
    """As a SIGKILL it passes by everything that would catch an error."""


class DeathAt:
    """Lets a link carry out some round trips; with the last its process dies, before it or right after it."""

    def __init__(self, link: Any, n: int, *, after: bool) -> None:
        self.link, self.n, self.after = link, n, after
        self.batch = link.batch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.n -= 1
        if self.n > 0:
            return self.batch(*args, **kwargs)
        if self.n == 0 and self.after:
            self.batch(*args, **kwargs)
        raise Died

    def __enter__(self) -> None:
        self.link.batch = self

    def __exit__(self, *_: object) -> None:
        del self.link.batch


def a_dead_client(scene: Scene) -> None:
    """Much to free, in many calls; another client holds something in the middle."""
    keys = [f"k{i}" for i in range(60)]
    scene.submit(*keys, chain=True)
    scene.submit(*(f"other{i}" for i in range(20)))
    scene.store.renew_client("bob", join=True)
    scene.store.hold("bob", 1, [keys[30]])
    scene.run()
    scene.pass_time(scene.store.settings.client_lease + 1)
    scene.store.renew_client("bob", join=True)


def a_dead_node(scene: Scene) -> None:
    """It had the only copies of results that are wanted, each made of another, and ran a task."""
    for node in ("dead", "alive"):
        scene.node(node)
    keys = [f"k{i}" for i in range(12)]
    scene.submit(*keys, chain=True)
    for key in keys:
        while scene.states()[key] != "ready":
            scene.run()
            scene.pass_time(0.1)
        (task,) = scene.store.step("dead|1-1.1", "dead", want=1).taken
        scene.store.step(
            "dead|1-1.1", "dead", mode="q", done=[Done(key, task.attempt, SIZE, "x", "n", task.attempt, ())]
        )
    scene.submit("running")
    assert len(scene.store.step("dead|1-1.1", "dead", want=1).taken) == 1
    scene.run()
    scene.pass_time(scene.store.settings.node_lease + 1)
    scene.node("alive")
    scene.store.renew_client("alice")


def run_to_the_end(scene: Scene) -> None:
    """A new coordinator judges no lease before everybody had the time to renew it."""
    for _ in range(20):
        scene.run()
        scene.pass_time(4)
        scene.store.renew_client("bob" if "bob" in read(scene.store).clients else "alice")
        if "alive" in scene.store.node_infos():
            scene.store.heartbeat("alive")


def outcome(store: Store) -> Any:
    contents = read(store)
    rows = {
        key: (row.state, row.waiting, row.needed, sorted(row.holders), row.places)
        for key, row in contents.records.items()
    }
    return rows, sorted(contents.clients), sorted(contents.nodes), contents.owned, contents.unsettled


@pytest.mark.parametrize("what_dies", [a_dead_client, a_dead_node])
def test_a_coordinator_may_die_before_and_after_each_of_its_calls(
    make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, what_dies: Callable[[Scene], None]
) -> None:
    for call in (Store.expire_client, Store.leave_node):  # several calls for what one would do
        monkeypatch.setitem(call.__kwdefaults__, "most", 7)

    def scene() -> Scene:
        it = Scene(make_store(sweep_budget=5))
        what_dies(it)
        return it

    undisturbed = scene()
    before = outcome(undisturbed.store)
    run_to_the_end(undisturbed)
    expected = outcome(undisturbed.store)
    assert audit(undisturbed.store) == []
    assert before != expected
    n_deaths = 0
    for n, after in itertools.product(range(1, 1000), (False, True)):
        it = scene()
        try:
            with DeathAt(it.store.link, n, after=after):
                it.run()
        except Died:
            n_deaths += 1
        else:
            break  # it had done all of its calls
        fresh_coordinator(it)
        run_to_the_end(it)
        assert outcome(it.store) == expected, (n, after)
        assert audit(it.store) == []
    assert n_deaths > 20
