"""What tests of fronts share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.killable_front import Line, line_of_fronts


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with line_of_fronts(tmp_path) as own:
        yield own
