"""The end of a Heroku dyno: SIGTERM to all of its processes, which Celery takes for a soft shutdown."""

from __future__ import annotations

import signal
from contextlib import suppress

import numpy as np
import psutil

from celery_mem.state.keys import TASK
from tests import tasks
from tests.deployment import Deployment


def test_a_dyno_that_ends_loses_no_task_blames_none_and_saves_what_only_it_has() -> None:
    with Deployment(ticket_lease=2.0) as it:
        it.start_coordinator()
        env = {"REMAP_SIGTERM": "SIGQUIT", "SHOP_SOFT_SHUTDOWN": "1"}
        it.start_worker("w0", app="tests.worker.shop", slots=2, env=env)
        with it.client() as client:
            kept = client.submit(tasks.large, (it.url, "kept"), 1_000_000, 7)
            client.wait_for([kept._state], 60, "it")
            short = client.submit(tasks.counted, (it.url, "short"), 1, seconds=0.5)
            long = client.submit(tasks.wait_for_word, (it.url, "long"), "done")
            it.wait_until(lambda: it.runs("long") and it.runs("short"), "both to run")
            family = psutil.Process(it.pid("w0"))
            for process in (family, *family.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM)
            it.wait_gone("w0")
            it.start_worker("w1", app="tests.worker.shop")
            assert short.result(timeout=60) == 1
            it.redis.rpush("go:long", "x", "x")
            assert long.result(timeout=60) == "done"
            assert it.redis.hget(it.key(f"t:{long.key}"), TASK["deaths"]) is None
            assert np.all(kept.result(timeout=60) == 7)
            assert it.runs("kept") == {"kept": 1}  # saved, and not made again
            assert it.runs("long") == {"long": 2}
        it.redis.delete("go:long")
        it.check_empty()
