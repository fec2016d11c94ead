"""How many lookups of late are counted, and for how long."""

from __future__ import annotations

import pytest

from llloop.front.handlers.recent_lookups import RecentLookups

SECOND = 1_000_000_000
START = 77 * SECOND


@pytest.fixture
def recent() -> RecentLookups:
    return RecentLookups(SECOND)


def test_each_directory_has_its_own_count(recent: RecentLookups) -> None:
    for directory in (5, 6, 5):
        recent.note(directory, START)
    assert [recent.count(directory, START) for directory in (5, 6, 7)] == [2, 1, 0]


@pytest.mark.parametrize("begun", [START, START + SECOND // 3])
def test_what_is_young_counts_and_what_is_old_does_not(recent: RecentLookups, begun: int) -> None:
    recent.note(9, START)  # wherever in its half of the time the other falls
    recent.note(5, begun)
    assert recent.count(5, begun + SECOND // 2 - 1) == 1
    recent.note(5, begun + SECOND // 2)
    assert recent.count(5, begun + SECOND) == 1


def test_after_a_long_pause_nothing_is_left(recent: RecentLookups) -> None:
    recent.note(5, START)
    assert recent.count(5, START + 60 * SECOND) == 0


def test_nothing_counts_where_the_kernel_keeps_nothing() -> None:
    recent = RecentLookups(0)
    recent.note(5, START)
    assert recent.count(5, START) == 0


def test_a_long_validity_does_not_gather_directories_for_as_long() -> None:
    recent = RecentLookups(86400 * SECOND)
    recent.note(5, START)
    assert recent.count(5, START + 10 * SECOND) == 0
