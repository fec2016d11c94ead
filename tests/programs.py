"""Runs programs in a mount, independent of the machine's configuration."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path


def run(*command: str | Path, cwd: Path | str = "/", env: dict[str, str] | None = None, user: str | None = None) -> str:
    """Runs a command and returns its output."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def quiet_environment(home: Path) -> dict[str, str]:
    """An environment without the machine's settings for git, pip, PostgreSQL and Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "PIP_", "PG", "PYTHON"))}
    return {**kept, "HOME": str(home), "LC_ALL": "C.UTF-8", "TZ": "UTC"}


class Postgres:
    """A PostgreSQL server with its data in the mount, run as Debian's user for it, or as the tests' user."""

    def __init__(self, directory: Path, scratch: Path) -> None:
        # Debian has the server's programs in a directory for each version, outside of PATH. Use the newest version.
        self.programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        self.user = "postgres" if os.geteuid() == 0 else None
        self.data = directory / "data"
        self.socket = scratch
        self.env = quiet_environment(scratch)
        self.data.mkdir(mode=0o700)
        if self.user:
            account = pwd.getpwnam(self.user)
            for directory in (self.data, scratch):
                os.chown(directory, account.pw_uid, account.pw_gid)

    def program(self, name: str, *arguments: str | Path) -> str:
        return run(self.programs / name, *arguments, env=self.env, user=self.user)

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories='{self.socket}' -c shared_buffers=16MB"
        self.program("pg_ctl", "-D", self.data, "-w", "-l", self.data / "server.log", "-o", options, "start")

    def stop(self, mode: str) -> None:
        self.program("pg_ctl", "-D", self.data, "-w", "-m", mode, "stop")

    def running(self) -> bool:
        return (self.data / "postmaster.pid").exists()

    def query(self, sql: str) -> str:
        return self.program("psql", "-h", self.socket, "-U", "tester", "-d", "postgres", "-AtX", "-c", sql).strip()

    def bench(self, *arguments: str) -> None:
        self.program("pgbench", "-h", self.socket, "-U", "tester", *arguments, "postgres")
