"""A mount's counters in Prometheus's text format, printed or put into a file for node_exporter's textfile collector."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from . import trusted
from .escape import printable_texts

# The buckets shown: up to 2**27 microseconds, some two minutes. More would be series that nobody fills.
_BUCKETS = 28


class _Collector(Collector):
    """One answer to ``stats`` as metrics."""

    def __init__(self, stats: dict[str, Any]) -> None:
        self._stats = printable_texts(stats)

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        mount = stats["mountpoint"]
        yield from self._operations(mount)
        yield from self._processes(mount)
        for name, text, value in (
            ("llloop_uptime_seconds", "How long the mount has been there.", stats["uptime"]),
            ("llloop_inodes", "Inodes that the kernel knows.", stats["inodes"]),
            ("llloop_open_handles", "Open files and directories.", stats["handles"]),
            ("llloop_slots", "How many requests can be with the workers at a time.", stats["slots"]["total"]),
            ("llloop_slots_used", "How many requests are with the workers.", stats["slots"]["used"]),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["mountpoint"])
            gauge.add_metric([mount], value)
            yield gauge
        opens = CounterMetricFamily(
            "llloop_opens", "Opens, by what became of the cached pages of the file.", labels=["mountpoint", "pages"]
        )
        for decision, count in stats["cache"].items():
            opens.add_metric([mount, decision], count)
        yield opens

    def _operations(self, mount: str) -> Iterator[Metric]:
        labels = ["mountpoint", "operation"]
        latency = HistogramMetricFamily(
            "llloop_request_seconds", "How long requests took, from when the front took them.", labels=labels
        )
        errors = CounterMetricFamily("llloop_errors", "Requests answered with an error.", labels=labels)
        moved = CounterMetricFamily("llloop_bytes", "Bytes of file data read, written or copied.", labels=labels)
        for name, count in self._stats["operations"].items():
            of = [mount, name.lower()]
            latency.add_metric(of, _buckets(count["histogram"]), sum_value=count["nanoseconds"] / 1e9)
            errors.add_metric(of, count["errors"])
            moved.add_metric(of, count["bytes"])
        yield from (latency, errors, moved)

    def _processes(self, mount: str) -> Iterator[Metric]:
        labels = ["mountpoint", "process"]
        counters = {
            "requests": CounterMetricFamily(
                "llloop_process_requests", "Requests answered by a process.", labels=labels
            ),
            "bytes": CounterMetricFamily("llloop_process_bytes", "Bytes of file data moved by it.", labels=labels),
            "restarts": CounterMetricFamily("llloop_process_restarts", "How often it was replaced.", labels=labels),
            "cpu_seconds": CounterMetricFamily("llloop_process_cpu_seconds", "CPU time it used.", labels=labels),
        }
        descriptors = GaugeMetricFamily("llloop_process_descriptors", "Descriptors it has open.", labels=labels)
        queue = GaugeMetricFamily("llloop_worker_queue", "Requests handed to it and not answered.", labels=labels)
        for one in ({**self._stats["front"], "name": "front"}, *self._stats["workers"]):
            of = [mount, one["name"]]
            for key, family in counters.items():
                family.add_metric(of, one[key])
            descriptors.add_metric(of, one["descriptors"])
            if "queue" in one:
                queue.add_metric(of, one["queue"])
        yield from (*counters.values(), descriptors, queue)


def _buckets(histogram: list[int]) -> list[tuple[str, float]]:
    """Return the cumulative buckets; their bounds are in seconds."""
    found: list[tuple[str, float]] = []
    total = 0
    for bucket in range(_BUCKETS):
        total += histogram[bucket] if bucket < len(histogram) else 0
        found.append((f"{2**bucket / 1e6:g}", total))
    return [*found, ("+Inf", sum(histogram))]


def _registry(stats: dict[str, Any]) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Collector(stats))
    return registry


def text(stats: dict[str, Any]) -> str:
    """Return an answer to ``stats`` in Prometheus's text format."""
    return generate_latest(_registry(stats)).decode()


def write(stats: dict[str, Any], file: Path) -> None:
    """Put it into *file*, which is replaced as a whole: no reader sees half of it.

    Raises:
        OSError: it cannot be written, or is no regular file.
    """
    trusted.replace_file(os.path.abspath(file), text(stats).encode())
