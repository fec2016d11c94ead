"""What is left to do when the supervisor has died: the mount it leaves behind is taken away.

A FUSE mount whose server is gone stays where it is and answers "Transport endpoint is not connected" to everybody.
The supervisor's own end normally prevents that; a supervisor that was killed has none. So the keeper, which
outlives it, detaches the mount. The front and the workers end by themselves, for the kernel kills them with their
parent (prctl(2), PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

from llloop.errors import LlloopError
from llloop.linux.mount_identity import MountIdentity
from llloop.logging import setup as log

_log = logging.getLogger(__name__)

# fusectl: one directory for each living connection, named after the minor number of the mount's device.
_CONNECTIONS = Path("/sys/fs/fuse/connections")


def detach_dead_mount(mount: MountIdentity, device: int) -> bool:
    """Detach a mount whose supervisor is dead, if it is still there.

    It never waits for the mount: who waits for an answer gets an error first (ECONNABORTED, or ENOTCONN when the
    last of the processes has let go of /dev/fuse), and the mount leaves the tree even if it is in use. What goes wrong
    is logged, straight to the log's own place: the process that gathered records is dead.

    Args:
        mount: the mount; another one in its place is left alone.
        device: this process's descriptor of /dev/fuse, which keeps the connection alive and is closed here.

    Returns:
        Whether there was something to detach, and it was detached.
    """
    log.stop_collecting()
    is_reachable = mount.is_reachable(device)
    os.close(device)
    if not is_reachable:
        return False
    # A worker that hangs in a dead source cannot be killed and would keep the connection, and all who wait, alive.
    with suppress(OSError):  # not mounted in every container
        (_CONNECTIONS / str(mount.device[1]) / "abort").write_text("1")
    try:
        mount.unmount(lazy=True)
    except (OSError, LlloopError) as error:
        _log.error("the supervisor has died, and the keeper could not detach %s: %s", mount.mountpoint, error)
        return False
    _log.error(
        "the supervisor has died; the keeper has detached %s, and files that are open there give errors",
        mount.mountpoint,
    )
    return True
