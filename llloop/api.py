"""llloop inside a Python program: `mount` for a block of code, `serve` for a program that does nothing else."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from llloop import errors
from llloop.config import ServeConfig
from llloop.errors import LlloopError
from llloop.linux import mounts
from llloop.logging import setup as log
from llloop.server_process import ServerProcess
from llloop.supervisor import supervisor
from llloop.supervisor.process_state import ProcessState, keep_ended_children


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount that is served.

    Attributes:
        source: the mirrored directory, absolute.
        mountpoint: where it is mirrored, absolute.
        pid: the process id of the supervisor.
        description: the line `llloop serve` would print: workers, loop, kernel features.
    """

    source: str
    mountpoint: str
    pid: int
    description: str


def serve(source: str | os.PathLike[str], mountpoint: str | os.PathLike[str], **options: Any) -> int:
    """Mirror *source* at *mountpoint* until it is unmounted or this process gets SIGTERM or SIGINT.

    It must be called in the main thread of a program that may fork, and takes over the handling of these
    signals; to go on with other work while the mount is served, use `mount`.

    Args:
        source: the directory to mirror.
        mountpoint: the directory to mirror it at.
        **options: the fields of `llloop.config.ServeConfig`, e.g. ``workers=8``.

    Returns:
        0 after a clean stop, 1 if the mount ended otherwise.

    Raises:
        LlloopError: the mount could not be made; the subclasses say why.
    """
    if threading.current_thread() is not threading.main_thread():
        raise errors.UsageError("llloop.serve() works in the main thread only; llloop.mount() works in any thread")
    config = _config(source, mountpoint, options)
    # The program's own handling of SIGCHLD would take away the children that the supervisor waits for.
    with ProcessState((signal.SIGCHLD,)):
        keep_ended_children()
        return supervisor.serve(config, on_ready=lambda served: None)


@contextmanager
def mount(
    source: str | os.PathLike[str], mountpoint: str | os.PathLike[str], *, log_level: str = "warning", **options: Any
) -> Iterator[Mounted]:
    """Mirror *source* at *mountpoint* for the duration of a ``with`` block.

    The mount is served by processes of its own, so threads and forks of the calling program do not matter: a fork that
    leaves the block ends nothing. The mount ends with the block, and also when the process that made it dies.

    When the block has been left, nothing is mounted any more. If somebody still uses the mount, it is detached from the
    tree all the same, and they may go on for some seconds. What the kernel cannot write back to the source within 30
    seconds is lost.

    Args:
        source: the directory to mirror.
        mountpoint: the directory to mirror it at.
        log_level: the least severe messages that go to this program's standard error.
        **options: the fields of `llloop.config.ServeConfig`, e.g. ``workers=8`` or ``read_only=True``.

    Raises:
        LlloopError: the mount could not be made; the subclasses say why. Also if it did not end cleanly.
    """
    config = _config(source, mountpoint, options)
    if log_level not in log.LEVELS:
        raise errors.UsageError(f"log_level must be one of {', '.join(log.LEVELS)}, not {log_level!r}")
    server = ServerProcess(config, log_level)
    code = 1
    try:
        yield Mounted(server.source, server.mountpoint, server.pid, server.description)
    finally:
        code = server.end()
    if code != 0:
        raise LlloopError(f"the mount at {config.mountpoint} ended with exit code {code}")


def _config(source: str | os.PathLike[str], mountpoint: str | os.PathLike[str], options: dict[str, Any]) -> ServeConfig:
    known = {one.name for one in fields(ServeConfig)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise errors.UsageError(f"unknown option {unknown[0]!r}; there are: {', '.join(sorted(known))}")
    # The server has another working directory.
    places: dict[str, Any] = {
        "source": mounts.absolute(os.fspath(source), errors.SourceError(f"source {source}")),
        "mountpoint": mounts.absolute(os.fspath(mountpoint), errors.MountpointError(f"mount point {mountpoint}")),
    }
    return ServeConfig(**places, **options)
