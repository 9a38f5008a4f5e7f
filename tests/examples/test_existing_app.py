"""examples/existing_app, by the commands of its README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from celery_mem import Client, LocalCluster
from tests.deployment import ROOT

FOLDER = ROOT / "examples" / "existing_app"
BIN = Path(sys.executable).parent


def test_the_app_does_its_own_work_and_a_graph_of_its_tasks(tmp_path: Path) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    _, worker, coordinator, report = (line.split() for line in block.strip().splitlines())
    with LocalCluster(0, coordinators=0) as redis_only:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("CELERY", "REDIS"))}
        env |= {"REDIS_URL": redis_only.url, "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
        with (tmp_path / "log").open("wb") as log:
            running = [
                subprocess.Popen(command, cwd=FOLDER, env=env, stdout=log, stderr=log)
                for command in (worker, coordinator)
            ]
            try:
                with Client(redis_only.url, set_as_default=False) as client:
                    client.wait_for_workers(1, timeout=60)
                shown = subprocess.run(
                    report, cwd=FOLDER, env=env, capture_output=True, text=True, check=False
                )
            finally:
                for process in running:
                    process.terminate()
                for process in running:
                    process.wait(60)
    assert shown.returncode == 0, shown.stderr + (tmp_path / "log").read_text()[-3000:]
    assert "revenue of 30 days: " in shown.stdout
    assert re.search(r"best customer of the first day: customer \d+", shown.stdout)
    assert "held: 91 results" in shown.stdout
    assert "orders of a year: 73,000" in shown.stdout
