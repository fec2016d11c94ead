"""A process of the tree, its restarts and its end."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

import pytest

from llloop.logging.stacks import Stacks
from llloop.supervisor.child import LONGEST_PAUSE, Child, fork

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def started() -> list[BaseProcess]:
    return []


@pytest.fixture
def child(started: list[BaseProcess]) -> Iterator[Child]:
    def launch(stacks: Stacks) -> BaseProcess:
        process = fork.Process(target=time.sleep, args=(60,))
        process.start()
        started.append(process)
        return process

    own = Child("llloop-test", launch)
    yield own
    own.close()


def test_a_process_without_a_pidfd_does_not_stay(
    child: Child, started: list[BaseProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor starts another, and two workers of one shard must never run."""

    def no_descriptors(pid: int, flags: int = 0) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", no_descriptors)
        with pytest.raises(OSError):
            child.start()
    assert child.process is None
    assert [process.exitcode for process in started] == [-9]


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
