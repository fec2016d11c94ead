"""Exact expectations of system calls, and comparisons with the source's file system."""

from __future__ import annotations

import errno as errno_module
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def fails(*errnos: int) -> Iterator[None]:
    """The block must raise an OSError with one of these errnos."""
    wanted = " or ".join(errno_module.errorcode[number] for number in errnos)
    try:
        yield
    except OSError as error:
        assert error.errno in errnos, f"{wanted} expected, got {error!r}"
    else:
        raise AssertionError(f"{wanted} expected, but it succeeded")


def outcome(action: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Returns the result of a call, or the name of its errno, for comparisons."""
    try:
        return action(*arguments, **options)
    except OSError as error:
        return errno_module.errorcode.get(error.errno or 0, error.errno)


STAT_FIELDS = (
    "st_mode",
    "st_nlink",
    "st_uid",
    "st_gid",
    "st_rdev",
    "st_size",
    "st_blocks",
    "st_blksize",
    "st_atime_ns",
    "st_mtime_ns",
    "st_ctime_ns",
)


def fields_of(status: os.stat_result) -> dict[str, int]:
    return {name: getattr(status, name) for name in STAT_FIELDS}


# Whether the kernel collects writes (--writeback). Then it keeps the times of a file itself. The times in the source
# are those of the arrival of the data. The kernel also does not request the number of blocks that the data occupies.
collecting = False
_COLLECTED_NS = 2_000_000_000


def agree(name: str, mounted: int, native: int) -> bool:
    """Whether the mount may show this value of a field if the source has that one."""
    if collecting and name.endswith("time_ns"):
        return abs(mounted - native) < _COLLECTED_NS
    return mounted == native or (collecting and name == "st_blocks")


def same_fields(mounted: os.stat_result, native: os.stat_result) -> None:
    """Checks that two stat results are equal; times may differ if the kernel caches them."""
    here, there = fields_of(mounted), fields_of(native)
    differing = {name: (here[name], there[name]) for name in STAT_FIELDS if not agree(name, here[name], there[name])}
    assert not differing, differing


def same_status(mnt: Path, src: Path) -> None:
    """Both sides must show the same attributes of a file.

    To be asked before the file is read in the source: that moves its access time behind the mount's back.
    """
    same_fields(os.lstat(mnt), os.lstat(src))


def pattern(size: int, seed: int = 0) -> bytes:
    """Returns bytes in which all pages differ, so that a misplaced page is detected."""
    words = ((seed * 0x9E3779B1 + index) & 0xFFFFFFFFFFFFFFFF for index in range((size + 7) // 8))
    return b"".join(word.to_bytes(8, "little") for word in words)[:size]


def python(
    script: str, *arguments: str | Path, timeout: float = 30, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a script in another process and checks that it succeeds."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, **options
    )
    assert done.returncode == 0, f"the script ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def start_python(script: str, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Starts a script in another process, with pipes to its stdin and stdout."""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )
