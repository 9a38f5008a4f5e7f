"""The Procfile, run as Heroku or any other process manager would."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from celery_mem import Client, LocalCluster
from tests.local.conftest import all_gone

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.mark.skipif(not (BIN / "celery-mem").exists(), reason="the package is not installed here")
def test_the_procfile_is_a_whole_deployment() -> None:
    with LocalCluster(0, coordinators=0) as redis_only:
        environ = os.environ | {
            "CELERY_MEM_URL": redis_only.url,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "WEB_CONCURRENCY": "1",
            "DYNO": "worker.1",
        }
        command = [str(BIN / "honcho"), "-f", str(ROOT / "Procfile"), "start", "worker", "coordinator"]
        with subprocess.Popen(
            command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        ) as honcho:
            try:
                with Client(redis_only.url, set_as_default=False) as client:
                    client.wait_for_workers(1, timeout=60)
                    assert client.submit(sum, [1, 2]).result(timeout=60) == 3
                    assert [name.partition("@")[0] for name in client.info()["nodes"]] == ["worker-worker.1"]
                family = psutil.Process(honcho.pid).children(recursive=True)
                release = [str(BIN / "celery-mem"), "check"]  # the release phase
                subprocess.run(release, env=environ, check=True, stdout=subprocess.DEVNULL)
            finally:
                honcho.send_signal(signal.SIGTERM)
        assert all_gone(family, timeout=30)
