"""Duration and random seed of the chaos tests: LLLOOP_CHAOS_SECONDS and LLLOOP_CHAOS_SEED."""

from __future__ import annotations

import os
import random

import pytest

# A manual run may take hours. So extend pytest's timeout and that of the watchdog when tests are collected.
BY_HAND = "LLLOOP_CHAOS_SECONDS" in os.environ
SECONDS = float(os.environ.get("LLLOOP_CHAOS_SECONDS", "3"))
# The maximum additional time for a round of the slowest programs, on a busy machine.
LAST_ROUND = 120.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "chaos":
            item.add_marker(pytest.mark.timeout(SECONDS + 2 * LAST_ROUND + 60))


@pytest.fixture
def seconds() -> float:
    return SECONDS


@pytest.fixture
def seed() -> int:
    """The seed of all random choices. The timing of the machine remains random."""
    return int(os.environ.get("LLLOOP_CHAOS_SEED") or random.SystemRandom().randrange(1 << 32))
