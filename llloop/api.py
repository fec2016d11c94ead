"""The Python API: `mount` serves during a ``with`` block, `serve` serves until the mount has ended."""

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
    """A running mount.

    Attributes:
        source: the absolute path of the source.
        mountpoint: the absolute path of the mount point.
        pid: the process id of the supervisor.
        description: the line that `llloop serve` prints: workers, loop, kernel features.
    """

    source: str
    mountpoint: str
    pid: int
    description: str


def serve(source: str | os.PathLike[str], mountpoint: str | os.PathLike[str], **options: Any) -> int:
    """Mirror *source* at *mountpoint* until somebody unmounts it or this process gets SIGTERM or SIGINT.

    Call this function in the main thread. It forks. While it runs, it handles these signals, SIGHUP, SIGUSR1, SIGUSR2
    and SIGCHLD; afterwards the handlers of the program are in force again. To do other work while the mount is served,
    use `mount`.

    Args:
        source: the directory to mirror.
        mountpoint: the mount point, a directory.
        **options: the fields of `llloop.config.ServeConfig`, e.g. ``workers=8``.

    Returns:
        0 after a clean stop, 1 if the mount ended otherwise.

    Raises:
        LlloopError: mounting failed; the subclasses say why.
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
    """Mirror *source* at *mountpoint* during a ``with`` block.

    Separate processes serve the mount. The program may have threads and may fork; a fork that leaves the block does not
    end the mount. The mount ends at the end of the block, or when the process that made it dies.

    After the block, nothing is mounted. If programs still use the mount, it is detached in spite of this, and these
    programs may continue for some seconds. Data that the kernel cannot write back to the source within 30 seconds is
    lost.

    Args:
        source: the directory to mirror.
        mountpoint: the mount point, a directory.
        log_level: messages of this level and above go to the standard error of this program.
        **options: the fields of `llloop.config.ServeConfig`, e.g. ``workers=8`` or ``read_only=True``.

    Raises:
        LlloopError: mounting failed; the subclasses say why. Also raised if the mount did not end cleanly.
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
