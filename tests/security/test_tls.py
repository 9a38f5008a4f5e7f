"""rediss:// addresses: certificates are checked, unless somebody says that they need not be."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from celery_mem import Client
from celery_mem.config import Settings
from celery_mem.errors import RedisUnavailableError
from celery_mem.local.redis import find_redis_server
from tests.deployment import ROOT, wait_until


class Server(NamedTuple):
    url: str
    certificate: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Redis that speaks TLS only, with a certificate that it signed itself."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=localhost",
            ),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = {
        "bind": "127.0.0.1",
        "port": "0",
        "tls-port": str(port),
        "tls-cert-file": str(certificate),
        "tls-key-file": str(key),
        "tls-auth-clients": "no",
        "save": "",
        "dir": str(folder),
    }
    command = [
        find_redis_server().path,
        *(word for name, value in options.items() for word in (f"--{name}", value)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None:
                    pytest.skip("this redis-server was built without TLS")
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield Server(f"rediss://localhost:{port}/0", certificate)
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_a_certificate_that_nobody_vouches_for_is_refused_with_what_to_set(server: Server) -> None:
    with pytest.raises(RedisUnavailableError, match=r"not trusted.*mem_ssl_ca_certs.*mem_ssl_cert_reqs"):
        Client(server.url, set_as_default=False)


@pytest.mark.parametrize("how", ["its authority is known", "any will do"])
def test_a_job_is_done_over_tls(server: Server, how: str, tmp_path: Path) -> None:
    settings = (
        {"ssl_ca_certs": str(server.certificate)}
        if how == "its authority is known"
        else {"ssl_cert_reqs": "none"}
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CELERY", "REDIS"))}
    env |= {"PYTHONPATH": str(ROOT), "CELERY_MEM_URL": server.url}
    env |= {f"CELERY_MEM_{name.upper()}": value for name, value in settings.items()}
    commands = [
        [
            *("-m", "celery", "-A", "celery_mem.worker.app", "worker", "-c", "1", "-l", "INFO"),
            "--without-mingle",
        ],
        ["-m", "celery_mem.cli", "coordinator"],
    ]
    with (tmp_path / "log").open("wb") as log:
        processes = [
            subprocess.Popen([sys.executable, *command], env=env, cwd=tmp_path, stdout=log, stderr=log)
            for command in commands
        ]
        try:
            with Client(server.url, set_as_default=False, **settings) as client:  # type: ignore[arg-type]
                futures = client.map(pow, range(50), [2] * 50)
                total = client.submit(sum, futures)
                wait_until(total.done, f"a job over TLS: {(tmp_path / 'log').read_text()[-3000:]}")
                assert total.result() == sum(n * n for n in range(50))
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(60)


def test_an_address_in_the_spelling_of_celery_is_understood() -> None:
    url = Settings.load(url="rediss://h:1/0?ssl_cert_reqs=CERT_NONE").url
    assert url == "rediss://h:1/0?ssl_cert_reqs=none"
    assert Settings.load(url="rediss://h:1/0").url == "rediss://h:1/0?ssl_cert_reqs=required"
    assert Settings.load(url="redis://h:1/0", ssl_cert_reqs="none").url == "redis://h:1/0"
