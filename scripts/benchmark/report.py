"""The results as text: tables of ratios for each class."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from .contenders import NATIVE, REFERENCE, Contender
from .machine import Machine
from .measure import Results
from .placement import DESCRIPTION, KINDS
from .site import Sample
from .workloads import Workload


@dataclass(slots=True)
class Report:
    """The content of the report of a run."""

    machine: Machine
    workloads: Sequence[Workload]
    contenders: Sequence[Contender]
    results: Results
    source: str
    skipped: Mapping[str, str] = field(default_factory=dict)

    def median(self, workload: str, contender: str, what: Callable[[Sample], float] = lambda s: s.rate) -> float | None:
        """Return the median over the rounds, or None if there is no sample."""
        samples = self.results.samples.get(workload, {}).get(contender)
        return statistics.median(map(what, samples)) if samples else None

    def ratio(self, workload: str, contender: str, to: str) -> float | None:
        """Return the ratio of the speeds of two contenders."""
        mine, other = self.median(workload, contender), self.median(workload, to)
        return mine / other if mine and other else None

    def best_peer(self, workload: str) -> str | None:
        """Return the fastest peer."""
        rates = {
            contender.name: rate
            for contender in self.contenders
            if contender.peer and (rate := self.median(workload, contender.name))
        }
        return max(rates, key=rates.__getitem__, default=None)

    def mean(self, kind: str, contender: str, to: str | None) -> float | None:
        """Return the geometric mean of the ratios of a class; `to` None means the best peer of each workload."""
        ratios = [
            ratio
            for workload in self.workloads
            if workload.kind == kind
            and (other := to or self.best_peer(workload.name))
            and (ratio := self.ratio(workload.name, contender, other))
        ]
        return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None

    def mean_cell(self, kind: str, contender: str, to: str | None) -> str:
        """Return the mean for a table, with a mark if a workload is missing."""
        missing = any(
            self.median(workload.name, contender) is None for workload in self.workloads if workload.kind == kind
        )
        return number(self.mean(kind, contender, to)) + "*" * missing


@dataclass(slots=True)
class Table:
    """Rows of cells. The first column is aligned left, all others right."""

    heads: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def text(self) -> str:
        """As aligned text."""
        lines = [self.heads, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.heads))]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        )

    def markdown(self) -> str:
        """As Markdown."""
        rule = ["---", *["--:"] * (len(self.heads) - 1)]
        return "\n".join("| " + " | ".join(line) + " |" for line in [self.heads, rule, *self.rows])


def number(value: float | None) -> str:
    """Return the value with about three digits."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _ratios(report: Report, kind: str, to: str) -> Table:
    names = [contender.name for contender in report.contenders if contender.name != to]
    table = Table(["workload", to, "", *names])
    for workload in report.workloads:
        if workload.kind == kind:
            rate = report.median(workload.name, to)
            ratios = [number(report.ratio(workload.name, name, to)) for name in names]
            table.rows.append([workload.name, number(rate and rate / workload.scale), workload.unit, *ratios])
    table.rows.append(["geometric mean", "", "", *[report.mean_cell(kind, name, to) for name in names]])
    return table


def _best(report: Report, kind: str) -> Table:
    names = [contender.name for contender in report.contenders if not contender.peer and contender.name != NATIVE]
    table = Table(["workload", "best peer", "its rate", "", *names])
    for workload in report.workloads:
        best = report.best_peer(workload.name)
        if workload.kind == kind and best:
            rate = report.median(workload.name, best)
            ratios = [number(report.ratio(workload.name, name, best)) for name in names]
            table.rows.append([workload.name, best, number(rate and rate / workload.scale), workload.unit, *ratios])
    table.rows.append(["geometric mean", "", "", "", *[report.mean_cell(kind, name, None) for name in names]])
    return table


def _cost(report: Report, kind: str) -> Table:
    """Return the CPU time for the same amount of work, because a fast contender does more work in the same time."""
    names = [contender.name for contender in report.contenders if contender.command]
    table = Table(["workload", "CPU seconds per", *names])
    for workload in report.workloads:
        if workload.kind == kind:
            amount, unit = (1e9, "GB") if workload.unit == "MB/s" else (1e5, f"100,000 {workload.unit[:-2]}")
            costs = [report.median(workload.name, name, lambda s: s.cpu_seconds / s.work) for name in names]
            table.rows.append([workload.name, unit, *[number(None if c is None else c * amount) for c in costs]])
    return table


def _memory(report: Report, kind: str) -> Table:
    names = [contender.name for contender in report.contenders if contender.command]
    table = Table(["workload", *names])
    for workload in report.workloads:
        if workload.kind == kind:
            peaks = [report.median(workload.name, name, lambda s: s.peak_memory / 2**20) for name in names]
            table.rows.append([workload.name, *[number(peak) for peak in peaks]])
    return table


def render(report: Report, markdown: bool) -> str:
    """Return all tables, as Markdown or plain text."""
    machine = report.machine
    parts = [
        f"{machine.date}, {machine.kernel}, {machine.cpus} CPUs: {machine.cpu}, {machine.memory_gib} GiB, "
        f"Python {machine.python}; source on {report.source}; "
        f"medians of {report.results.rounds} round{'s' * (report.results.rounds != 1)}, interleaved."
    ]
    names = {contender.name for contender in report.contenders}

    def section(title: str, tables: Sequence[tuple[str, Table]]) -> None:
        parts.append(f"## {title}" if markdown else f"\n{title}\n{'=' * len(title)}")
        for head, table in tables:
            parts.append(f"{head}\n\n{table.markdown()}" if markdown else f"{head}\n\n{table.text()}")

    for kind in KINDS:
        if not any(workload.kind == kind for workload in report.workloads):
            continue
        tables = []
        if NATIVE in names:
            tables.append(("Ratios to the native directory:", _ratios(report, kind, NATIVE)))
        if REFERENCE in names:
            tables.append((f"Ratios to {REFERENCE}:", _ratios(report, kind, REFERENCE)))
        if {contender.peer for contender in report.contenders if contender.command} == {True, False}:
            tables.append(("Ratios to the best peer of each workload:", _best(report, kind)))
        tables.append(("CPU seconds of all of a server's processes, for the same amount of work:", _cost(report, kind)))
        tables.append(("Peak memory of all of a server's processes, MiB:", _memory(report, kind)))
        section(f"Class {kind}: {DESCRIPTION[kind]}", tables)
    notes = [f"{workload.name}: {workload.title}" for workload in report.workloads]
    parts.append(_list("Workloads:", notes, markdown))
    remarks = [f"{contender.name}: {contender.remark}" for contender in report.contenders if contender.remark]
    remarks += [f"{name}: skipped: {reason}" for name, reason in report.skipped.items()]
    remarks += [
        f"{name}: failed in {workload}, so that a mean with * is without: {reason}"
        for workload, reasons in report.results.failures.items()
        for name, reason in reasons.items()
    ]
    if remarks:
        parts.append(_list("Contenders:", remarks, markdown))
    return "\n\n".join(parts) + "\n"


def _list(head: str, items: Sequence[str], markdown: bool) -> str:
    mark = "* " if markdown else "  "
    return head + ("\n\n" if markdown else "\n") + "\n".join(mark + item for item in items)


def as_json(report: Report) -> dict[str, object]:
    """Return all samples, separately for each round."""
    return {
        "machine": asdict(report.machine),
        "source": report.source,
        "placement": DESCRIPTION,
        "rounds": report.results.rounds,
        "skipped": dict(report.skipped),
        "failures": report.results.failures,
        "contenders": {contender.name: contender.remark for contender in report.contenders},
        "workloads": [
            {
                "name": workload.name,
                "class": workload.kind,
                "title": workload.title,
                "unit": workload.unit,
                "contenders": {
                    name: {
                        "rate": rate / workload.scale if (rate := report.median(workload.name, name)) else None,
                        "to_native": report.ratio(workload.name, name, NATIVE),
                        "to_" + REFERENCE: report.ratio(workload.name, name, REFERENCE),
                        "rounds": [asdict(sample) for sample in samples],
                    }
                    for name, samples in report.results.samples.get(workload.name, {}).items()
                },
            }
            for workload in report.workloads
        ],
        "geometric_means": {
            kind: {
                contender.name: {
                    "to_native": report.mean(kind, contender.name, NATIVE),
                    "to_" + REFERENCE: report.mean(kind, contender.name, REFERENCE),
                    "to_best_peer": report.mean(kind, contender.name, None),
                }
                for contender in report.contenders
            }
            for kind in KINDS
        },
    }
