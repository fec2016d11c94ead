"""The command line of scripts/bench."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from . import contenders as contenders_module
from . import report as report_module
from .bench import bench
from .contenders import NAMES
from .machine import this_machine
from .measure import Meter
from .progress import Progress
from .sizes import FULL, QUICK
from .tools import BUILD, Installer, Unavailable, compile_load
from .workloads import ALL

# What --quick takes part in: two minutes are not enough for all.
_QUICK = (
    contenders_module.NATIVE,
    "llloop",
    "llloop-writeback",
    "llloop-kernel",
    "passthrough_ll",
    "bindfs",
    "go-fuse",
)
_QUICK_SECONDS = 100.0


def _names(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    if value is None:
        return None
    names = value.split(",")
    unknown = set(names) - set(NAMES)
    if unknown:
        raise click.BadParameter(f"{', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    return names


def _pattern(_context: click.Context, _parameter: click.Parameter, value: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(value) if value else None
    except re.error as error:
        raise click.BadParameter(str(error)) from None


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Small amounts and fewer contenders: a rough picture within two minutes.")
@click.option("--only", metavar="REGEX", callback=_pattern, help="Only workloads whose class/name matches.")
@click.option("--contenders", "names", metavar="NAME,...", callback=_names, help=f"Of {', '.join(NAMES)}.")
@click.option("--rounds", type=click.IntRange(1), help="Default: 5; with --quick as many as there is time for.")
@click.option("--output", type=click.Path(path_type=Path), help="Directory for the results. Default: in build/bench.")
@click.option(
    "--base",
    type=click.Path(exists=True, path_type=Path),
    default="/dev/shm",
    show_default=True,
    help="Where the source is made: a file system in memory, so that no disk is measured.",
)
@click.option("--no-install", is_flag=True, help="Skip what is missing instead of installing it.")
@click.option("--list", "list_only", is_flag=True, help="List the workloads and end.")
@click.pass_context
def main(
    context: click.Context,
    quick: bool,
    only: re.Pattern[str] | None,
    names: list[str] | None,
    rounds: int | None,
    output: Path | None,
    base: Path,
    no_install: bool,
    list_only: bool,
) -> None:
    """Measure llloop, its peers and the native directory under the same load, in one run.

    Writes tables (text and Markdown), all numbers (JSON) and a plot (PNG). Needs root. Missing Debian packages are
    installed; peers that come as source are compiled.
    """
    if context.invoked_subcommand:
        return
    if list_only:
        for workload in ALL:
            click.echo(f"{workload.kind}/{workload.name:18} {workload.title}")
        return
    workloads = [w for w in ALL if only is None or only.search(f"{w.kind}/{w.name}")]
    if not workloads:
        raise click.UsageError("--only leaves no workload; see --list")
    progress = Progress()
    installer = Installer(allowed=not no_install)
    load = prepare(installer)
    chosen = names or list(_QUICK if quick else NAMES)
    found = contenders_module.gather(chosen, installer, progress.say)
    with bench(found.contenders, QUICK if quick else FULL, base, progress.say) as made:
        for name, reason in (found.skipped | made.skipped).items():
            progress.say(f"skipped: {name}: {reason}")
        meter = Meter(made, load, progress)
        results = meter.rounds(
            workloads, rounds or (3 if quick else 5), _QUICK_SECONDS if quick and not rounds else None
        )
        taking_part = [c for c in found.contenders if c.name not in made.skipped]
        report = report_module.Report(
            this_machine(), workloads, taking_part, results, _file_system(base), found.skipped | made.skipped
        )
    write(report, output or BUILD / time.strftime("results-%Y%m%d-%H%M%S"))


def prepare(installer: Installer) -> Path:
    """Make sure of what every run needs, and return the load generator."""
    if os.geteuid():
        raise click.ClickException(
            "this needs root: to pin and to drop caches, and because peers are run as root runs them"
        )
    try:
        installer.need("fio", "git", "tar")
        return compile_load(installer)
    except Unavailable as reason:
        raise click.ClickException(str(reason)) from None


def write(report: report_module.Report, output: Path) -> None:
    """Write a report in all its forms, and print it."""
    from . import plot

    output.mkdir(parents=True, exist_ok=True)
    text = report_module.render(report, markdown=False)
    (output / "results.txt").write_text(text)
    (output / "results.md").write_text(report_module.render(report, markdown=True))
    (output / "results.json").write_text(json.dumps(report_module.as_json(report), indent=1))
    plot.draw(report, output / "results.png")
    click.echo(text)
    click.echo(f"written: {output}/results.txt, .md, .json and .png")


def _file_system(base: Path) -> str:
    longest = ("", "")
    with open("/proc/self/mounts") as mounts:
        for line in mounts:
            _, mountpoint, kind, *_ = line.split()
            if base.resolve().is_relative_to(mountpoint) and len(mountpoint) >= len(longest[0]):
                longest = (mountpoint, kind)
    return longest[1]


def _interrupted(number: int, _frame: object) -> None:
    # As Ctrl-C: what was started is ended and unmounted on the way out.
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    try:
        main(arguments, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("\nstopped: everything is unmounted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
