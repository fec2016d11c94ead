"""Programs that the benchmark needs. It installs or compiles them if they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
# This directory is kept between runs. git ignores `build/`, and you can remove it at any time.
BUILD = TOP / "build" / "bench"


# Returns the command that writes a file.
Compile = Callable[[Path], Sequence[str | Path]]


class Unavailable(Exception):
    """A program is not available here; the message says which and why."""


def run(command: Sequence[str | Path], *, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run a command and return its output. If it fails, the last line of the output is the reason."""
    words = [os.fspath(word) for word in command]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{words[0]}: {error}") from None
    if done.returncode:
        lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
        telling = [line for line in lines if "error" in line.lower() or line.startswith("E:")]
        raise Unavailable(f"{os.path.basename(words[0])}: {(telling or lines)[-1].strip()}")
    return done.stdout


class Installer:
    """Installs Debian packages if the caller allows it and is root."""

    def __init__(self, allowed: bool) -> None:
        """Prepare, without installing anything.

        Args:
            allowed: whether to install packages. If not, a program of a missing package is unavailable.
        """
        self._allowed = allowed
        self._lists_are_fresh = False

    def need(self, *packages: str) -> None:
        """Install missing Debian packages.

        Raises:
            Unavailable: a package is missing and cannot be installed.
        """
        if shutil.which("dpkg-query") is None:
            # On other systems the packages have other names. The benchmark finds out later whether the programs exist.
            return
        missing = [package for package in packages if not self._installed(package)]
        if not missing:
            return
        names = " ".join(missing)
        if not self._allowed:
            raise Unavailable(f"the Debian packages {names} are not installed (--no-install)")
        if os.geteuid():
            raise Unavailable(f"the Debian packages {names} are not installed, and installing them takes root")
        quiet = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
        environment = {"DEBIAN_FRONTEND": "noninteractive"}
        if not self._lists_are_fresh:
            run([*quiet, "update"], environment=environment)
            self._lists_are_fresh = True
        run([*quiet, "install", "-y", "--no-install-recommends", *missing], environment=environment)

    @staticmethod
    def _installed(package: str) -> bool:
        try:
            return run(["dpkg-query", "-W", "-f", "${db:Status-Status}", package]) == "installed"
        except Unavailable:
            return False


def compile_load(installer: Installer) -> Path:
    """Compile the load generator and return its path."""
    installer.need("gcc", "libc6-dev")
    return compiled(HERE / "load.c", "load", lambda output: ["gcc", "-O2", "-Wall", "-o", output, HERE / "load.c"])


def compiled(source: Path, name: str, command: Compile) -> Path:
    """Return the program that is compiled from the source. Compile it if the source or the command has changed.

    Args:
        source: the source file.
        name: the name of the program.
        command: returns the command that compiles it, for the path of the program.
    """
    manner = " ".join(str(word) for word in command(BUILD / name))
    program = BUILD / f"{name}-{zlib.crc32(manner.encode()):08x}"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        # If the compiler is interrupted, it must not leave an incomplete program under the final name.
        unfinished = program.with_suffix(".unfinished")
        run(command(unfinished))
        unfinished.replace(program)
    return program
