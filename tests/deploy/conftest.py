"""Shared by the deployment tests: a machine with systemd, booted once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.machine import Machine, NoMachine, booted

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """A booted systemd that sees this checkout read-only at its own path, and otherwise a copy of this machine."""
    try:
        running = booted([CHECKOUT])
        started = running.__enter__()
    except NoMachine as reason:
        pytest.skip(f"no systemd to deploy to: {reason}")
    try:
        yield started
    finally:
        running.__exit__(None, None, None)
