"""The tables of `llloop status` and `llloop stats`."""

from __future__ import annotations

import datetime
import sys
from collections import Counter
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from llloop.control.discovery import STOPPED
from llloop.logging.escape import printable_texts
from llloop.shared.metrics import EXPECTED_ERRNOS

# The width of the output, in characters, if it does not go to a terminal.
_FILE_WIDTH = 120
_GOOD, _BAD, _DIM = "green", "bold red", "dim"
_STATES = {"serving": _GOOD, "reloading": "yellow", "stopping": "yellow", "unknown": "yellow"}
_BAR = 6  # characters
_PROCESS_STATES = {"R": "running", "S": "sleeping", "D": "waits for a disk", "T": "stopped", "t": "traced", "Z": "dead"}


def console() -> Console:
    """Return a console for standard output."""
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    # Without markup: file names and other untrusted text could contain valid or invalid markup.
    return Console(highlight=False, markup=False, emoji=False, width=width)


def bytes_text(count: float) -> str:
    """Return a number of bytes with a unit, e.g. "1.5 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def rate_text(per_second: float) -> str:
    """Return a rate as a short text, e.g. "0.2", "37", "12.3k"."""
    if per_second >= 10_000:
        return f"{per_second / 1000:.1f}k"
    return f"{per_second:.0f}" if per_second >= 10 or per_second == 0 else f"{per_second:.1f}"


def latency_text(microseconds: float | None) -> str:
    """Return a latency with a unit, e.g. "12 us", "3.4 ms"."""
    if microseconds is None:
        return "-"
    if microseconds < 1000:
        return f"{microseconds:.0f} us" if microseconds >= 10 else f"{microseconds:.1f} us"
    if microseconds < 1_000_000:
        return f"{microseconds / 1000:.1f} ms"
    return f"{microseconds / 1_000_000:.1f} s"


def duration_text(seconds: float) -> str:
    """Return a duration, e.g. "3 days, 4:05:06"."""
    return str(datetime.timedelta(seconds=int(seconds)))


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _dim_if_zero(text: str, value: float) -> Text:
    return Text(text, style="" if value else _DIM)


def _unanswered(one: dict[str, Any]) -> list[RenderableType]:
    """Return the lines for a mount whose server does not answer."""
    return [_head(one), Text(f"  {one['reason']}{_advice(one)}")]


def _head(one: dict[str, Any]) -> Text:
    state = one["state"]
    head = Text.assemble((one["mountpoint"], "bold"), f"  mirrors {one['source']}  ", (state, _STATES.get(state, _BAD)))
    if not one["visible"]:
        head.append("  (not in this mount namespace, or detached)", style=_DIM)
    return head


def _heading(rates: dict[str, Any]) -> Text:
    line = Text()
    line.append(rates["mountpoint"], style="bold")
    line.append(f"  mirrors {rates['source']}, up {duration_text(rates['uptime'])}", style=_DIM)
    return line


def _summary(rates: dict[str, Any]) -> Text:
    operations = rates["operations"]
    requests = sum(one["per_second"] for one in operations.values())
    read = operations.get("READ", {}).get("bytes_per_second", 0.0)
    written = sum(operations[name]["bytes_per_second"] for name in ("WRITE", "COPY_FILE_RANGE") if name in operations)
    errnos: Counter[str] = Counter()
    for one in operations.values():
        errnos.update({name: count for name, count in one["errnos"].items() if name not in EXPECTED_ERRNOS})
    errors = sum(errnos.values()) / rates["seconds"]
    which = f" ({', '.join(f'{count} {name}' for name, count in errnos.most_common(4))})" if errnos else ""
    parts = [
        ("requests", f"{rate_text(requests)}/s", "bold cyan"),
        ("read", f"{bytes_text(read)}/s", "bold cyan"),
        ("written", f"{bytes_text(written)}/s", "bold cyan"),
        ("errors", f"{rate_text(errors)}/s{which}", "bold yellow" if errors else _DIM),
    ]
    line = Text()
    for name, value, style in parts:
        line.append("    " if line else "").append(f"{name} ", style=_DIM).append(value, style=style)
    return line


def _operations(rates: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("operation")
    for name in ("per s", "errors", "MB/s", "mean", "p50", "p99"):
        table.add_column(name, justify="right")
    table.add_column("share")
    operations = rates["operations"]
    everything = sum(one["requests"] for one in operations.values()) or 1
    for name, one in sorted(operations.items(), key=lambda item: -item[1]["requests"]):
        share = one["requests"] / everything
        moved = one["bytes_per_second"] / 1e6
        table.add_row(
            name.lower(),
            rate_text(one["per_second"]),
            _dim_if_zero(str(one["errors"]), one["errors"]),
            _dim_if_zero(f"{moved:.1f}", moved),
            latency_text(one["mean_us"]),
            latency_text(one["p50_us"]),
            latency_text(one["p99_us"]),
            Text.assemble(("\N{BOX DRAWINGS HEAVY HORIZONTAL}" * round(share * _BAR), "cyan"), f" {share:.0%}"),
        )
    if not operations:
        table.add_row(Text("no requests", style=_DIM))
    return table


def _processes(rates: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("process")
    for name in ("pid", "requests/s", "MB/s", "CPU", "queue", "files", "restarts"):
        table.add_column(name, justify="right")
    for one in ({**rates["front"], "name": "front"}, *rates["workers"]):
        moved = one["bytes_per_second"] / 1e6
        queue = one.get("queue")
        table.add_row(
            Text(one["name"], style=_BAD if one["state"] in STOPPED else ""),
            str(one["pid"] or "-"),
            _dim_if_zero(rate_text(one["per_second"]), one["per_second"]),
            _dim_if_zero(f"{moved:.1f}", moved),
            _dim_if_zero(f"{one['cpu']:.0%}", round(one["cpu"], 2)),
            "" if queue is None else _dim_if_zero(str(queue), queue),
            str(one["descriptors"]),
            _dim_if_zero(str(one["restarts"]), one["restarts"]),
        )
    return table


def _state(rates: dict[str, Any]) -> Text:
    cache, slots = rates["cache"], rates["slots"]
    text = f"{rates['inodes']} inodes, {rates['handles']} open, {slots['used']} of {slots['total']} slots in use"
    if rates["awake"]:
        text += f"; idle CPUs kept awake for {rates['awake']:.0%} of the time"
    opens = sum(cache.values())
    if opens:
        named = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in cache.items() if value)
        text += f"; {_plural(opens, 'open')}, cached pages: {named}"
    watch = rates["watch"]
    if watch["heard"] or watch["own"] or watch["ignored"]:
        text += (
            f"\nsource: {watch['heard']} events heard, {watch['own']} of its own, {watch['ignored']} ignored, "
            f"{watch['told']} told, {watch['notified']} notifications, everything dropped {watch['dropped']} times, "
            f"delay p50 {latency_text(watch['p50_us'])}, p99 {latency_text(watch['p99_us'])}"
        )
    return Text(text, style=_DIM)


def stats_view(mounts: list[dict[str, Any]]) -> RenderableType:
    """Return the tables of `llloop stats`.

    Args:
        mounts: for each mount the result of `llloop.cli.rates.rates_since`, or its state if its server does not answer.
    """
    if not mounts:
        return Text("no llloop mounts")
    parts: list[RenderableType] = []
    for one in printable_texts(mounts):
        if parts:
            parts.append(Text())
        if "operations" in one:
            parts += [_heading(one), _summary(one), _operations(one), _processes(one), _state(one)]
        else:
            parts += _unanswered(one)
    return Group(*parts)


def status_view(mounts: list[dict[str, Any]]) -> RenderableType:
    """Return the paragraphs of `llloop status`, one for each mount.

    Args:
        mounts: the result of `llloop.control.discovery.all_statuses`.
    """
    if not mounts:
        return Text("no llloop mounts")
    parts: list[RenderableType] = []
    for one in printable_texts(mounts):
        if parts:
            parts.append(Text())
        parts += _mount(one)
    return Group(*parts)


def _mount(one: dict[str, Any]) -> list[RenderableType]:
    if "reason" in one:
        return _unanswered(one)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=_DIM)
    grid.add_column(overflow="fold")
    for problem in one["problems"]:
        grid.add_row("  problem", Text(problem, style=_BAD))
    grid.add_row("  up", duration_text(one["uptime"]))
    loop = "llloop's own" if one["loop"] == "own" else "llfuse's"
    grid.add_row("  loop", f"{loop}, FUSE {one['protocol']}" if one["protocol"] else loop)
    grid.add_row("  options", ", ".join(_options(one["options"])))
    grid.add_row("  in force", "; ".join(f"{name}: {value}" for name, value in one["in_force"].items()))
    if one["capabilities"]:
        grid.add_row("  features", ", ".join(one["capabilities"]))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for process in one["processes"]:
        letter = process["state"]
        table.add_row(
            process["role"],
            str(process["pid"] or "-"),
            Text(_PROCESS_STATES.get(letter, letter), style="" if letter in "RSD" else _BAD),
            _plural(process["restarts"], "restart") if process["restarts"] else "",
        )
    grid.add_row("  processes", table)
    return [_head(one), grid]


def _advice(one: dict[str, Any]) -> str:
    return f"; detach it: llloop umount --lazy {one['mountpoint']}" if one["state"] == "dead" else ""


def _options(options: dict[str, Any]) -> list[str]:
    """Return the options as they are given on the command line."""
    found = []
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            found += [option] if value else [f"no-{option}"] if name in ("allow_other", "xattr") else []
        elif isinstance(value, list):
            found += [f"{'-o' if name == 'options' else option} {','.join(value)}"] if value else []
        else:
            found.append(f"{option} {value:g}" if isinstance(value, float) else f"{option} {value}")
    return found
