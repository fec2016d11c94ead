"""The collecting process logs the records of its children, whatever start method multiprocessing has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import logging, multiprocessing, sys
from pathlib import Path
from llloop.logging import setup as log
from llloop.linux.process import fork

given = sys.argv[2]
if given != "unset":
    multiprocessing.set_start_method(given)
log.configure("info", Path(sys.argv[1]))
log.start_collecting()
fork(lambda: logging.info("from the child"), "the-child").wait()
log.stop_collecting()
left = multiprocessing.get_start_method(allow_none=True)
assert left == (None if given == "unset" else given), left
# The queue of another start method would start a resource tracker.
assert multiprocessing.resource_tracker._resource_tracker._fd is None
"""


# forkserver is the default of Python 3.14 and newer.
@pytest.mark.parametrize("method", ["unset", "fork", "spawn", "forkserver"])
def test_children_are_logged_with_any_start_method(method: str, tmp_path: Path) -> None:
    file = tmp_path / "log"
    script = "import multiprocessing.resource_tracker\n" + SCRIPT
    command = [sys.executable, "-c", script, str(file), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "INFO the-child: from the child" in file.read_text()
