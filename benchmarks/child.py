"""The process that runs one contender once: start, each workload, stop. Started by the harness.

    python -m benchmarks.child '{"contender": "celery-mem", "workloads": ["tree"], "scale": 1.0, "out": "…"}'

It appends one JSON object per finished workload to the file `out`, so that what was measured before
a failure is not lost.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.workloads import WORKLOADS, check_equal, inc


def run(contender: Contender, names: list[str], scale: float, record: Callable[..., None]) -> None:
    """Measure the workloads `names` on a new cluster of `contender`, each once."""
    contender.load()
    started = time.perf_counter()
    contender.start()
    try:
        first = contender.result(contender.submit(inc, 1))
        startup_s = time.perf_counter() - started
        check_equal(first, 2)
        contender.wait_ready()
        record(versions=contender.versions())
        for name in names:
            workload = WORKLOADS[name]
            if workload.measure is None:
                record(workload=name, value=startup_s)
                continue
            if workload.warm_up:
                workload.measure(contender, workload.scaled(scale * workload.warm_up))
            contender.drain()
            gc.collect()
            record(workload=name, value=workload.measure(contender, workload.scaled(scale)))
            contender.drain()
    finally:
        contender.stop()


def main() -> None:
    spec = json.loads(sys.argv[1])
    with open(spec["out"], "a", encoding="utf-8") as out:

        def record(**entry: Any) -> None:
            print(json.dumps(entry), file=out, flush=True)

        run(CONTENDERS[spec["contender"]](), spec["workloads"], spec["scale"], record)
        record(finished=True)


if __name__ == "__main__":
    main()
