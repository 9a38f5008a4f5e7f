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

from benchmarks.checks import check_equal
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.memory import PeakMemory
from benchmarks.workloads import WORKLOADS, inc


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
            if name == "startup":
                record(workload=name, value=startup_s)
                continue
            source = WORKLOADS[workload.peak_of or name]
            assert source.measure is not None
            if source.warm_up and workload.peak_of not in names:  # else it has just run
                source.measure(contender, source.scaled(scale * source.warm_up))
            contender.drain()
            gc.collect()
            if workload.peak_of:
                contender.memory = peak = PeakMemory(contender.shared_files)
                source.measure(contender, source.scaled(scale))
                value = peak.mib
            else:
                value = source.measure(contender, source.scaled(scale))
            record(workload=name, value=value)
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
