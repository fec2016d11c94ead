"""The start guard: a process that detaches the mount if the supervisor is killed while it starts.

Later the descriptor keeper does this. But the keeper must inherit the mount's /dev/fuse, so it starts after mounting.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from setproctitle import setproctitle

from llloop.errors import LlloopError
from llloop.linux import mount_identity
from llloop.linux.process import fork
from llloop.linux.stdio import redirect_standard_descriptors
from llloop.supervisor.signals import ignore_signals

# fusermount may outlive the supervisor and mount after its death. How long to check, and how often, in seconds.
_TIMEOUT = 2.0
_PAUSE = 0.02


class StartGuard:
    """The guard process; start it before mounting.

    Args:
        mountpoint: the mount point, an absolute path without symlinks, without a dead mount.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self, mountpoint: str) -> None:
        self._closed = False
        reader, self._writer = os.pipe2(os.O_CLOEXEC)
        try:
            self._process = fork(lambda: _guard(mountpoint, reader, self._writer), "llloop-start-guard")
        except BaseException:
            os.close(self._writer)
            raise
        finally:
            os.close(reader)

    def close(self) -> None:
        """End the guard, because it is not needed any more. Further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        with suppress(BrokenPipeError):  # it was killed
            os.write(self._writer, b"!")
        os.close(self._writer)
        self._process.wait()


def _guard(mountpoint: str, reader: int, writer: int) -> None:
    ignore_signals()
    os.close(writer)
    setproctitle("llloop-start-guard")
    redirect_standard_descriptors()
    if os.read(reader, 1):
        return
    # All processes that inherited the other end have ended, so the mount has no server.
    deadline = time.monotonic() + _TIMEOUT
    while time.monotonic() < deadline:
        try:
            if mount_identity.detach_if_dead(mountpoint):
                break
        except (OSError, LlloopError):
            pass
        time.sleep(_PAUSE)
