"""What measures coverage sees the lines of processes that are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from llloop.logging import escape
from tests.coverage import report

KILLED = """
import os, signal, threading
from llloop.logging import escape
def in_a_thread_of_a_child():
    escape.printable("a\\nb")
    os.kill(os.getpid(), signal.SIGKILL)
if not os.fork():
    threading.Thread(target=in_a_thread_of_a_child).start()
    signal.pause()
os.wait()
"""


def test_lines_of_a_killed_process_are_seen(tmp_path: Path) -> None:
    report.prepare(tmp_path)
    place = Path(report.__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(place), "LINES_RUN": str(tmp_path)}
    subprocess.run([sys.executable, "-c", KILLED], env=environment, check=True, timeout=30)
    run = report.lines_run(tmp_path)
    first = escape.printable.__code__.co_firstlineno
    of_the_function = {line for _, _, line in escape.printable.__code__.co_lines() if line and line > first}
    assert of_the_function & set(run[escape.__file__])
    assert not any(run[str(report.CHECKOUT / "llloop/cli/mount_helper.py")])
