"""docs/celery.md, word by word: its module, started by its commands, does what its other blocks say.

Those are marked `py`: they need workers with the module, other than what runs by itself on other pages.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from celery_mem import Client, LocalCluster
from tests.deployment import ROOT

PAGE = (ROOT / "docs" / "celery.md").read_text()
BIN = Path(sys.executable).parent
BLOCKS = re.findall(r"^```py\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
MODULE = "# shop.py\n"


def test_the_page_holds(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text("\n\n".join(b for b in BLOCKS if b.startswith(MODULE)))
    (tmp_path / "use.py").write_text("\n".join(b for b in BLOCKS if not b.startswith(MODULE)))
    commands, *_ = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    with LocalCluster(0, coordinators=0) as redis_only:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("CELERY", "REDIS"))}
        env |= {"REDIS_URL": redis_only.url, "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
        with (tmp_path / "log").open("wb") as log:
            running = [
                subprocess.Popen(line.split(), cwd=tmp_path, env=env, stdout=log, stderr=log)
                for line in commands.strip().splitlines()
            ]
            try:
                with Client(redis_only.url, set_as_default=False) as client:
                    client.wait_for_workers(1, timeout=60)
                used = subprocess.run(
                    [sys.executable, "use.py"],
                    cwd=tmp_path,
                    env=env,
                    capture_output=True,
                    text=True,
                    check=False,
                )
            finally:
                for process in running:
                    process.terminate()
                for process in running:
                    process.wait(60)
    logged = (tmp_path / "log").read_text()
    assert used.returncode == 0, used.stderr + logged[-3000:]
    (line,) = re.findall(r"^```text\n\[.*?\] (.*?)\n```", PAGE, re.DOTALL | re.MULTILINE)
    assert f"] {line}\n" in logged
    plain = (tmp_path / "tasks.log").read_text().splitlines()
    assert [entry.split(maxsplit=2)[2] for entry in plain] == [line.replace("]: ", "] ")]
