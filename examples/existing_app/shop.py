"""A small Celery app as many have it: tasks, a result backend, a periodic report. Two lines are new."""

import os
import random

from celery import Celery

import celery_mem  # new

url = os.environ.get("REDIS_URL", "redis://localhost:6379/0")
broker = url.replace("unix://", "redis+socket://", 1)
app = Celery("shop", broker=broker, backend=broker)
app.conf.update(
    broker_connection_retry_on_startup=True,
    beat_schedule={"report": {"task": "shop.count_orders", "schedule": 3600.0, "args": (2026,)}},
)
celery_mem.install(app)  # new


@app.task
def load_orders(day: int) -> list[tuple[str, float]]:
    """The orders of one day: customer and amount. Stands in for a query."""
    chance = random.Random(day)
    return [(f"customer {chance.randrange(50)}", round(chance.uniform(1, 100), 2)) for _ in range(200)]


@app.task
def revenue(orders: list[tuple[str, float]]) -> float:
    """What was sold, in all."""
    return round(sum(amount for _, amount in orders), 2)


@app.task
def best_customer(orders: list[tuple[str, float]]) -> str:
    """Who bought most."""
    totals: dict[str, float] = {}
    for customer, amount in orders:
        totals[customer] = totals.get(customer, 0.0) + amount
    return max(totals, key=lambda customer: totals[customer])


@app.task
def count_orders(year: int) -> int:
    """A task that nobody changes: it goes through Celery's own result backend, as before."""
    return 365 * len(load_orders.run(year))
