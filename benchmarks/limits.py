"""What the machine itself can do with 16 MiB: no contender gets past these."""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable

BLOCK = 16 << 20  # bytes
REPETITIONS = 16


def measure_limits(scale: float = 1.0) -> dict[str, float]:
    """GB/s of each way that data can take, medians of some repetitions on blocks of 16 MiB times `scale`."""
    import numpy as np

    data = np.random.default_rng(0).bytes(max(4096, round(BLOCK * scale)))
    return {
        "memcpy": _memcpy(data),
        **_shared_files(data),
        "unix socket": _socket(data),
        **_redis(data),
    }


def _rate(nbytes: int, step: Callable[[], object], after: Callable[[], object] = lambda: None) -> float:
    """Median GB/s of `step`, which is done once before; `after` undoes it, outside of the timing."""
    seconds = []
    for _ in range(REPETITIONS + 1):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
        after()
    return nbytes / 1e9 / statistics.median(seconds[1:])


def _memcpy(data: bytes) -> float:
    import numpy as np

    source = np.frombuffer(data, dtype=np.uint8)
    target = np.zeros_like(source)
    return _rate(len(data), lambda: np.copyto(target, source))


def _shared_files(data: bytes) -> dict[str, float]:
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:

        def write() -> None:
            file.seek(0)
            file.write(data)

        return {
            "fresh shared memory": _rate(len(data), write, lambda: file.truncate(0)),
            "recycled shared memory": _rate(len(data), write),
        }


def _socket(data: bytes) -> float:
    ours, theirs = socket.socketpair()

    def drain() -> None:
        buffer = bytearray(1 << 20)
        while n := theirs.recv_into(buffer):
            nonlocal received
            received += n
            if received % len(data) == 0:
                theirs.send(b"x")

    received = 0
    reader = threading.Thread(target=drain)
    reader.start()

    def send() -> None:
        ours.sendall(data)
        ours.recv(1)  # all of it has arrived

    try:
        return _rate(len(data), send)
    finally:
        ours.close()
        reader.join()
        theirs.close()


def _redis(data: bytes) -> dict[str, float]:
    import redis

    from celery_mem import LocalCluster

    with LocalCluster(n_workers=0, coordinators=0) as cluster, redis.Redis.from_url(cluster.url) as client:
        return {
            "Redis SET": _rate(len(data), lambda: client.set("x", data)),
            "Redis GET": _rate(len(data), lambda: client.get("x")),
        }
