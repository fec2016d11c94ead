"""Shared by the deployment tests: a machine with systemd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.deploy.machine import Machine, NoMachine, booted
from tests.server import reachable_directory, remove_tree

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A booted systemd that sees this checkout read-only at its own path, and otherwise a copy of this machine.

    Each file has its own, so that no test meets what those of another file have left.
    """
    with ExitStack() as stack:
        try:
            started = stack.enter_context(booted([CHECKOUT]))
        except NoMachine as reason:
            pytest.skip(f"no systemd to deploy to: {reason}")
        yield started


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory for Ansible's files."""
    place = reachable_directory("llloop-ansible-")
    yield place
    remove_tree(place)
