"""Counters of mounts in Prometheus's text format, also as a file for the textfile collector of node_exporter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from llloop.linux import trusted_files
from llloop.logging.escape import printable_texts
from llloop.shared.metrics import EXPECTED_ERRNOS

# The number of exported buckets, up to 2**27 microseconds or about two minutes. Higher ones would stay empty.
_BUCKETS = 28
# Errors that are exported even while their count is 0: if a series began with 1, an alert would not see an increase.
_ALWAYS_EXPORTED = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "EMFILE", "ENOMEM", "ETIMEDOUT")
# States in which a mount answers requests.
_UP = frozenset({"serving", "reloading", "stopping"})
# Process states (proc_pid_stat(5)) in which a process counts as up.
_RUNNING = frozenset("RSDI")


class _Collector(Collector):
    """Converts the ``stats`` of mounts into Prometheus metrics.

    Args:
        mounts: the result of `llloop.control.discovery.all_stats`.
    """

    def __init__(self, mounts: Sequence[dict[str, Any]]) -> None:
        by_mountpoint: dict[str, dict[str, Any]] = {}
        for one in printable_texts(mounts):
            # Only one mount per mount point: prefer the visible one to covered ones and those of other namespaces.
            if one["mountpoint"] not in by_mountpoint or one.get("visible"):
                by_mountpoint[one["mountpoint"]] = one
        self._all = list(by_mountpoint.values())
        self._answered = [one for one in self._all if "operations" in one]

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(
            "llloop_up",
            "1 if the mount answers requests, 0 if its server is gone or does not answer.",
            labels=["mountpoint"],
        )
        for one in self._all:
            up.add_metric([one["mountpoint"]], one["state"] in _UP)
        yield up
        yield from self._operations()
        yield from self._processes()
        for name, text, value in (
            (
                "llloop_source_up",
                "1 if the source exists and answers, otherwise 0.",
                lambda one: not one["source_problem"],
            ),
            ("llloop_uptime_seconds", "For how long the mount has existed.", lambda one: one["uptime"]),
            ("llloop_inodes", "Inodes that the kernel knows.", lambda one: one["inodes"]),
            ("llloop_open_handles", "Open files and directories.", lambda one: one["handles"]),
            (
                "llloop_slots",
                "How many requests the workers can have at the same time.",
                lambda one: one["slots"]["total"],
            ),
            ("llloop_slots_used", "How many requests the workers have now.", lambda one: one["slots"]["used"]),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["mountpoint"])
            for one in self._answered:
                gauge.add_metric([one["mountpoint"]], value(one))
            yield gauge
        opens = CounterMetricFamily(
            "llloop_opens",
            "Opens of files, by what happened to the cached pages of the file.",
            labels=["mountpoint", "pages"],
        )
        for one in self._answered:
            for decision, count in one["cache"].items():
                opens.add_metric([one["mountpoint"], decision], count)
        yield opens
        awake = CounterMetricFamily(
            "llloop_awake_seconds", "For how long llloop has kept idle CPUs awake.", labels=["mountpoint"]
        )
        for one in self._answered:
            awake.add_metric([one["mountpoint"]], one["awake_seconds"])
        yield awake
        yield from self._watch()

    def _watch(self) -> Iterator[Metric]:
        events = CounterMetricFamily(
            "llloop_watch_events",
            "Events in the source: heard, own (caused by llloop itself), ignored, told (passed on).",
            labels=["mountpoint", "kind"],
        )
        dropped = CounterMetricFamily(
            "llloop_watch_drops", "How often events were lost and all caches were dropped.", labels=["mountpoint"]
        )
        for one in self._answered:
            for kind in ("heard", "own", "ignored", "told"):
                events.add_metric([one["mountpoint"], kind], one["watch"][kind])
            dropped.add_metric([one["mountpoint"]], one["watch"]["dropped"])
        yield from (events, dropped)

    def _operations(self) -> Iterator[Metric]:
        labels = ["mountpoint", "operation"]
        latency = HistogramMetricFamily(
            "llloop_request_seconds", "Time from the arrival of a request at the front to its answer.", labels=labels
        )
        errors = CounterMetricFamily(
            "llloop_errors",
            "Failed requests by errno, without those that llloop_ordinary_errors counts.",
            labels=[*labels, "errno"],
        )
        ordinary = CounterMetricFamily(
            "llloop_ordinary_errors",
            "Requests answered with an errno of everyday use, such as ENOENT.",
            labels=[*labels, "errno"],
        )
        moved = CounterMetricFamily("llloop_bytes", "Bytes of file data read, written or copied.", labels=labels)
        for one in self._answered:
            for name, count in one["operations"].items():
                label_values = [one["mountpoint"], name.lower()]
                latency.add_metric(label_values, _buckets(count["histogram"]), sum_value=count["nanoseconds"] / 1e9)
                for errno, times in {**dict.fromkeys(_ALWAYS_EXPORTED, 0), **count["errnos"]}.items():
                    (ordinary if errno in EXPECTED_ERRNOS else errors).add_metric([*label_values, errno], times)
                moved.add_metric(label_values, count["bytes"])
        yield from (latency, errors, ordinary, moved)

    def _processes(self) -> Iterator[Metric]:
        labels = ["mountpoint", "process"]
        counters = {
            "requests": CounterMetricFamily(
                "llloop_process_requests", "Requests that the process has answered.", labels=labels
            ),
            "bytes": CounterMetricFamily(
                "llloop_process_bytes", "Bytes of file data that the process has read or written.", labels=labels
            ),
            "restarts": CounterMetricFamily(
                "llloop_process_restarts", "How often the process was replaced.", labels=labels
            ),
            "cpu_seconds": CounterMetricFamily(
                "llloop_process_cpu_seconds", "CPU time that the process has used.", labels=labels
            ),
        }
        up = GaugeMetricFamily("llloop_process_up", "1 if the process runs, 0 if it is stopped or gone.", labels=labels)
        descriptors = GaugeMetricFamily(
            "llloop_process_descriptors", "Descriptors that the process has open.", labels=labels
        )
        queue = GaugeMetricFamily(
            "llloop_worker_queue", "Requests that the worker has and has not answered.", labels=labels
        )
        for mount in self._answered:
            workers = [(f"worker-{shard}", one) for shard, one in enumerate(mount["workers"])]
            for name, one in [("front", mount["front"]), *workers]:
                label_values = [mount["mountpoint"], name]
                for key, family in counters.items():
                    family.add_metric(label_values, one[key])
                up.add_metric(label_values, one["state"] in _RUNNING)
                descriptors.add_metric(label_values, one["descriptors"])
                if "queue" in one:
                    queue.add_metric(label_values, one["queue"])
        yield from (*counters.values(), up, descriptors, queue)


def _buckets(histogram: list[int]) -> list[tuple[str, float]]:
    """Return the cumulative buckets, each with its upper bound in seconds."""
    found: list[tuple[str, float]] = []
    total = 0
    for bucket in range(_BUCKETS):
        total += histogram[bucket] if bucket < len(histogram) else 0
        found.append((f"{2**bucket / 1e6:g}", total))
    return [*found, ("+Inf", sum(histogram))]


def text(mounts: Sequence[dict[str, Any]]) -> str:
    """Return the result of `llloop.control.discovery.all_stats` in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Collector(mounts))
    return generate_latest(registry).decode()


def write(mounts: Sequence[dict[str, Any]], file: Path) -> None:
    """Atomically replace *file* with the counters in Prometheus's text format.

    Raises:
        OSError: it cannot be written, or it is not a regular file.
    """
    trusted_files.replace_file(os.path.abspath(file), text(mounts).encode())
