"""Where a task may run: what `workers=`, `allow_other_workers=` and `resources=` mean to Redis.

A worker is named by its node (`celery@host`) or by its host, which means every node there. A strict
constraint is one canonical text, its signature: equal constraints of however many tasks share one queue.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from celery_mem.errors import UnknownWorkerError
from celery_mem.state.keys import LEAVING

Workers = str | Collection[str] | None
"""One name, or several; None or none at all: any worker."""
Resources = Mapping[str, float] | None


class Constraint(NamedTuple):
    """Where a task may run and where it had better.

    Attributes:
        strict: signature of what a node must fulfil; empty if any will do.
        prefer: names of the nodes that are tried first, joined by newlines.
    """

    strict: str = ""
    prefer: str = ""


ANYWHERE = Constraint()


def constraint_of(
    workers: Workers = None, allow_other_workers: bool | None = False, resources: Resources = None
) -> Constraint:
    """Return the constraint that the arguments of a call mean.

    Args:
        workers: names of nodes or hosts. One that does not exist is no mistake: such a worker may come yet.
        allow_other_workers: the workers are a wish. Resources are needed all the same.
        resources: what a task takes of its node while it runs, by name.
    Raises:
        TypeError, ValueError: what is no name, no number, or not above zero.
    """
    if allow_other_workers not in (True, False, None):
        raise TypeError(f"allow_other_workers is True or False, not {allow_other_workers!r}")
    names, amounts = names_of(workers), _amounts_of(resources)
    if allow_other_workers:
        return Constraint(_signature((), amounts), "\n".join(names))
    return Constraint(_signature(names, amounts))


def names_of(workers: Workers, what: str = "workers") -> tuple[str, ...]:
    """Return the names of workers, sorted, each once.

    Raises:
        TypeError, ValueError: one is no name.
    """
    if workers is None:
        return ()
    given: Any = [workers] if isinstance(workers, str) else workers
    if not isinstance(given, (list, tuple, set, frozenset)):
        raise TypeError(f"{what} is a name or a list of names of nodes or hosts, not {workers!r}")
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"{what} names nodes (celery@host) or hosts, not {name!r}")
        if not name or "\n" in name:
            raise ValueError(f"{what}: {name!r} cannot be the name of a node or a host")
    return tuple(sorted(set(given)))


def _amounts_of(resources: Any) -> dict[str, float]:
    if resources is None:
        return {}
    if not isinstance(resources, Mapping):
        raise TypeError(f'resources are amounts by name, such as {{"GPU": 1}}, not {resources!r}')
    amounts: dict[str, float] = {}
    for name, amount in resources.items():
        if not isinstance(name, str) or isinstance(amount, bool) or not isinstance(amount, (int, float)):
            raise TypeError(f'resources are amounts by name, such as {{"GPU": 1}}, not {name!r}: {amount!r}')
        if not 0 < amount < float("inf"):
            raise ValueError(f"resources: the amount of {name!r} must be above zero, not {amount!r}")
        amounts[name] = int(amount) if float(amount).is_integer() else float(amount)
    return amounts


def _signature(names: tuple[str, ...], amounts: Mapping[str, float]) -> str:
    if not names and not amounts:
        return ""
    return json.dumps(
        {"workers": names, "resources": amounts}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )


# --- per part of a collection -------------------------------------------------------------------------------


def is_per_key(value: Any) -> bool:
    """Tell whether `workers=` or `resources=` of a call is a dict of its own for each collection or key."""
    if not isinstance(value, Mapping) or not value:
        return False
    # Amounts of resources have names for keys and numbers for values.
    return not all(isinstance(k, str) and isinstance(v, (int, float)) for k, v in value.items())


# --- nodes --------------------------------------------------------------------------------------------------


def host_of(node: str) -> str:
    """Return the host in the name of a node."""
    return node.rpartition("@")[2]


def select(workers: Workers, nodes: Iterable[str]) -> list[str]:
    """Return the nodes that `workers` names, in the order of `nodes`; all of them for None.

    For calls that need the workers now.

    Raises:
        UnknownWorkerError: a name is of no node that is there.
    """
    known = list(nodes)
    names = names_of(workers)
    if not names:
        return known
    unknown = [name for name in names if not any(name in (node, host_of(node)) for node in known)]
    if unknown:
        raise UnknownWorkerError(tuple(unknown), tuple(known))
    return [node for node in known if node in names or host_of(node) in names]


def why_nobody_may_run(signature: str, nodes: Mapping[str, Mapping[str, Any]]) -> str:
    """Say why no node can run tasks of a constraint; empty if one can.

    Args:
        nodes: what each live node says of itself: `resources` (amounts by name), `status`, `slots`.
    """
    if not signature:
        return ""
    wanted = json.loads(signature)
    names, amounts = wanted["workers"], wanted["resources"]
    named = [n for n in nodes if not names or n in names or host_of(n) in names]
    if not named:
        there = ", ".join(sorted(nodes)) or "none"
        return (
            f"no worker is called {' or '.join(names)}; there are: {there}" if names else "no worker is there"
        )
    able = [n for n in named if _has(nodes[n].get("resources") or {}, amounts)]
    if not able:
        needs = ", ".join(f"{name} {amount:g}" for name, amount in amounts.items())
        offers = "; ".join(f"{n}: {_offer(nodes[n].get('resources') or {})}" for n in sorted(named))
        return f"it needs {needs}, and {'the workers named have' if names else 'the workers have'} {offers}"
    if all(nodes[n].get("status") in LEAVING for n in able):
        return f"{', '.join(sorted(able))} {'is' if len(able) == 1 else 'are'} about to leave"
    return ""


def _has(offer: Mapping[str, Any], amounts: Mapping[str, float]) -> bool:
    return all(float(offer.get(name, 0)) >= amount for name, amount in amounts.items())


def _offer(resources: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {float(amount):g}" for name, amount in resources.items()) or "nothing declared"


QUEUE = "queue:"
ENOUGH = 1e9
"""What a node has of a queue that it consumes: as much as tasks can ask for."""


def with_queue(resources: Resources, queue: str | None) -> Resources:
    """Return the resources of a task that only workers of a Celery queue may run.

    A queue is a resource of which those workers have no end: no other rule is needed.
    """
    if queue is None:
        return resources
    if not queue:
        raise ValueError("queue: the name of a Celery queue, not an empty text")
    return {**(resources or {}), f"{QUEUE}{queue}": 1}
