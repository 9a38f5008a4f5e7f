"""Spans of OpenTelemetry: a task submitted inside one has one on its worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import pytest

from celery_mem import Client, get_client
from celery_mem.errors import TaskInterrupt
from celery_mem.graph.errors import encode_error
from celery_mem.graph.tracing import context_of, current_context
from celery_mem.state.keys import TASK
from celery_mem.state.store import Done, Taken
from celery_mem.testing import InProcessCluster
from celery_mem.worker.tracing import begin_span
from tests.on_cluster import until
from tests.tasks import inc
from tests.worker.conftest import Space

pytest.importorskip("opentelemetry.sdk")
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

KEY = "k" * 40


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """What was traced in this process; its provider stays for the run, and sees nothing outside of spans."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Callable[[], list[ReadableSpan]]:
    """A function that returns the spans that ended during this test."""
    exporter.clear()
    return lambda: list(exporter.get_finished_spans())


def tracer() -> Any:
    return trace.get_tracer("test")


def fail(x: int) -> None:
    raise ValueError(f"no {x}")


def inc_in_a_span_of_its_own(x: int) -> int:
    with tracer().start_as_current_span("inner"):
        return x + 1


def parent_of(span: ReadableSpan) -> tuple[int, int]:
    """Trace and span that a span names as its parent."""
    assert span.parent is not None
    return span.parent.trace_id, span.parent.span_id


def id_of(span: Any) -> tuple[int, int]:
    context = span.get_span_context()
    return context.trace_id, context.span_id


def payload_of(space: Space, key: str) -> bytes:
    return bytes(space.store.link.call("HGET", space.store.keys.of("task", key), TASK["payload"]))


def test_a_task_is_a_child_of_the_span_that_was_current_when_it_was_submitted(space: Space, spans) -> None:
    with tracer().start_as_current_span("request") as parent:
        future = space.submit(inc, 1)
    space.slot().run_ticket("t")
    assert future.result(timeout=10) == 2

    request, span = spans()
    assert (request.name, span.name) == ("request", "inc")
    assert parent_of(span) == id_of(parent)
    assert span.kind == SpanKind.CONSUMER
    assert span.attributes == {
        "celery_mem.key": future.key,
        "celery_mem.function": "inc",
        "celery_mem.worker": "node",
        "celery_mem.namespace": space.settings.namespace,
        "celery_mem.attempt": 1,
        "celery_mem.outcome": "succeeded",
    }
    assert span.status.status_code == StatusCode.UNSET


def test_spans_that_the_function_makes_are_below_that_of_its_task(space: Space, spans) -> None:
    with tracer().start_as_current_span("request"):
        future = space.submit(inc_in_a_span_of_its_own, 1)
    space.slot().run_ticket("t")
    assert future.result(timeout=10) == 2

    _, inner, task = spans()
    assert inner.name == "inner"
    assert parent_of(inner) == id_of(task)
    assert not trace.get_current_span().get_span_context().is_valid


def test_a_failure_is_recorded_with_its_exception_for_every_attempt(space: Space, spans) -> None:
    with tracer().start_as_current_span("request") as parent:
        future = space.submit(fail, 7, retries=1)
    space.slot().run_ticket("t")
    assert isinstance(future.exception(timeout=10), ValueError)

    _, *attempts = spans()
    assert [span.attributes["celery_mem.attempt"] for span in attempts] == [1, 2]
    for span in attempts:
        assert parent_of(span) == id_of(parent)
        assert span.attributes["celery_mem.outcome"] == "failed"
        assert span.status.status_code == StatusCode.ERROR
        assert span.status.description == "ValueError: no 7"
        [event] = span.events
        assert event.attributes["exception.message"] == "no 7"
        assert "in fail" in event.attributes["exception.stacktrace"]


def test_a_function_that_cannot_be_had_is_seen_too(space: Space, spans) -> None:
    with tracer().start_as_current_span("request"):
        future = space.submit(inc, 1)
    [name] = space.store.link.call("HKEYS", space.store.keys.fixed("functions"))
    space.store.link.call("SET", space.store.keys.of("function", name.decode()), "junk")
    space.slot().run_ticket("t")
    assert future.exception(timeout=10) is not None

    _, span = spans()
    assert span.name == "inc"  # by its key
    assert span.status.status_code == StatusCode.ERROR


def test_without_a_span_nothing_goes_along_and_nothing_is_traced(space: Space, spans) -> None:
    future = space.submit(inc, 1)
    assert context_of(payload_of(space, future.key)) == (b"", payload_of(space, future.key))
    space.slot().run_ticket("t")
    assert future.result(timeout=10) == 2
    assert spans() == []


@pytest.mark.parametrize("where", ["client", "worker"])
def test_it_can_be_switched_off_at_either_end(redis_server: str, tmp_path: Path, spans, where: str) -> None:
    space = Space(redis_server, tmp_path, **({"tracing": "off"} if where == "client" else {}))
    try:
        with tracer().start_as_current_span("request"):
            future = space.submit(inc, 1)
            assert space.client.gather([]) == []
        assert bool(context_of(payload_of(space, future.key))[0]) == (where == "worker")
        space.slot(tracing="off").run_ticket("t")
        assert future.result(timeout=10) == 2
        own = ["celery_mem.gather"] if where == "worker" else []
        assert [span.name for span in spans()] == [*own, "request"]
    finally:
        del future
        space.close()


def test_signed_work_carries_it_too_and_a_time_limit_beside_it(
    redis_server: str, tmp_path: Path, spans
) -> None:
    space = Space(redis_server, tmp_path, secret_key=KEY)
    try:
        with tracer().start_as_current_span("request") as parent:
            future = space.submit(inc, 1, timeout=60)
        space.slot().run_ticket("t")
        assert future.result(timeout=10) == 2
        assert parent_of(spans()[-1]) == id_of(parent)
    finally:
        del future
        space.close()


def test_a_worker_without_opentelemetry_runs_the_task(space: Space, spans, monkeypatch) -> None:
    with tracer().start_as_current_span("request"):
        future = space.submit(inc, 1)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "opentelemetry", None)
        space.slot().run_ticket("t")
    assert future.result(timeout=10) == 2
    assert [span.name for span in spans()] == ["request"]


class StubbornError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "outcome", "status"),
    [
        (None, "again", StatusCode.UNSET),
        (TaskInterrupt("cancelled"), "cancelled", StatusCode.ERROR),
        (TaskInterrupt("timeout"), "failed", StatusCode.ERROR),
        (StubbornError(), "failed", StatusCode.ERROR),
    ],
)
def test_a_span_tells_what_came_of_an_attempt_that_gave_no_result(
    spans, error: BaseException | None, outcome: str, status: StatusCode
) -> None:
    with tracer().start_as_current_span("request"):
        context = current_context("auto")
    span = begin_span("auto", context, Taken("k", "1", "f", b"", "", []), node="n", namespace="mem")
    assert span is not None
    if error is not None:
        span.raised(error, encode_error(error))
    span.ends(None)

    found = spans()[-1]
    assert found.attributes["celery_mem.outcome"] == outcome
    assert found.status.status_code == status


@pytest.mark.parametrize("context", [b"junk", b"[]", b'{"traceparent":7}'])
def test_a_context_that_is_none_costs_no_result(spans, context: bytes) -> None:
    task = Taken("k", "1", "f", b"", "", [])
    span = begin_span("auto", context, task, node="n", namespace="mem")
    if span is not None:
        span.ends(Done("k", "1", 1, "int", "v", b""))


def test_what_a_task_submits_is_below_its_span(spans) -> None:
    def outer(x: int) -> int:
        return int(get_client().submit(inc, x).result(timeout=30))

    with InProcessCluster(n_workers=2, threads_per_worker=1) as cluster, cluster.client() as client:
        with tracer().start_as_current_span("request") as parent:
            future = client.submit(outer, 1)
        assert future.result(timeout=30) == 2
        assert until(lambda: {"outer", "inc"} <= {span.name for span in spans()})
    found = {span.name: span for span in spans()}
    assert parent_of(found["outer"]) == id_of(parent)
    assert parent_of(found["inc"]) == id_of(found["outer"])


def test_calls_of_a_client_that_wait_are_spans_only_inside_one(spans) -> None:
    with InProcessCluster() as cluster, cluster.client() as client:
        value = dask.delayed(inc)(1)
        assert client.compute(value, sync=True) == 2
        assert spans() == []
        with tracer().start_as_current_span("request"):
            assert client.compute(value, sync=True) == 2
        assert until(lambda: "request" in {span.name for span in spans()})
    found = {span.name: span for span in spans()}
    assert parent_of(found["celery_mem.compute"]) == id_of(found["request"])
    assert parent_of(found["celery_mem.gather"]) == id_of(found["celery_mem.compute"])


def test_nothing_needs_opentelemetry() -> None:
    program = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from celery_mem.testing import InProcessCluster\n"
        "with InProcessCluster() as cluster, cluster.client() as client:\n"
        "    assert client.gather(client.map(abs, range(9)), timeout=30) == list(range(9))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def trace_into(path: str) -> int:
    """For a worker's process: write spans to a file from now on, as the set-up of an application would."""

    def as_line(span: ReadableSpan) -> str:
        return json.dumps(json.loads(span.to_json())) + "\n"

    provider = TracerProvider()
    out = open(path, "a", encoding="utf-8")  # noqa: SIM115 (as long as the process)
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=out, formatter=as_line)))
    trace.set_tracer_provider(provider)
    return os.getpid()


def test_a_real_worker_tells_where_a_task_ran(
    client: Client, nodes: list[str], tmp_path: Path, exporter: InMemorySpanExporter
) -> None:
    path = tmp_path / "spans"
    pid = client.submit(trace_into, str(path), workers=[nodes[0]], pure=False).result(timeout=30)
    with tracer().start_as_current_span("request") as parent:
        future = client.submit(os.getpid, workers=[nodes[0]], pure=False)
    assert future.result(timeout=30) == pid  # a node of one process

    assert until(lambda: path.read_text().endswith("\n"))
    [span] = map(json.loads, path.read_text().splitlines())
    assert int(span["parent_id"], 16) == parent.get_span_context().span_id
    assert int(span["context"]["trace_id"], 16) == parent.get_span_context().trace_id
    assert span["name"] == "getpid"
    assert span["attributes"]["celery_mem.worker"] == nodes[0]
    assert span["attributes"]["celery_mem.key"] == future.key
    assert span["attributes"]["celery_mem.queue"] == f"celery-mem.{client.settings.namespace}@{nodes[0]}"
