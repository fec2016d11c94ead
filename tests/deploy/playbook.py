"""Runs the role's playbook as an administrator does, and returns its results."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
ANSIBLE = CHECKOUT / "scripts" / "ansible"
COMMANDS = Path(sys.executable).parent
PLAY_SECONDS = 600

Mount = dict[str, Any]
# Runs a command with an environment, and returns what it printed.
Runner = Callable[[Sequence[str], Mapping[str, str]], str]


@dataclass(frozen=True)
class Outcome:
    text: str
    changed: int
    failed: int


def controller_environment(scratch: str | Path) -> dict[str, str]:
    """Environment variables that keep Ansible's files below a directory, and its output unformatted."""
    return {
        "PATH": f"{COMMANDS}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        "HOME": os.path.expanduser("~"),
        "ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"),
        "ANSIBLE_HOME": f"{scratch}/ansible",
        "ANSIBLE_REMOTE_TMP": f"{scratch}/ansible/remote",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_DEPRECATION_WARNINGS": "0",
    }


def run_here(command: Sequence[str], environment: Mapping[str, str]) -> str:
    return subprocess.run(
        command,
        env=environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PLAY_SECONDS,
    ).stdout


class Controller:
    """Runs the role on this machine."""

    def __init__(self, scratch: str, write_to: Path, run: Runner, variables: Mapping[str, Any]) -> None:
        """
        Args:
            scratch: directory for Ansible's files, as the machine names it.
            write_to: the same, as this process reaches it.
            variables: what the inventory says of the host in every play.
        """
        self._scratch = scratch
        self._inventory = write_to / "inventory.yml"
        # Not the Python of the tests: on a real host the system's has apt's bindings.
        shutil.copy(Path(__file__).with_name("module_python"), write_to / "python")
        self._run = run
        self._variables = {"ansible_connection": "local", "ansible_become": False, **variables}

    def play(self, mounts: Sequence[Mount], *options: str, fails: bool = False, **variables: Any) -> Outcome:
        """Run site.yml. It must not fail, or it must, as told."""
        host = {
            "ansible_python_interpreter": f"{self._scratch}/python",
            **self._variables,
            **variables,
            "llloop_mounts": list(mounts),
        }
        self._inventory.write_text(json.dumps({"llloop": {"hosts": {"localhost": host}}}))
        command = [f"{COMMANDS}/ansible-playbook", "-i", f"{self._scratch}/inventory.yml", *options]
        text = self._run([*command, str(ANSIBLE / "site.yml")], controller_environment(self._scratch))
        recap = re.search(r"^localhost .* changed=(\d+) .* failed=(\d+) ", text, re.MULTILINE)
        assert recap, text
        outcome = Outcome(text, int(recap[1]), int(recap[2]))
        assert bool(outcome.failed) == fails, text
        return outcome


def make_wheels(place: Path) -> Path:
    """Build the wheels of llloop and its dependencies, so that hosts need no index; return llloop's."""
    copy = place / "checkout"
    # A copy: building leaves files beside what it builds.
    for name in ("llloop", "workers", "scripts"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in CHECKOUT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    wheels = place / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(wheels), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PLAY_SECONDS)
    assert done.returncode == 0, done.stderr
    (own,) = wheels.glob("llloop-*.whl")
    return own
