"""Random graphs whose values are known."""

from __future__ import annotations

import random

from celery_mem import Client, Future
from tests import tasks


class Graph:
    """Layers of tasks, each adding up some of the layer before; sums go through large results now and then.

    Args:
        url: where the tasks count their runs.
        name: beginning of the names under which they do.
    """

    def __init__(
        self, client: Client, url: str, name: str, *, seed: int, layers: int = 5, width: int = 40
    ) -> None:
        chance = random.Random(seed)
        self.futures: list[Future] = []
        self.values: list[int] = []
        below: list[Future] = []
        values: list[int] = []
        for layer in range(layers):
            futures, sums = [], []
            for i in range(width):
                chosen = chance.sample(range(len(below)), min(3, len(below)))
                seconds = 0.1 if chance.random() < 0.02 else 0.002
                task = f"{name}-{layer}-{i}"
                own = layer * 1000 + i
                future = client.submit(
                    tasks.counted, (url, task), own, *(below[j] for j in chosen), seconds=seconds
                )
                value = own + sum(values[j] for j in chosen)
                if chance.random() < 0.2:
                    large = client.submit(tasks.large, (url, f"{task}-large"), 3000, own % 200)
                    future = client.submit(tasks.total_and, (url, f"{task}-total"), large, future)
                    value += 3000 * (own % 200)
                futures.append(future)
                sums.append(value)
            # Futures of the layer before go here: what it made stays only while it is needed.
            below, values = futures, sums
        self.futures, self.values = below, values
