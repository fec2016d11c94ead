"""The throughput for different numbers of workers and clients."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .contenders import NATIVE, REFERENCE, Contender, llloop
from .machine import Machine
from .measure import Results
from .placement import BANDWIDTH
from .report import Table, number
from .site import Site
from .workloads import Workload

COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Load:
    """A load that any number of clients can make at once.

    Attributes:
        name: its name in tables.
        title: what the clients do.
        unit: the unit of the throughput.
        scale: the throughput in operations or bytes per second is divided by this.
        run: runs it with a number of clients.
    """

    name: str
    title: str
    unit: str
    scale: float
    run: Callable[..., None]


def _files(site: Site, clients: int) -> list[str]:
    size = site.sizes.data // max(COUNTS)
    return [f"directory={site.scratch}", "filename_format=data$jobnum", f"size={size}", f"numjobs={clients}"]


def _read(site: Site, clients: int) -> None:
    files = _files(site, clients)
    site.fio(*files, "rw=write", "bs=1m", timed=False)
    for _ in range(site.sizes.repeats):
        site.drop()
        site.fio(*files, "rw=read", "bs=128k")


def _write(site: Site, clients: int) -> None:
    site.fio(*_files(site, clients), "rw=write", "bs=128k", "end_fsync=1")


def _direct(site: Site, clients: int) -> None:
    files = _files(site, clients)
    site.fio(*files, "rw=write", "bs=1m", timed=False)
    options = ["rw=randread", "bs=4k", "direct=1", "time_based=1", f"runtime={site.sizes.duration * 1000:.0f}ms"]
    site.fio(*files, *options, work="operations")


def _walk(site: Site, clients: int) -> None:
    for _ in range(site.sizes.repeats):
        site.drop()
        site.load("walk", 0, clients, site.root / "tree", site.sizes.directories)


LOADS = (
    Load("read", "sequential read, 128 KiB, nothing cached, a file each", "MB/s", 1e6, _read),
    Load("write", "a new file written each, 128 KiB", "MB/s", 1e6, _write),
    Load("direct-4k", "random read, 4 KiB, O_DIRECT, a file each", "op/s", 1, _direct),
    Load("stat", "a tree walked, nothing cached, a share each", "op/s", 1, _walk),
)


def contenders(path: str, others: Sequence[Contender]) -> list[Contender]:
    """Return llloop with one data path and each number of workers, and the peers."""
    return [*(llloop(f"workers-{count}", path, ["--workers", str(count)]) for count in COUNTS), *others]


def workloads() -> list[Workload]:
    """Return each load with each number of clients as a workload."""
    return [
        Workload(
            f"{load.name}-{clients}",
            BANDWIDTH,
            load.title,
            load.unit,
            load.scale,
            partial(load.run, clients=clients),
        )
        for load in LOADS
        for clients in COUNTS
    ]


def rate(results: Results, load: Load, clients: int, name: str) -> float | None:
    """Return the median throughput in the load's unit."""
    samples = results.samples.get(f"{load.name}-{clients}", {}).get(name)
    return statistics.median(sample.rate for sample in samples) / load.scale if samples else None


def _measured(results: Results) -> list[Load]:
    # Some may be missing because of --only.
    return [load for load in LOADS if any(f"{load.name}-{clients}" in results.samples for clients in COUNTS)]


def table(results: Results, names: Sequence[str]) -> str:
    """Return a table for each load, contenders down and clients across."""
    parts = []
    for load in _measured(results):
        lines = Table([load.unit, *(f"{clients} client{'s' * (clients > 1)}" for clients in COUNTS)])
        for name in names:
            lines.rows.append([name, *(number(rate(results, load, clients, name)) for clients in COUNTS)])
        parts += [f"{load.name}: {load.title}", lines.text()]
    return "\n\n".join(parts) + "\n"


def draw(results: Results, names: Sequence[str], machine: Machine, path: Path) -> None:
    """Draw a panel for each load: a line for each contender over the number of clients."""
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    loads = _measured(results)
    rows = (len(loads) + 1) // 2
    figure, panels = pyplot.subplots(rows, 2, figsize=(13, 4.5 * rows), squeeze=False)
    shades = ("#f4a582", "#e0674c", "#c1121f", "#6a040f")
    styles = {NATIVE: ("#222222", "--"), REFERENCE: ("#4a6fa5", "--")}
    for panel in panels.flat[len(loads) :]:
        panel.set_visible(False)
    for panel, load in zip(panels.flat, loads, strict=False):
        for place, name in enumerate(names):
            colour, style = styles.get(name, (shades[place % len(shades)], "-"))
            points = [(c, value) for c in COUNTS if (value := rate(results, load, c, name))]
            panel.plot([c for c, _ in points], [v for _, v in points], style, color=colour, marker="o", label=name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(COUNTS, [str(count) for count in COUNTS])
        panel.set_xlabel("clients")
        panel.set_ylabel(load.unit)
        panel.set_title(f"{load.name}: {load.title}", fontsize=10)
        panel.grid(alpha=0.3, which="both")
    panels[0, 0].legend(fontsize=9)
    where = f"{machine.date}, {machine.kernel}, {machine.cpus} CPUs, {machine.cpu}"
    figure.suptitle(f"llloop by number of workers; {where}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
