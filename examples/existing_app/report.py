"""What celery-mem adds: a report over a month whose parts stay on the workers, computed once each."""

from shop import app, best_customer, count_orders, load_orders, revenue

from celery_mem import Client


def report(days: range) -> None:
    with Client(app) as client:
        # Thirty tasks of the app; what they load stays in the memory of the workers that loaded it.
        orders = client.map(load_orders, days)
        # Both read the same orders, and nothing of them comes here.
        revenues = client.map(revenue, orders)
        customers = client.map(best_customer, orders)
        total = client.submit(sum, revenues)
        print(f"revenue of {len(days)} days: {total.result():,.2f}")
        print(f"best customer of the first day: {customers[0].result()}")
        held = client.info()["tasks"]["memory"]
        print(f"loaded {len(days)} times, read {2 * len(days)} times, held: {held} results")
    # Celery as before, on the same workers.
    print(f"orders of a year: {count_orders.delay(2026).get(timeout=60):,}")


if __name__ == "__main__":
    report(range(1, 31))
