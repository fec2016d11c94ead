"""A start that fails, is killed or is stopped at any step leaves no process and no mount."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount.command_line import Ground, environment, ground
from tests.mount.start_steps import IN_THE_WAY
from tests.server import Server
from tests.watchdog import Watchdog, kill_session, unmount_lazily

CHECKOUT = Path(__file__).parents[2]

pytestmark = [pytest.mark.mounted, pytest.mark.timeout(300), pytest.mark.slow]


@pytest.fixture
def place(via: str, watchdog: Watchdog) -> Iterator[Ground]:
    if via == "llfuse":
        pytest.skip("the same again")
    with ground(Server.prepare(via, watchdog), via) as prepared:
        try:
            yield prepared
        finally:
            unmount_lazily(str(prepared.mountpoint))


def outcomes(place: Ground, how: str, every: int) -> list[dict[str, Any]]:
    """What became of a start of which one step went wrong, for every so many-th step."""
    arguments = [str(place.source), str(place.mountpoint), how, str(every)]
    command = [sys.executable, "-m", "tests.mount.start_steps", *arguments]
    process = subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, env=environment(), text=True, start_new_session=True
    )
    try:
        stdout, _ = process.communicate(timeout=280)
    finally:
        kill_session(process.pid)
        process.wait()
    assert process.returncode == 0
    found = [json.loads(line) for line in stdout.splitlines()]
    assert len(found) > 200 // every, "it has more steps than that"
    left = [one for one in found if one["mounted"] or one["processes"]]
    assert not left, f"something is left: {left}"
    return found


def test_start_fails_at_each_step(place: Ground) -> None:
    found = outcomes(place, "error", 4)
    for one in found:
        # Not every step is needed.
        assert one["code"] in (0, 5), one
        if one["code"] == 5:
            # A message is lost if standard error itself cannot be restored.
            unheard = one["step"][2] in ("__exit__", "dup2") and one["said"] == ""
            assert unheard or (one["said"].count("\n") == 1 and "No room" in one["said"]), one
    assert sum(IN_THE_WAY in one["said"] for one in found) > len(found) // 3, "the file in the way is named"


def test_start_is_killed_at_each_step(place: Ground) -> None:
    for one in outcomes(place, "SIGKILL", 8):
        assert one["code"] == -9 and "Traceback" not in one["said"], one


@pytest.mark.parametrize(("signal", "unhandled"), [("SIGTERM", -15), ("SIGINT", 130)])
def test_start_is_stopped_at_each_step(place: Ground, signal: str, unhandled: int) -> None:
    found = outcomes(place, signal, 8)
    # Before the signal handler is set, and after the mount was reported as ready.
    others = [one for one in found if one["code"] not in (unhandled, 0)]
    assert len(others) > len(found) * 3 / 4, found
    for one in others:
        assert one["code"] == 1, one
        assert one["said"].endswith(f"stopped by {signal} before it was ready\n"), one
        assert one["said"].count("\n") == 1, one
