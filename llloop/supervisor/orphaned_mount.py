"""Removal of the mount after the supervisor has been killed.

A FUSE mount without a server stays mounted, and each access fails with "Transport endpoint is not connected". Normally
the supervisor unmounts before it ends. If it is killed, the descriptor keeper detaches the mount. The kernel kills the
front and the workers with their parent (prctl(2), PR_SET_PDEATHSIG).
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

# fusectl: one directory for each connection, named after the minor number of the mount's device.
CONNECTIONS = Path("/sys/fs/fuse/connections")


def detach_dead_mount(mount: MountIdentity, device: int) -> bool:
    """Detach the mount of a dead supervisor, if it still exists.

    This never waits for the mount. Waiting requests first get an error (ECONNABORTED, or ENOTCONN when the last process
    has closed /dev/fuse). Then the mount is detached even if it is in use. Errors are logged directly to the log's
    destination, because the process that collected log records is dead.

    Args:
        mount: the mount; another one at the same path is not touched.
        device: this process's descriptor of /dev/fuse, which keeps the connection alive. It is closed here.

    Returns:
        Whether the mount existed and was detached.
    """
    log.stop_collecting()
    is_reachable = mount.is_reachable(device)
    os.close(device)
    if not is_reachable:
        return False
    # A worker that hangs in a dead source cannot be killed and would keep the connection alive, and requests waiting.
    with suppress(OSError):  # some containers do not mount fusectl
        (CONNECTIONS / str(mount.device[1]) / "abort").write_text("1")
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
