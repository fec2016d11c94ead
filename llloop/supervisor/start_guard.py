"""A process that detaches what a server leaves behind that is killed while it starts.

Later the keeper does this. But the keeper must inherit the mount's connection, so it cannot be there before the mount.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from setproctitle import setproctitle

from llloop.errors import LlloopError
from llloop.linux import mount_identity
from llloop.linux.stdio import redirect_standard_descriptors
from llloop.supervisor.child import STOP_SIGNALS, fork

# fusermount may outlive who has called it, and mount after that: how long to look, in seconds, and how often.
_PATIENCE = 2.0
_PAUSE = 0.02


class StartGuard:
    """A guard at work, from before the mount is made.

    Args:
        mountpoint: where the mount is to be made, an absolute path without symlinks. Nothing dead is there now.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self, mountpoint: str) -> None:
        self._dismissed = False
        reader, self._writer = os.pipe2(os.O_CLOEXEC)
        self._process = fork.Process(
            target=_guard, args=(mountpoint, reader, self._writer), name="llloop-start-guard", daemon=True
        )
        try:
            self._process.start()
        except BaseException:
            os.close(self._writer)
            raise
        finally:
            os.close(reader)

    def dismiss(self) -> None:
        """End it, if that was not done before: it is not needed any more."""
        if self._dismissed:
            return
        self._dismissed = True
        with suppress(BrokenPipeError):  # it was killed
            os.write(self._writer, b"!")
        os.close(self._writer)
        self._process.join()
        self._process.close()


def _guard(mountpoint: str, reader: int, writer: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.close(writer)
    setproctitle("llloop-start-guard")
    redirect_standard_descriptors()
    if os.read(reader, 1):
        os._exit(0)
    # Also those that have inherited the other end have ended: nobody serves what is there.
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            if mount_identity.detach_if_dead(mountpoint):
                break
        except (OSError, LlloopError):
            pass
        time.sleep(_PAUSE)
    os._exit(0)
