"""The command line: `celery-mem …`, and `celery -A app mem …` through Celery's plug-ins.

Every `celery` command imports this module, and a coordinator starts through it; so it imports click alone,
and each command brings in what it needs.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from celery import Celery

    from celery_mem.config import Settings
    from celery_mem.coordinator.daemon import Coordinator
    from celery_mem.local import LocalCluster
    from celery_mem.state.audit import Violation
    from celery_mem.state.store import Store

Command = TypeVar("Command", bound=Callable[..., Any])


class Group(click.Group):
    """Turns errors whose turn is the user's into one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except click.ClickException:
            raise
        except Exception as error:
            from celery_mem.errors import CeleryMemError

            if isinstance(error, CeleryMemError) or type(error).__module__.startswith("redis."):
                raise click.ClickException(str(error) or type(error).__name__) from error
            raise


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def mem() -> None:
    """Futures, lineage and Dask graphs on Celery and Redis."""


def where(command: Command) -> Command:
    """Add the options that say which namespace is meant."""
    command = click.option(
        "-n", "--namespace", metavar="NAME", help="Prefix of all keys; else $CELERY_MEM_NAMESPACE, else mem."
    )(command)
    return click.option(
        "-u",
        "--url",
        metavar="URL",
        help="Redis that holds the graph; else $CELERY_MEM_URL, the app's mem_url or broker, $REDIS_URL.",
    )(command)


def as_json(command: Command) -> Command:
    """Add the option for programs."""
    return click.option("--json", "for_programs", is_flag=True, help="Print JSON for programs.")(command)


def load_settings(url: str | None, namespace: str | None) -> Settings:
    """Return the settings from options, environment and, under `celery -A app mem`, the app."""
    from celery_mem.config import Settings

    return Settings.load(celery_app(), url=url, namespace=namespace)


def celery_app() -> Celery | None:
    """Return the app under `celery -A app mem` and `celery -b broker mem`, None elsewhere."""
    root = click.get_current_context().find_root()
    # Without both, Celery makes up an app whose broker is an amqp:// that nobody named.
    return root.obj.app if root.params.get("app") or root.params.get("broker") else None


def look_at(url: str | None, namespace: str | None) -> Store:
    """Return a store to read from: nothing is written, so a namespace that does not exist stays so."""
    from celery_mem.state.link import Link
    from celery_mem.state.store import Store

    # Somebody waits for the answer, so give up soon when Redis is away.
    settings = load_settings(url, namespace).replace(retry_timeout=2.0)
    return Store(Link.connect(settings), settings, generation="")


# --- commands -----------------------------------------------------------------------------------------------


@mem.command()
@click.option("-w", "--workers", type=click.IntRange(min=0), help="Worker nodes; else one per processor.")
@click.option(
    "-t", "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Slots of each worker."
)
@click.option(
    "-P",
    "--pool",
    type=click.Choice(["prefork", "threads", "solo"]),
    default="prefork",
    show_default=True,
    help="Celery pool of the workers.",
)
@click.option("-c", "--coordinators", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("-n", "--namespace", default="mem", show_default=True, help="Prefix of all keys.")
@click.option("--restart/--no-restart", default=True, show_default=True, help="Start again what died.")
@click.option("-q", "--quiet", is_flag=True, help="Keep the output of the processes to files.")
@as_json
def local(
    workers: int | None,
    threads: int,
    pool: str,
    coordinators: int,
    namespace: str,
    restart: bool,
    quiet: bool,
    for_programs: bool,
) -> None:
    """Run a cluster on this machine, with a private Redis, until Ctrl-C."""
    from celery_mem.local import LocalCluster

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    with (
        suppress(KeyboardInterrupt),
        LocalCluster(
            workers,
            threads,
            pool=pool,
            coordinators=coordinators,
            namespace=namespace,
            restart=restart,
            silence=quiet,
        ) as cluster,
    ):
        _announce(cluster, for_programs)
        cluster.wait()
        cluster.check()  # it ended by itself: raises what happened


@mem.command()
@where
@click.option(
    "-l",
    "--loglevel",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False),
    default="INFO",
    show_default=True,
)
@click.option("--metrics-port", type=click.IntRange(0, 65535), help="Serve metrics for Prometheus there.")
@click.option(
    "--metrics-address", default="127.0.0.1", show_default=True, help="Who may reach that port; 0.0.0.0: all."
)
def coordinator(
    url: str | None, namespace: str | None, loglevel: str, metrics_port: int | None, metrics_address: str
) -> None:
    """Run the daemon that frees, recovers and calls workers; any number may run, one leads."""
    import logging

    from celery_mem.coordinator.daemon import run

    logging.basicConfig(
        stream=sys.stderr,
        level=loglevel.upper(),
        format="[%(asctime)s: %(levelname)s/coordinator] %(message)s",
    )
    watch = None
    if metrics_port is not None:
        try:
            from celery_mem.monitor.metrics import serve
        except ImportError as error:
            raise click.ClickException(
                "prometheus_client is not installed: pip install 'celery-mem[flower]'"
            ) from error

        source = look_at(url, namespace)

        def watch(leader: Coordinator) -> None:
            serve(metrics_address, metrics_port, source, leader.totals)

    run(load_settings(url, namespace), celery_app(), watch=watch)


@mem.command()
@where
@as_json
@click.option("--watch", is_flag=True, help="Show it again and again until Ctrl-C.")
@click.option("--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, metavar="SECONDS")
def status(url: str | None, namespace: str | None, for_programs: bool, watch: bool, interval: float) -> None:
    """Show nodes and their memory, queues, jobs, clients, and tasks by state."""
    from celery_mem.graph.overview import overview

    store = look_at(url, namespace)
    if watch:
        _watch(lambda: overview(store), interval, for_programs)
    elif for_programs:
        click.echo(_dump(overview(store)))
    else:
        from celery_mem.cli_tables import show_on_terminal, status_tables

        show_on_terminal(status_tables(overview(store)))


@mem.command()
@click.argument("key")
@where
@as_json
def show(key: str, url: str | None, namespace: str | None, for_programs: bool) -> None:
    """Show one task: its state, where its result is, holders, dependencies and error.

    KEY is the text of the key, as status and Flower print it: inc-1a2b, or ('x-3c4d', 0, 1).
    """
    from celery_mem.state.inspect import describe_task

    store = look_at(url, namespace)
    task = describe_task(store, key)
    if task is None:
        raise click.ClickException(f"no record of {key!r} in namespace {store.keys.namespace!r}")
    if task["error"] is not None:
        from celery_mem.graph.errors import error_summary

        task["error"] = dict(zip(("type", "message", "traceback"), error_summary(task["error"]), strict=True))
    if for_programs:
        click.echo(_dump(task))
    else:
        from celery_mem.cli_tables import show_on_terminal, task_table

        show_on_terminal(task_table(task))


@mem.command()
@where
@as_json
@click.option(
    "--patience",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="TIMES",
    help="A fault counts if so many readings find it; work that goes on looks inconsistent for a moment.",
)
@click.option(
    "--fix",
    is_flag=True,
    help="First remove what dead workers left on this host, and durable files that no record names.",
)
def check(url: str | None, namespace: str | None, for_programs: bool, patience: int, fix: bool) -> None:
    """Check every rule of the task graph and of the files on this host; exit code 1 if one is broken."""
    from celery_mem.memory.audit_files import remove_unknown_durable
    from celery_mem.memory.roots import remove_all_dead
    from celery_mem.state.inspect import server_facts, server_warnings

    store = look_at(url, namespace)
    removed = remove_all_dead(store.settings.shm_folder) if fix else []
    forgotten = remove_unknown_durable(store) if fix else []
    warnings = server_warnings(server_facts(store.link))
    violations = lasting_violations(store, patience)
    if for_programs:
        rows = [violation._asdict() for violation in violations]
        click.echo(
            _dump(
                {
                    "ok": not violations,
                    "violations": rows,
                    "warnings": warnings,
                    "removed": [*removed, *forgotten],
                }
            )
        )
    else:
        for warning in warnings:
            click.echo(f"Warning: {warning}", err=True)
        for path in removed:
            click.echo(f"removed {path}, which a dead worker left")
        for token in forgotten:
            click.echo(f"removed the durable file {token}, which no record names")
        for violation in violations:
            click.echo(str(violation))
        summary = f"rules broken: {len(violations)}" if violations else "every rule holds"
        click.echo(f"namespace {store.keys.namespace}: {summary}")
    if violations:
        sys.exit(1)


@mem.command()
@where
@as_json
def doctor(url: str | None, namespace: str | None, for_programs: bool) -> None:
    """Say what is wrong with this deployment, and what to set; exit code 1 if work is impossible or lost."""
    from celery_mem.graph.doctor import ERROR, examine, gather_facts

    store = look_at(url, namespace)
    findings = examine(gather_facts(store, load_settings(url, namespace)))
    is_ill = any(finding.level == ERROR for finding in findings)
    if for_programs:
        click.echo(_dump({"ok": not is_ill, "findings": [finding._asdict() for finding in findings]}))
    else:
        for finding in findings:
            click.secho(f"{finding.level}: {finding.text}", fg="red" if finding.level == ERROR else "yellow")
            click.echo(f"    {finding.advice}")
        click.echo(f"namespace {store.keys.namespace}: {len(findings) or 'nothing'} to look at")
    if is_ill:
        sys.exit(1)


def for_a_while(command: Command) -> Command:
    """Add the options of commands that record."""
    command = click.option(
        "--most", type=click.IntRange(min=1), metavar="TASKS", help="Keep so many; of more, the oldest go."
    )(command)
    return click.option(
        "--seconds", type=click.FloatRange(min=0.1), metavar="SECONDS", help="End then, and not at Ctrl-C."
    )(command)


@mem.command()
@click.argument("file", type=click.Path(dir_okay=False))
@where
@for_a_while
def record(
    file: str, url: str | None, namespace: str | None, seconds: float | None, most: int | None
) -> None:
    """Record what runs, of all clients, until Ctrl-C, and write it to FILE.

    FILE is JSON, which `celery-mem report --from` makes a page of; or that page, if its name ends in .html.
    """
    _record(file, url, namespace, seconds, most)


@mem.command()
@click.argument("file", type=click.Path(dir_okay=False))
@where
@for_a_while
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, dir_okay=False),
    metavar="RECORDING",
    help="A file of `celery-mem record` or Client.record; without it, record what runs until Ctrl-C.",
)
@click.option("--title", default="", help="Headline of the page.")
def report(
    file: str,
    url: str | None,
    namespace: str | None,
    seconds: float | None,
    most: int | None,
    source: str | None,
    title: str,
) -> None:
    """Write a page about what ran to FILE: task stream, memory over time, slowest functions.

    It is one file of HTML that needs no network.
    """
    from celery_mem.profiling.recording import Recording

    if source is None:
        _record(file, url, namespace, seconds, most, title)
        return
    if seconds is not None or most is not None:
        raise click.UsageError("--seconds and --most are for recording; with --from that is over")
    _check_place(file)
    recording = Recording.load(source)
    recording.report(file, title=title)
    click.echo(f"wrote {file}: {len(recording):,} tasks")


def _check_place(file: str) -> None:
    from celery_mem.profiling.recording import check_place

    try:
        check_place(file)
    except OSError as error:
        raise click.ClickException(str(error)) from error


def _record(
    file: str,
    url: str | None,
    namespace: str | None,
    seconds: float | None,
    most: int | None,
    title: str | None = None,
) -> None:
    """Record until Ctrl-C or SIGTERM; with a title, write the page."""
    from celery_mem.profiling.recorder import LiveRecording
    from celery_mem.profiling.recording import MOST_TASKS
    from celery_mem.state.store import Store

    _check_place(file)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = load_settings(url, namespace)
    recording = LiveRecording(
        lambda: Store.connect(settings), settings.namespace, None, most=most or MOST_TASKS
    )
    with suppress(KeyboardInterrupt), recording:
        click.echo(
            f"records what runs in namespace {settings.namespace} "
            + (f"for {seconds:g} s" if seconds else "until Ctrl-C")
        )
        threading.Event().wait(seconds)
    if title is None:
        recording.save(file)
    else:
        recording.report(file, title=title)
    dropped = f", and {recording.dropped:,} more that were dropped" if recording.dropped else ""
    click.echo(f"wrote {file}: {len(recording):,} tasks{dropped}")


@mem.command()
@click.argument("file", type=click.Path(dir_okay=False), required=False)
def keygen(file: str | None) -> None:
    """Make a key for mem_secret_key: print it, or put it ahead of those in FILE, which is made if need be.

    To change keys: add the new one after the old one everywhere, then put it first everywhere, then take the
    old one away.
    """
    import os
    import secrets

    key = secrets.token_hex(32)
    if file is None:
        click.echo(key)
        return
    before = ""
    if os.path.exists(file):
        with open(file, encoding="utf-8") as old:
            before = old.read()
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as new:
        new.write(f"{key}\n{before}")
    click.echo(f"wrote a key to {file}; use it by mem_secret_key = 'file:{os.path.abspath(file)}'")


@mem.command(context_settings={"ignore_unknown_options": True})
@where
@click.argument("flower_options", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def flower(
    ctx: click.Context, url: str | None, namespace: str | None, flower_options: tuple[str, ...]
) -> None:
    """Run Flower, with all of its own options, and a Memory page."""
    app = celery_app()
    try:
        from flower.command import flower as plain_flower
    except ImportError as error:
        raise click.ClickException("Flower is not installed: pip install 'celery-mem[flower]'") from error
    from celery.bin.base import CLIContext

    from celery_mem.monitor.flower import install_pages

    install_pages(look_at(url, namespace))
    if app is None:
        from celery import Celery

        from celery_mem.graph.tickets import broker_url

        app = Celery("celery_mem", broker=broker_url(load_settings(url, namespace).url))
        # It sends commands to workers now and then; connections for that are not kept.
        app.conf.broker_pool_limit = None
        ctx.obj = CLIContext(app=app, no_color=True, workdir=None, quiet=False)
    ctx.invoke(plain_flower, tornado_argv=flower_options)


def lasting_violations(store: Store, patience: int, pause: float = 0.3) -> list[Violation]:
    """Audit until a reading finds nothing, at most `patience` times; returns what all of them found."""
    from celery_mem.memory.audit_files import audit_files
    from celery_mem.state.audit import audit

    def look() -> list[Violation]:
        return [*audit(store), *audit_files(store)]

    lasting = look()
    for _ in range(patience - 1):
        if not lasting:
            break
        threading.Event().wait(pause)
        before = {(v.rule, v.key) for v in lasting}
        lasting = [v for v in look() if (v.rule, v.key) in before]
    return lasting


# --- output -------------------------------------------------------------------------------------------------


def _announce(cluster: LocalCluster, for_programs: bool) -> None:
    if for_programs:
        news = {"url": cluster.url, "namespace": cluster.namespace, "pids": cluster.pids()}
        click.echo(json.dumps(news))
        return
    click.echo(f"{cluster!r}\nUse it from another terminal:\n\n  export CELERY_MEM_URL={cluster.url}")
    if cluster.namespace != "mem":
        click.echo(f"  export CELERY_MEM_NAMESPACE={cluster.namespace}")
    click.echo("  celery-mem status\n\nCtrl-C stops it.")


def _watch(read: Callable[[], dict[str, Any]], interval: float, for_programs: bool) -> None:
    pause = threading.Event()
    with suppress(KeyboardInterrupt):
        if for_programs:
            while True:
                click.echo(json.dumps(read()))
                pause.wait(interval)

        from rich.live import Live

        from celery_mem.cli_tables import status_tables

        with Live(status_tables(read()), auto_refresh=False) as live:
            while True:
                pause.wait(interval)
                live.update(status_tables(read()), refresh=True)


def _dump(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def main() -> None:
    """Entry point of `celery-mem`."""
    mem(prog_name="celery-mem")


if __name__ == "__main__":
    main()
