"""A client process that does one job after the other and checks every value; SIGTERM ends it after a job.

    python -m tests.faults.chaos.player '{"name": "k0", "seed": 1, …}'

It says what it does in lines of JSON.
"""

from __future__ import annotations

import faulthandler
import gc
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from celery_mem import Client
from celery_mem.config import Settings
from tests.faults.chaos.jobs import JOBS, Stage
from tests.tasks import redis_of


def say(**entry: Any) -> None:
    """Write one line."""
    os.write(1, json.dumps(entry).encode() + b"\n")


def runs_of(url: str, prefix: str) -> tuple[int, int]:
    """Return how many tasks counted runs under names with a prefix, and how many runs; forget them."""
    redis = redis_of(url)
    names = list(redis.scan_iter(f"runs:{prefix}*", 10_000))
    runs = sum(redis.scard(name) for name in names)
    if names:
        redis.unlink(*names)
    return len(names), runs


def main() -> None:
    """Do jobs until told to end, or until one fails."""
    spec = json.loads(sys.argv[1])
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    lasting = {"name": spec["name"], "lease": spec["lease"]} if spec["lease"] else {}
    with Client(Settings.load().url, set_as_default=False, **lasting) as client:
        if lasting:
            client.forget()
        for number in itertools.count():
            if told:
                break
            name = f"{spec['name']}.{spec['life']}.{number}"
            chance = random.Random(f"{spec['seed']}/{name}")
            job = chance.choice([j for j in JOBS if not spec["jobs"] or j.__name__ in spec["jobs"]])
            stage = Stage(client, spec["url"], name, chance, spec["patience_s"], Path(spec["folder"]))
            say(begun=name, job=job.__name__)
            started = time.monotonic()
            try:
                job(stage)
            except BaseException as error:
                say(failed=name, job=job.__name__, error=type(error).__name__, text=traceback.format_exc())
                faulthandler.dump_traceback(all_threads=True)
                os._exit(3)  # without a goodbye: what is there now is to be looked at
            n_tasks, n_runs = runs_of(spec["url"], name + "-")
            seconds = time.monotonic() - started
            say(done=name, job=job.__name__, seconds=seconds, tasks=n_tasks, runs=n_runs, notes=stage.notes)
            gc.collect()
        if lasting:
            client.close(release=True)
    say(ended=spec["name"])


if __name__ == "__main__":
    main()
