"""The command line of scripts/bench."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from . import front as front_module
from . import inodes as inodes_module
from . import report as report_module
from . import scaling as scaling_module
from . import waiting as waiting_module
from .bench import bench
from .contenders import NAMES, NATIVE, PATHS, REFERENCE, gather
from .machine import Machine, this_machine
from .measure import Meter
from .placement import BANDWIDTH, REQUESTS
from .progress import Progress
from .site import Failed
from .sizes import FULL, QUICK
from .tools import BUILD, TOP, Installer, Unavailable, compile_load
from .workloads import ALL

# The contenders in --quick. Two minutes are not enough for all of them.
_QUICK = (NATIVE, *PATHS, REFERENCE, "bindfs", "go-fuse")
# Two minutes, less the time for the last workload, for unmounting, for the tables and for the plot.
_QUICK_SECONDS = 90.0
_STARTED = time.monotonic()


def _names(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    if value is None:
        return None
    names = value.split(",")
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}; there are {', '.join(NAMES)}")
    return names


def _pattern(_context: click.Context, _parameter: click.Parameter, value: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(value) if value else None
    except re.error as error:
        raise click.BadParameter(str(error)) from None


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """The options of all commands."""
    for option in reversed(
        [
            click.option("--quick", is_flag=True, help="Small amounts and few rounds: a rough picture, soon."),
            click.option("--rounds", type=click.IntRange(1), help="How often all is measured; medians are shown."),
            click.option("--contenders", "names", metavar="NAME,...", callback=_names, help=f"Of {', '.join(NAMES)}."),
            click.option("--only", metavar="REGEX", callback=_pattern, help="Only what matches: see --list."),
            click.option("--list", "list_only", is_flag=True, help="List what is measured, and end."),
            click.option(
                "--output",
                type=click.Path(file_okay=False, path_type=Path),
                help="Directory for the results. Default: a new one in build/bench.",
            ),
            click.option(
                "--base",
                type=click.Path(exists=True, file_okay=False, path_type=Path),
                default="/dev/shm",
                show_default=True,
                help="Where the source is made: a file system in memory, so that no disk is measured.",
            ),
            click.option("--no-install", is_flag=True, help="Skip what is missing instead of installing it."),
        ]
    ):
        command = option(command)
    return command


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@_common
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Measure llloop, its peers and the native directory under the same load, in one run.

    Writes tables (text and Markdown), all numbers (JSON) and a plot (PNG). Needs root. Installs missing
    Debian packages and compiles some peers. With --quick a run ends within two minutes, without the time for
    installing and compiling.
    """
    if context.invoked_subcommand is None:
        _compare(**options)


def _compare(
    quick: bool,
    rounds: int | None,
    names: list[str] | None,
    only: re.Pattern[str] | None,
    list_only: bool,
    output: Path | None,
    base: Path,
    no_install: bool,
) -> None:
    workloads = [workload for workload in ALL if only is None or only.search(f"{workload.kind}/{workload.name}")]
    if list_only:
        click.echo("\n".join(f"{w.kind + '/' + w.name:28} {w.title}" for w in workloads))
        return
    if not workloads:
        raise click.UsageError("--only leaves nothing to measure; see --list")
    progress, installer = Progress(), Installer(allowed=not no_install)
    load = _prepare(installer)
    field = gather(names or (_QUICK if quick else NAMES), installer, progress.say)
    prepared = time.monotonic()
    kinds = sorted({workload.kind for workload in workloads})
    with bench(field.contenders, kinds, QUICK if quick else FULL, base, progress.say) as made:
        _say_skipped(progress, field.skipped | made.skipped)
        deadline = prepared + _QUICK_SECONDS if quick and not rounds else None
        results = Meter(made, load, progress).rounds(workloads, rounds or (3 if quick else 5), deadline)
        skipped = field.skipped | made.skipped
    measured = {name for samples in results.samples.values() for name in samples}
    report = report_module.Report(
        machine=this_machine(),
        workloads=[workload for workload in workloads if workload.name in results.samples],
        contenders=[contender for contender in field.contenders if contender.name in measured],
        results=results,
        source=_file_system(base),
        skipped=skipped,
    )
    if not measured:
        raise click.ClickException("nothing could be measured")
    from . import plot

    folder = _folder(output, "results")
    text = report_module.render(report, markdown=False)
    (folder / "results.txt").write_text(text)
    (folder / "results.md").write_text(report_module.render(report, markdown=True))
    (folder / "results.json").write_text(json.dumps(report_module.as_json(report), indent=1))
    plot.draw(report, folder / "results.png")
    click.echo(text)
    click.echo(f"written: {folder}/results.txt, .md, .json and .png")


@main.command()
@_common
@click.option("--syscalls", is_flag=True, help="Also count llloop's system calls for one operation (strace).")
@click.option("--profile", is_flag=True, help="Also sample where the front is (py-spy, which is installed from PyPI).")
def front(
    quick: bool,
    rounds: int | None,
    names: list[str] | None,
    only: re.Pattern[str] | None,
    list_only: bool,
    output: Path | None,
    base: Path,
    no_install: bool,
    syscalls: bool,
    profile: bool,
) -> None:
    """Measure the cost of each kind of request in microseconds, with load and server on one CPU."""
    progress, installer = Progress(), Installer(allowed=not no_install)
    load = _prepare(installer)
    operations = [name for name in front_module.operations(load) if only is None or only.search(name)]
    if list_only:
        click.echo("\n".join(f"{name:16} {front_module.REQUESTS_OF[name]}" for name in operations))
        return
    if not operations:
        raise click.UsageError("--only leaves nothing to measure; see --list")
    if syscalls:
        _need(installer, "strace")
    if profile:
        _need_py_spy(no_install)
    field = gather(names or [NATIVE, "llloop", REFERENCE], installer, progress.say)
    with bench(field.contenders, [REQUESTS], QUICK, base, progress.say) as made:
        _say_skipped(progress, field.skipped | made.skipped)
        meter = front_module.Front(made, load, progress, seconds=0.1 if quick else 0.5, names=600 if quick else 4000)
        costs = meter.rounds(operations, rounds or (1 if quick else 5))
        details = front_module.details(meter, operations, syscalls, profile, progress)
    taking_part = [contender.name for contender in field.contenders if contender.name not in made.skipped]
    machine = this_machine()
    text = f"{_head(machine)}\n\n{front_module.table(costs, taking_part)}{front_module.detail_tables(details)}"
    folder = _folder(output, "front")
    (folder / "front.txt").write_text(text)
    (folder / "front.json").write_text(
        json.dumps(
            {
                "machine": asdict(machine),
                "costs": {
                    operation: {name: [asdict(cost) for cost in samples] for name, samples in by_name.items()}
                    for operation, by_name in costs.items()
                },
                "details": {name: {o: asdict(d) for o, d in found.items()} for name, found in details.items()},
            },
            indent=1,
        )
    )
    click.echo(text)
    click.echo(f"written: {folder}/front.txt and .json")


@main.command()
@_common
@click.option("--path", default=PATHS[0], type=click.Choice(PATHS), help="llloop's data path.", show_default=True)
def scaling(
    quick: bool,
    rounds: int | None,
    names: list[str] | None,
    only: re.Pattern[str] | None,
    list_only: bool,
    output: Path | None,
    base: Path,
    no_install: bool,
    path: str,
) -> None:
    """Measure the throughput with 1, 2, 4 and 8 workers and clients.

    --contenders names the peers to compare with; the default is native and passthrough_ll.
    """
    workloads = [workload for workload in scaling_module.workloads() if only is None or only.search(workload.name)]
    if list_only:
        click.echo("\n".join(f"{workload.name:12} {workload.title}" for workload in workloads))
        return
    if not workloads:
        raise click.UsageError("--only leaves nothing to measure; see --list")
    progress, installer = Progress(), Installer(allowed=not no_install)
    load = _prepare(installer)
    field = gather(names or [NATIVE, REFERENCE], installer, progress.say)
    try:
        contenders = scaling_module.contenders(path, field.contenders)
    except Unavailable as reason:
        raise click.ClickException(str(reason)) from None
    with bench(contenders, [BANDWIDTH], QUICK if quick else FULL, base, progress.say) as made:
        _say_skipped(progress, field.skipped | made.skipped)
        results = Meter(made, load, progress).rounds(workloads, rounds or (1 if quick else 5))
    if not results.samples:
        raise click.ClickException("nothing could be measured")
    shown = [contender.name for contender in contenders if contender.name not in made.skipped]
    machine = this_machine()
    text = f"{_head(machine)}\n\n{path}, by number of workers\n\n{scaling_module.table(results, shown)}"
    folder = _folder(output, "scaling")
    (folder / "scaling.txt").write_text(text)
    samples = {w: {n: [asdict(s) for s in found] for n, found in by.items()} for w, by in results.samples.items()}
    (folder / "scaling.json").write_text(
        json.dumps({"machine": asdict(machine), "failures": results.failures, "samples": samples}, indent=1)
    )
    scaling_module.draw(results, shown, machine, folder / "scaling.png")
    click.echo(text)
    click.echo(f"written: {folder}/scaling.txt, .json and .png")


@main.command()
@_common
@click.option("--files", type=click.IntRange(inodes_module.PER_DIRECTORY), help="How many. Default: a million.")
def inodes(
    quick: bool,
    rounds: int | None,
    names: list[str] | None,
    only: re.Pattern[str] | None,
    list_only: bool,
    output: Path | None,
    base: Path,
    no_install: bool,
    files: int | None,
) -> None:
    """Measure the memory of a server for each inode that the kernel knows.

    Without --contenders, this measures the default data path of llloop. --rounds and --only have no effect.
    """
    if list_only:
        click.echo("inodes           bytes of memory for each inode that the kernel knows")
        return
    progress, installer = Progress(), Installer(allowed=not no_install)
    load = _prepare(installer)
    field = gather([name for name in names or [PATHS[0]] if name != NATIVE], installer, progress.say)
    found: dict[str, inodes_module.Memory] = {}
    with bench(field.contenders, [REQUESTS], QUICK, base, progress.say) as made:
        count = files or (50_000 if quick else 1_000_000)
        directories = inodes_module.make(made.source / "inodes", count, progress)
        for name, server in made.servers[REQUESTS].items():
            progress.say(f"{name}: {count:,} files are looked up")
            try:
                found[name] = inodes_module.measure(server, load, directories)
            except Failed as reason:
                progress.say(f"{name}: {reason}")
        _say_skipped(progress, field.skipped | made.skipped)
    if not found:
        raise click.ClickException("nothing could be measured")
    machine = this_machine()
    text = f"{_head(machine)}\n\n{inodes_module.table(found)}\n"
    folder = _folder(output, "inodes")
    (folder / "inodes.txt").write_text(text)
    results = {name: {**asdict(memory), "each": memory.each} for name, memory in found.items()}
    (folder / "inodes.json").write_text(json.dumps({"machine": asdict(machine), "memory": results}, indent=1))
    click.echo(text)
    click.echo(f"written: {folder}/inodes.txt and .json")


@main.command()
@click.option("--quick", is_flag=True, help="Smaller loads.")
@click.option("--only", metavar="REGEX", callback=_pattern, help="Only loads that match: see --list.")
@click.option("--list", "list_only", is_flag=True, help="List the loads, and end.")
@click.option("--native", is_flag=True, help="Measure the source itself, without a server.")
@click.option("--llloop", default=str(TOP / ".venv/bin/llloop"), show_default=True, help="The command to serve with.")
@click.option("--serve-option", "serve_options", multiple=True, help="An option for llloop serve; may be repeated.")
@click.option(
    "--base",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default="/dev/shm",
    show_default=True,
    help="The directory for the image of the source, an ext4 file system.",
)
@click.option("--no-install", is_flag=True, help="Install nothing.")
def waiting(
    quick: bool,
    only: re.Pattern[str] | None,
    list_only: bool,
    native: bool,
    llloop: str,
    serve_options: tuple[str, ...],
    base: Path,
    no_install: bool,
) -> None:
    """Measure for how many milliseconds the calls of one user wait during the load of another."""
    loads = {name: load for name, load in waiting_module.LOADS.items() if only is None or only.search(name)}
    if list_only:
        click.echo("\n".join(f"{name:14} {load.title}" for name, load in loads.items()))
        return
    if os.geteuid():
        raise click.ClickException("this needs root: to mount the source and to freeze it")
    sizes = waiting_module.QUICK if quick else waiting_module.FULL
    try:
        installer = Installer(allowed=not no_install)
        command = None if native else [llloop, *serve_options]
        found = waiting_module.compare(list(loads), command, sizes, base, installer)
    except Unavailable as reason:
        raise click.ClickException(str(reason)) from None
    click.echo(f"{_head(this_machine())}\n\n{waiting_module.table(found)}")


def _prepare(installer: Installer) -> Path:
    """Check that the requirements of all runs are met, and return the path of the load generator."""
    if os.geteuid():
        raise click.ClickException("this needs root: to make caches cold, to use kernel passthrough, and to install")
    try:
        installer.need("fio", "git", "tar")
        return compile_load(installer)
    except Unavailable as reason:
        raise click.ClickException(str(reason)) from None


def _say_skipped(progress: Progress, skipped: dict[str, str]) -> None:
    for name, reason in skipped.items():
        progress.say(f"skipped: {name}: {reason}")


def _need(installer: Installer, package: str) -> None:
    try:
        installer.need(package)
    except Unavailable as reason:
        raise click.ClickException(str(reason)) from None


def _need_py_spy(no_install: bool) -> None:
    if not front_module.PY_SPY.exists():
        if no_install:
            raise click.ClickException("py-spy is not installed (--no-install)")
        try:
            front_module.install_py_spy()
        except Unavailable as reason:
            raise click.ClickException(str(reason)) from None


def _head(machine: Machine) -> str:
    return f"{machine.date}, {machine.kernel}, {machine.cpus} CPUs: {machine.cpu}, Python {machine.python}"


def _folder(output: Path | None, kind: str) -> Path:
    folder = output or BUILD / time.strftime(f"{kind}-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _file_system(base: Path) -> str:
    """Return the type of the file system of a directory."""
    found = ("", "")
    with open("/proc/self/mounts") as mounts:
        for line in mounts:
            _, mountpoint, kind, *_ = line.split()
            if base.resolve().is_relative_to(mountpoint) and len(mountpoint) >= len(found[0]):
                found = (mountpoint, kind)
    return found[1]


def _interrupted(number: int, _frame: object) -> None:
    # Ignore further signals: the first one ends the servers and unmounts, and a second one must not interrupt that.
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    try:
        main(arguments, prog_name="scripts/bench", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("\nstopped; everything is unmounted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
