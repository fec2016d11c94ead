"""Rates and percentiles from counters, and their formatting."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llloop.cli import prometheus, tables
from llloop.cli.rates import percentile, rates_since
from llloop.linux.fuse import Opcode
from llloop.logging import escape
from llloop.shared.metrics import ProcessCounters


def answer(time: float, requests: int, moved: int, histogram: list[int], pid: int = 7, cpu: float = 0.0) -> Any:
    process = {
        "state": "S",
        "requests": requests,
        "errors": 0,
        "bytes": moved,
        "pid": pid,
        "restarts": 0,
        "descriptors": 9,
        "cpu_seconds": cpu,
    }
    count = {"requests": requests, "errors": 1, "bytes": moved, "nanoseconds": 5000 * requests, "histogram": histogram}
    count["errnos"] = {"EIO": 1, "ENOENT": requests}
    return {
        "state": "serving",
        "source_problem": None,
        "mountpoint": "/mnt",
        "source": "/src",
        "time": time,
        "uptime": time - 100,
        "operations": {"READ": count} if requests else {},
        "front": process,
        "workers": [{**process, "name": "worker-0", "queue": 2}],
        "inodes": 5,
        "handles": 3,
        "awake_seconds": cpu,
        "slots": {"used": 2, "total": 256},
        "cache": {"kept": requests, "dropped": 0, "bypassed": 0, "passed_through": 0},
        "watch": {
            **{"heard": requests, "own": 0, "ignored": 0, "notified": 0, "told": 0, "dropped": 0},
            **{"nanoseconds": 0, "histogram": histogram},
        },
    }


def test_rates_are_computed_from_the_difference() -> None:
    before = answer(200.0, 100, 1000, [0, 100], cpu=1.0)
    found = rates_since(answer(202.0, 300, 5000, [0, 100, 200], cpu=2.0), before)
    read = found["operations"]["READ"]
    assert found["seconds"] == 2
    assert (read["requests"], read["errors"], read["per_second"], read["bytes_per_second"]) == (200, 0, 100, 2000)
    assert read["histogram"] == [0, 0, 200]
    assert read["errnos"] == {"ENOENT": 200}
    assert (read["mean_us"], read["p50_us"]) == (5, 3)
    assert found["workers"][0]["cpu"] == 0.5
    assert found["workers"][0]["queue"] == 2
    assert found["cache"]["kept"] == 200
    assert (found["watch"]["heard"], found["watch"]["histogram"], found["watch"]["p50_us"]) == (200, [0, 0, 200], 3)
    assert (found["awake_seconds"], found["awake"]) == (1.0, 0.5)


def test_rates_without_earlier_answer_cover_the_uptime() -> None:
    found = rates_since(answer(300.0, 100, 1000, [100]), None)
    assert found["operations"]["READ"]["per_second"] == 0.5


def test_rates_ignore_counters_of_an_earlier_mount() -> None:
    found = rates_since({**answer(210.0, 5, 0, [5]), "uptime": 3}, answer(200.0, 100, 0, [100]))
    assert (found["seconds"], found["operations"]["READ"]["requests"]) == (3, 5)


def test_operations_without_new_requests_are_omitted() -> None:
    before = answer(200.0, 100, 0, [100])
    assert rates_since(answer(201.0, 100, 0, [100]), before)["operations"] == {}


def test_cpu_time_of_a_new_process_counts_from_zero() -> None:
    before = answer(200.0, 1, 0, [1], pid=7, cpu=100.0)
    found = rates_since(answer(201.0, 2, 0, [2], pid=8, cpu=0.25), before)
    assert found["workers"][0]["cpu"] == 0.25


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=200), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_percentile_is_in_the_right_bucket(microseconds: list[int], share: float) -> None:
    sheet = ProcessCounters()
    for one in microseconds:
        sheet.finished(Opcode.READ, 1000 * one)
    found = percentile(sheet.snapshot()["READ"].histogram, share)
    ordered = sorted(microseconds)
    true = next(one for place, one in enumerate(ordered, 1) if place >= share * len(ordered))
    assert found is not None
    bucket = true.bit_length()
    assert (2 ** (bucket - 1) if bucket else 0) <= found <= 2**bucket


def test_percentile_without_requests_is_none() -> None:
    assert percentile([], 0.5) is None
    assert percentile([0, 0], 0.99) is None


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (tables.bytes_text, 0, "0 B"),
        (tables.bytes_text, 999, "999 B"),
        (tables.bytes_text, 1500, "1.5 kB"),
        (tables.bytes_text, 123_456_789, "123 MB"),
        (tables.bytes_text, 5e15, "5000.0 TB"),
        (tables.rate_text, 0, "0"),
        (tables.rate_text, 0.25, "0.2"),
        (tables.rate_text, 37.4, "37"),
        (tables.rate_text, 12_345, "12.3k"),
        (tables.latency_text, None, "-"),
        (tables.latency_text, 3.25, "3.2 us"),
        (tables.latency_text, 250, "250 us"),
        (tables.latency_text, 3_400, "3.4 ms"),
        (tables.latency_text, 2_500_000, "2.5 s"),
        (tables.duration_text, 273_906, "3 days, 4:05:06"),
        (escape.printable, "plain \N{SNOWMAN}", "plain \N{SNOWMAN}"),
        (escape.printable, "a\nb\x1b\udcff", r"a\nb\x1b\udcff"),
    ],
)
def test_values_are_formatted_briefly(function: Any, value: Any, text: str) -> None:
    assert function(value) == text


def test_prometheus_buckets_are_cumulative() -> None:
    text = prometheus.text([answer(300.0, 6, 1000, [1, 2, 0, 3])])
    bucket = 'llloop_request_seconds_bucket{le="%s",mountpoint="/mnt",operation="read"} %s'
    cumulative = {"1e-06": 1.0, "2e-06": 3.0, "4e-06": 3.0, "8e-06": 6.0, "134.218": 6.0, "+Inf": 6.0}
    for bound, count in cumulative.items():
        assert bucket % (bound, count) in text
    assert 'llloop_request_seconds_sum{mountpoint="/mnt",operation="read"} 3e-05' in text
    assert 'llloop_worker_queue{mountpoint="/mnt",process="worker-0"} 2.0' in text
