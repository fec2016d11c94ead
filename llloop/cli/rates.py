"""Rates and latencies, computed from counters: differences between two readings, rates, percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat, zip_longest
from typing import Any

_OPERATION = ("requests", "errors", "bytes", "nanoseconds")
_PROCESS = ("requests", "errors", "bytes", "cpu_seconds", "restarts")


def percentile(histogram: Sequence[int], share: float) -> float | None:
    """Return a percentile of latencies in microseconds, or None if there were no requests.

    It assumes that the latencies in a bucket are distributed evenly. So the error is less than the bucket's width.

    Args:
        histogram: the number of latencies in each bucket, see `llloop.shared.metrics`.
        share: the share of requests that are not slower, from 0 to 1.
    """
    wanted = share * sum(histogram)
    passed = 0
    for bucket, count in enumerate(histogram):
        if count and passed + count >= wanted:
            lower = 2.0 ** (bucket - 1) if bucket else 0.0
            return lower + (2.0**bucket - lower) * (wanted - passed) / count
        passed += count
    return None


def rates_since(now: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """Return the rates between two answers to ``stats``, or since the start of the mount.

    Args:
        now: the later answer.
        before: the earlier answer, or None for the start of the mount.

    Returns:
        A copy of *now* in which each counter is replaced by its increase. In addition: ``seconds``, the length of the
        interval; ``awake``, the share of it in which idle CPUs were kept awake; for each operation ``per_second``,
        ``bytes_per_second``, ``mean_us``, ``p50_us`` and ``p99_us``; for each process ``per_second``,
        ``bytes_per_second`` and ``cpu`` (1 means one CPU fully used); for the watcher the delays ``p50_us`` and
        ``p99_us``.
    """
    if before is not None and now["time"] - now["uptime"] > before["time"]:
        before = None  # it was another mount at the same mount point
    seconds = now["time"] - before["time"] if before else now["uptime"]
    seconds = max(seconds, 1e-6)
    earlier = before["operations"] if before else {}
    operations = {}
    for name, count in now["operations"].items():
        then = earlier.get(name, {})
        increase: dict[str, Any] = {key: count[key] - then.get(key, 0) for key in _OPERATION}
        pairs = zip_longest(count["histogram"], then.get("histogram", ()), fillvalue=0)
        histogram = [one - another for one, another in pairs]
        errnos = {one: times - then.get("errnos", {}).get(one, 0) for one, times in count["errnos"].items()}
        if not increase["requests"] and not increase["errors"]:
            continue
        operations[name] = {
            **increase,
            "histogram": histogram,
            "errnos": {one: times for one, times in errnos.items() if times},
            "per_second": increase["requests"] / seconds,
            "bytes_per_second": increase["bytes"] / seconds,
            "mean_us": increase["nanoseconds"] / increase["requests"] / 1000 if increase["requests"] else None,
            "p50_us": percentile(histogram, 0.5),
            "p99_us": percentile(histogram, 0.99),
        }
    awake = now["awake_seconds"] - (before["awake_seconds"] if before else 0)
    workers_then = chain(before["workers"] if before else (), repeat(None))
    return {
        **now,
        "seconds": seconds,
        "operations": operations,
        "front": _process(now["front"], before and before["front"], seconds),
        "workers": [
            _process(worker, then, seconds) for worker, then in zip(now["workers"], workers_then, strict=False)
        ],
        "awake_seconds": awake,
        "awake": min(1.0, awake / seconds),
        "cache": {key: value - (before["cache"][key] if before else 0) for key, value in now["cache"].items()},
        "watch": _watch(now["watch"], before["watch"] if before else {}),
    }


def _watch(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    pairs = zip_longest(now["histogram"], before.get("histogram", ()), fillvalue=0)
    histogram = [one - another for one, another in pairs]
    return {
        **{key: value - before.get(key, 0) for key, value in now.items() if key != "histogram"},
        "histogram": histogram,
        "p50_us": percentile(histogram, 0.5),
        "p99_us": percentile(histogram, 0.99),
    }


def _process(now: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
    then = before or {}
    increase = {key: now[key] - then.get(key, 0) for key in _PROCESS}
    if then and then["pid"] != now["pid"]:  # a new process, whose CPU time began at 0
        increase["cpu_seconds"] = now["cpu_seconds"]
    return {
        **now,
        **increase,
        "restarts": now["restarts"],
        "per_second": increase["requests"] / seconds,
        "bytes_per_second": increase["bytes"] / seconds,
        "cpu": increase["cpu_seconds"] / seconds,
    }
