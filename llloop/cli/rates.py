"""Counters made into figures for people: what happened between two looks, rates, percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat, zip_longest
from typing import Any

_OPERATION = ("requests", "errors", "bytes", "nanoseconds")
_PROCESS = ("requests", "errors", "bytes", "cpu_seconds", "restarts")


def percentile(histogram: Sequence[int], share: float) -> float | None:
    """Return the latency in microseconds that *share* of the requests did not exceed, None if there were none.

    Args:
        histogram: how many requests took less than 1, 2, 4, ... microseconds, and not less than the one before.
        share: from 0 to 1. Within a bucket the latencies are taken to be spread evenly, so a figure is off by less
            than the width of its bucket.
    """
    wanted = share * sum(histogram)
    passed = 0
    for bucket, count in enumerate(histogram):
        if count and passed + count >= wanted:
            lower = 2.0 ** (bucket - 1) if bucket else 0.0
            return lower + (2.0**bucket - lower) * (wanted - passed) / count
        passed += count
    return None


def since(now: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """Return the figures of the time between two answers to ``stats``, or since the mount began.

    Args:
        now: the later answer.
        before: the earlier one, or None.

    Returns:
        *now*, with what counts up since the mount began replaced by what it grew by, ``seconds`` for how long that
        took, and for each operation ``per_second``, ``bytes_per_second``, ``mean_us``, ``p50_us`` and ``p99_us``; for
        each process ``per_second``, ``bytes_per_second`` and ``cpu`` (1 is one CPU kept busy).
    """
    if before is not None and now["time"] - now["uptime"] > before["time"]:
        before = None  # another mount in the same place
    seconds = now["time"] - before["time"] if before else now["uptime"]
    seconds = max(seconds, 1e-6)
    earlier = before["operations"] if before else {}
    operations = {}
    for name, count in now["operations"].items():
        then = earlier.get(name, {})
        grown: dict[str, Any] = {key: count[key] - then.get(key, 0) for key in _OPERATION}
        pairs = zip_longest(count["histogram"], then.get("histogram", ()), fillvalue=0)
        histogram = [one - another for one, another in pairs]
        errnos = {one: times - then.get("errnos", {}).get(one, 0) for one, times in count["errnos"].items()}
        if not grown["requests"] and not grown["errors"]:
            continue
        operations[name] = {
            **grown,
            "histogram": histogram,
            "errnos": {one: times for one, times in errnos.items() if times},
            "per_second": grown["requests"] / seconds,
            "bytes_per_second": grown["bytes"] / seconds,
            "mean_us": grown["nanoseconds"] / grown["requests"] / 1000 if grown["requests"] else None,
            "p50_us": percentile(histogram, 0.5),
            "p99_us": percentile(histogram, 0.99),
        }
    workers_then = chain(before["workers"] if before else (), repeat(None))
    return {
        **now,
        "seconds": seconds,
        "operations": operations,
        "front": _process(now["front"], before and before["front"], seconds),
        "workers": [
            _process(worker, then, seconds) for worker, then in zip(now["workers"], workers_then, strict=False)
        ],
        "cache": {key: value - (before["cache"][key] if before else 0) for key, value in now["cache"].items()},
    }


def _process(now: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
    then = before or {}
    grown = {key: now[key] - then.get(key, 0) for key in _PROCESS}
    if then and then["pid"] != now["pid"]:  # a successor, whose clock began anew
        grown["cpu_seconds"] = now["cpu_seconds"]
    return {
        **now,
        **grown,
        "restarts": now["restarts"],
        "per_second": grown["requests"] / seconds,
        "bytes_per_second": grown["bytes"] / seconds,
        "cpu": grown["cpu_seconds"] / seconds,
    }
