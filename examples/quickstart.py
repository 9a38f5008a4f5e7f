"""The smallest tour: `python examples/quickstart.py` starts a cluster of its own and stops it again."""

from celery_mem import Client


def square(x: int) -> int:
    return x * x


if __name__ == "__main__":
    with Client() as client:  # no address: a private Redis and Celery workers, gone at the end
        squares = client.map(square, range(100))  # returns at once: 100 futures, the workers do the rest
        total = client.submit(sum, squares)  # futures are arguments like any other
        print("sum of squares:", total.result())  # waits for one number and fetches it
        print("held, so kept: ", client.nbytes([squares[-1], total]))
        del squares  # nobody holds them any more: their data is freed, only their recipes stay
        print("still held:    ", total.result(), total)
