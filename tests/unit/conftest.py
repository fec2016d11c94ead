"""Fixtures of the tests without a mount."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llloop.linux.syscalls import PR_GET_SECUREBITS, PR_SET_SECUREBITS, get_capabilities, prctl, set_capabilities
from llloop.shared.slots import Slots
from tests.unit.source import Source
from tests.unit.support import Device, packet_pipe

# As large as in a mount, so that large payloads are spliced. Only touched pages take memory.
PAYLOAD = 128 * 4096


@pytest.fixture(autouse=True)
def unchanged_process() -> Iterator[None]:
    """A front changes what setuid does to its process (securebits), and lowers capabilities for a while.

    Other tests in this process must not inherit that.
    """
    securebits = prctl(PR_GET_SECUREBITS)
    capabilities = get_capabilities()
    yield
    set_capabilities(*capabilities)
    if prctl(PR_GET_SECUREBITS) != securebits:
        prctl(PR_SET_SECUREBITS, securebits)


@pytest.fixture
def slots() -> Slots:
    return Slots(4, PAYLOAD, 2)


@pytest.fixture
def device() -> Iterator[Device]:
    stand_in = Device()
    yield stand_in
    stand_in.close()


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    path = tmp_path / "source"
    path.mkdir()
    with packet_pipe() as first, packet_pipe() as second:
        own = Source(path, [first, second])
        yield own
        own.close()
