"""Benchmarks: celery-mem and dask.distributed on the same machine, in the same run, in alternation.

    python -m benchmarks                      every workload with a target, five repetitions
    python -m benchmarks --only map_noop,tree --reps 3 --json figures.json
    python -m benchmarks.soak --minutes 5     random traffic; must end with nothing left in Redis

`workloads.py` says what is measured and which targets hold, `contenders.py` how each system is
started and driven, `child.py` is the process that runs one contender once, `harness.py` alternates
them and `report.py` turns samples into the table.
"""
