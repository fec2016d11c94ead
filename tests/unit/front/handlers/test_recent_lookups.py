"""Counting of recent lookups."""

from __future__ import annotations

import pytest

from llloop.front.handlers.recent_lookups import RecentLookups

SECOND = 1_000_000_000
START = 77 * SECOND


@pytest.fixture
def recent() -> RecentLookups:
    return RecentLookups(SECOND)


def test_lookups_are_counted_by_directory(recent: RecentLookups) -> None:
    for directory in (5, 6, 5):
        recent.note(directory, START)
    assert [recent.count(directory, START) for directory in (5, 6, 7)] == [2, 1, 0]


@pytest.mark.parametrize("begun", [START, START + SECOND // 3])
def test_only_recent_lookups_count(recent: RecentLookups, begun: int) -> None:
    recent.note(9, START)  # the other lookup may be at any moment of its half of the time
    recent.note(5, begun)
    assert recent.count(5, begun + SECOND // 2 - 1) == 1
    recent.note(5, begun + SECOND // 2)
    assert recent.count(5, begun + SECOND) == 1


def test_counts_expire_after_a_pause(recent: RecentLookups) -> None:
    recent.note(5, START)
    assert recent.count(5, START + 60 * SECOND) == 0


def test_nothing_is_counted_without_validity() -> None:
    recent = RecentLookups(0)
    recent.note(5, START)
    assert recent.count(5, START) == 0


def test_counting_time_is_limited() -> None:
    recent = RecentLookups(86400 * SECOND)
    recent.note(5, START)
    assert recent.count(5, START + 10 * SECOND) == 0
