"""The command `llloop stats`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from llloop.cli.common import UntouchedPath, report_errors
from llloop.control import client, discovery
from llloop.errors import HostError, LlloopError, MountpointError, UsageError
from llloop.linux import mounts

_MIN_INTERVAL = 0.1  # the shortest interval of --watch in seconds
_T = TypeVar("_T")

_EXIT_CODES = """\b
Exit codes:
  0  the figures were shown; without MOUNTPOINT, also if a mount is dead
  1  the server of the mount is gone, does not answer, or belongs to another user
  2  an option is invalid
  4  MOUNTPOINT is not an llloop mount
  5  the file for --textfile cannot be written
"""


@click.command(epilog=_EXIT_CODES)
@click.argument("mountpoint", type=UntouchedPath(), required=False)
@click.option(
    "--watch",
    type=float,
    is_flag=False,
    flag_value=1.0,
    default=None,
    metavar="[SECONDS]",
    help="Until Ctrl-C, show what happened in each interval. --watch without a number means 1 second. "
    "Default: show once what has happened since the mount began.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch one line for each interval.")
@click.option("--prometheus", is_flag=True, help="Print the counters in the text format of Prometheus.")
@click.option(
    "--textfile",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the counters in this format to FILE, for the textfile collector of node_exporter. That collector reads "
    "only files whose names end in .prom. llloop replaces FILE atomically; with --watch, once in each interval.",
)
@report_errors
def stats(mountpoint: str | None, watch: float | None, as_json: bool, prometheus: bool, textfile: Path | None) -> None:
    """Show rates and latencies of requests, by operation and by process.

    Without MOUNTPOINT, show all llloop mounts that this user may see.
    """
    if as_json + prometheus + (textfile is not None) > 1:
        raise UsageError("--json, --prometheus and --textfile exclude each other")
    if prometheus and watch is not None:
        raise UsageError("--prometheus and --watch exclude each other; --textfile can be used with --watch")
    if watch is not None and not _MIN_INTERVAL <= watch <= 86400:
        raise UsageError(f"--watch must be a number of seconds from {_MIN_INTERVAL:g} to 86400, not {watch:g}")
    try:
        if as_json:
            _print_json(_rates(mountpoint, watch), lines=watch is not None, single_mount=mountpoint is not None)
        elif prometheus or textfile is not None:
            _export(mountpoint, watch, textfile)
        else:
            _show(_rates(mountpoint, watch))
    except KeyboardInterrupt:
        pass


def _repeat(read_counters: Callable[[], _T], watch: float | None) -> Iterator[_T]:
    """Yield the result of *read_counters*, once or every *watch* seconds."""
    while True:
        yield read_counters()
        if watch is None:
            return
        time.sleep(watch)


def _stats(mountpoint: str | None) -> list[dict[str, Any]]:
    """Return the counters of all mounts, or of the one at *mountpoint*.

    Raises:
        LlloopError: *mountpoint* is not an llloop mount, or its server does not answer.
    """
    return discovery.all_stats() if mountpoint is None else [client.ask_mount(mountpoint, "stats")]


def _rates(mountpoint: str | None, watch: float | None) -> Iterator[list[dict[str, Any]]]:
    """Yield the mounts' rates and latencies since the start of each mount, or for each interval of *watch* seconds."""
    from llloop.cli.rates import rates_since

    before: dict[str, dict[str, Any]] | None = None
    for answers in _repeat(lambda: _stats(mountpoint), watch):
        if watch is None or before is not None:
            then = before or {}
            yield [rates_since(one, then.get(one["mountpoint"])) if "operations" in one else one for one in answers]
        before = {one["mountpoint"]: one for one in answers if "operations" in one}


def _print_json(rates: Iterator[list[dict[str, Any]]], lines: bool, single_mount: bool) -> None:
    for answers in rates:
        click.echo(json.dumps(answers[0] if single_mount else answers, indent=None if lines else 2))


def _export(mountpoint: str | None, watch: float | None, textfile: Path | None) -> None:
    """Print the counters in Prometheus's text format, or write them to *textfile*. A mount that is gone counts as down.

    Raises:
        LlloopError: the mount at *mountpoint* does not answer (after that has been printed or written), or *textfile*
            cannot be written.
    """
    from llloop.cli import prometheus

    for answers, error in _repeat(lambda: _exported_stats(mountpoint), watch):
        if textfile is None:
            click.echo(prometheus.text(answers), nl=False)
        else:
            try:
                prometheus.write(answers, textfile)
            except OSError as problem:
                raise HostError(f"{textfile}: {problem.strerror}") from None
        if error is not None and watch is None:
            raise error


def _exported_stats(mountpoint: str | None) -> tuple[list[dict[str, Any]], LlloopError | None]:
    if mountpoint is None:
        return discovery.all_stats(), None
    try:
        found = discovery.stats_of(mountpoint)
    except MountpointError as error:
        return [{"mountpoint": mounts.resolve_mountpoint(mountpoint), "state": "not mounted"}], error
    reason = found.get("reason")
    return [found], None if reason is None else LlloopError(f"{mountpoint}: {reason}")


def _show(rates: Iterator[list[dict[str, Any]]]) -> None:
    from llloop.cli import tables

    console = tables.console()
    if not console.is_terminal:
        for mounts in rates:
            console.print(tables.stats_view(mounts))
        return
    from rich.live import Live

    first = next(rates)
    with Live(tables.stats_view(first), console=console, auto_refresh=False) as live:
        for mounts in rates:
            live.update(tables.stats_view(mounts), refresh=True)
