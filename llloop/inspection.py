"""The commands that look into running mounts: `llloop status` and `llloop stats`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from . import client, log, survey
from .errors import HostError, UsageError
from .explained import UntouchedPath, explained

_LEAST = 0.1  # seconds between two looks

_STATUS_CODES = """\b
Exit codes:
  0  every mount shown is served
  1  one is dead, does not answer, or does not talk to this user
  4  MOUNTPOINT is not an llloop mount
"""
_CONTROL_CODES = """\b
Exit codes:
  0  it has been told, and does it
  1  the mount's server is gone, does not answer, or is another user's
  2  an argument makes no sense
  4  MOUNTPOINT is not an llloop mount
"""
_STATS_CODES = """\b
Exit codes:
  0  shown, or ended by Ctrl-C
  1  the mount's server is gone, does not answer, or is another user's
  2  an option makes no sense
  4  MOUNTPOINT is not an llloop mount
  5  the file for --textfile cannot be written
"""


@click.command(epilog=_STATUS_CODES)
@click.argument("mountpoint", type=UntouchedPath(), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead: a list, also of one mount.")
@explained
def status(mountpoint: str | None, as_json: bool) -> None:
    """Show the llloop mounts on this machine, or the one at MOUNTPOINT.

    Of each: its source, options, processes and features, how long it has been up, and whether it answers. Also shown
    are mounts whose server is gone. Ordinary users see their own in full, and that others exist.
    """
    mounts = [survey.survey_one(mountpoint)] if mountpoint else survey.survey()
    if as_json:
        click.echo(json.dumps(mounts, indent=2))
    else:
        # Only here: it takes longer to load than all the rest, and serve does not need it.
        from . import display

        display.console().print(display.status_view(mounts))
    if any(one["state"] in ("dead", "not answering", "unknown") for one in mounts):
        sys.exit(1)


@click.command(epilog=_STATS_CODES)
@click.argument("mountpoint", type=UntouchedPath())
@click.option(
    "--watch",
    type=float,
    is_flag=False,
    flag_value=1.0,
    default=None,
    metavar="[SECONDS]",
    help="Go on until Ctrl-C, and show what happened in each interval. Default: 1 second if no number is given; "
    "without --watch, the figures since the mount began.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead; with --watch a line for each interval.")
@click.option("--prometheus", is_flag=True, help="Print the counters in Prometheus's text format instead.")
@click.option(
    "--textfile",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write that format to FILE, replaced as a whole, for node_exporter's textfile collector; its name must end "
    "in .prom there. With --watch, again and again.",
)
@explained
def stats(mountpoint: str, watch: float | None, as_json: bool, prometheus: bool, textfile: Path | None) -> None:
    """Show what the llloop mount at MOUNTPOINT does: rates, latencies, and who does how much."""
    if as_json + prometheus + (textfile is not None) > 1:
        raise UsageError("--json, --prometheus and --textfile exclude each other")
    if prometheus and watch is not None:
        raise UsageError("--prometheus and --watch exclude each other; a loop can write a file: --textfile")
    if watch is not None and not _LEAST <= watch <= 86400:
        raise UsageError(f"--watch must be a number of seconds from {_LEAST:g} to 86400, not {watch:g}")
    try:
        if as_json:
            _print_json(_figures(mountpoint, watch), lines=watch is not None)
        elif prometheus:
            from . import exposition

            click.echo(exposition.text(client.ask_mount(mountpoint, "stats")), nl=False)
        elif textfile is not None:
            _write_textfile(_answers(mountpoint, watch), textfile)
        else:
            _show(_figures(mountpoint, watch))
    except KeyboardInterrupt:
        pass


@click.command("control", epilog=_CONTROL_CODES)
@click.argument("mountpoint", type=UntouchedPath())
@click.argument("command", type=click.Choice(["reload", "stop", "log-level"]))
@click.argument("level", type=click.Choice(log.LEVELS), required=False)
@explained
def control(mountpoint: str, command: str, level: str | None) -> None:
    """Have the llloop mount at MOUNTPOINT do something.

    \b
    reload           open the log file again and replace the workers one by one
    stop             unmount and end, as SIGTERM does; does not wait for it
    log-level LEVEL  log messages of LEVEL and above from now on, in all processes
    """
    if (command == "log-level") != (level is not None):
        raise UsageError("log-level takes a level, e.g. debug" if level is None else f"{command} takes no argument")
    client.ask_mount(mountpoint, command, **({"level": level} if level else {}))


def _answers(mountpoint: str, watch: float | None) -> Iterator[dict[str, Any]]:
    """Yield what the mount answers, once or again and again."""
    while True:
        yield client.ask_mount(mountpoint, "stats")
        if watch is None:
            return
        time.sleep(watch)


def _figures(mountpoint: str, watch: float | None) -> Iterator[dict[str, Any]]:
    """Yield the figures since the mount began, or of one interval after the other."""
    from .figures import since

    before = None
    for now in _answers(mountpoint, watch):
        if watch is None or before is not None:
            yield since(now, before)
        before = now


def _print_json(figures: Iterator[dict[str, Any]], lines: bool) -> None:
    for one in figures:
        click.echo(json.dumps(one, indent=None if lines else 2))


def _write_textfile(answers: Iterator[dict[str, Any]], file: Path) -> None:
    from . import exposition

    for one in answers:
        try:
            exposition.write(one, file)
        except OSError as error:
            raise HostError(f"{file}: {error.strerror}") from None


def _show(figures: Iterator[dict[str, Any]]) -> None:
    from . import display

    console = display.console()
    if not console.is_terminal:
        for one in figures:
            console.print(display.stats_view(one))
        return
    from rich.live import Live

    first = next(figures)
    with Live(display.stats_view(first), console=console, auto_refresh=False) as live:
        for one in figures:
            live.update(display.stats_view(one), refresh=True)
