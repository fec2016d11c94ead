"""The results as a picture: a panel for each class, a bar for each contender and workload."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot

from .contenders import NATIVE, REFERENCE
from .placement import DESCRIPTION, KINDS
from .report import Report

# llloop's data paths have similar colours. The peers have muted ones that differ in lightness and hue.
_COLOURS = {
    NATIVE: "#222222",
    "llloop": "#c1121f",
    "llloop-writeback": "#f26a4b",
    "llloop-kernel": "#7f0f18",
    "passthrough_ll": "#8d99ae",
    "passthrough_ll-permissions": "#6c757d",
    "passthrough_fh": "#b8c4d6",
    "passthrough_hp": "#4a6fa5",
    "bindfs": "#6a994e",
    "mergerfs": "#a7c957",
    "go-fuse": "#3aa6b9",
    "llfuse-example": "#b5838d",
}


def draw(report: Report, path: Path) -> None:
    """Draw the ratios to the reference, or to the native directory if the reference was not measured."""
    pyplot.switch_backend("agg")
    names = [contender.name for contender in report.contenders]
    to = REFERENCE if REFERENCE in names else NATIVE
    kinds = [kind for kind in KINDS if any(w.kind == kind for w in report.workloads)]
    figure, panels = pyplot.subplots(len(kinds), 1, figsize=(16, 6.2 * len(kinds)), squeeze=False)
    for panel, kind in zip(panels[:, 0], kinds, strict=True):
        labels = [workload.name for workload in report.workloads if workload.kind == kind]
        width = 0.85 / len(names)
        for place, name in enumerate(names):
            ratios = [report.ratio(label, name, to) for label in labels] + [report.mean(kind, name, to)]
            shift = (place - (len(names) - 1) / 2) * width
            panel.bar(
                [x + shift for x, ratio in enumerate(ratios) if ratio],
                [ratio for ratio in ratios if ratio],
                width,
                label=name,
                color=_COLOURS.get(name),
            )
        panel.set_yscale("log", base=2)
        # Limit the axis, so that one very fast peer does not flatten all other bars.
        panel.set_ylim(bottom=max(panel.get_ylim()[0], 1 / 16))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        panel.axhline(1, color="black", linewidth=0.8)
        panel.axvline(len(labels) - 0.5, color="grey", linewidth=0.8, linestyle=":")
        panel.set_xticks(range(len(labels) + 1), [*labels, "geometric mean"], rotation=25, ha="right")
        panel.set_ylabel(f"throughput, {to} = 1")
        panel.set_title(f"Class {kind}: {DESCRIPTION[kind]}", fontsize=11)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        panel.margins(x=0.01)
    panels[0, 0].legend(ncols=6, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 1.22), frameon=False)
    machine = report.machine
    figure.suptitle(f"{machine.date}, {machine.kernel}, {machine.cpus} CPUs, {machine.cpu}", fontsize=10, y=0.995)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
