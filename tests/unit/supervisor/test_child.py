"""A process of the tree, its restarts and its end."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from llloop.linux.process import fork
from llloop.supervisor.child import LONGEST_PAUSE, Child

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def child() -> Iterator[Child]:
    own = Child("llloop-test", lambda stacks: fork(lambda: time.sleep(60), "llloop-test"))
    yield own
    own.close()


def test_a_process_that_ends_at_once_is_restarted_with_growing_pauses(child: Child) -> None:
    pauses = []
    for _ in range(20):
        child.started = time.monotonic()
        pauses.append(child.schedule_restart())
    assert pauses[:9] == [0.0] * 9
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE
    child.started = time.monotonic() - 1
    assert child.schedule_restart() == 0.0, "it has lived for a while"


def test_a_process_that_is_replaced_does_not_count_as_one_that_died(child: Child) -> None:
    for _ in range(30):
        child.started = time.monotonic()
        child.ending_on_purpose = True
        assert child.schedule_restart() == 0.0
    assert child.restarts == 30
