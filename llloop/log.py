"""Logging of all processes of a mount, gathered by the supervisor through multiprocessing-logging."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path

import multiprocessing_logging

LEVELS = ("debug", "info", "warning", "error")

# Of an answer that the kernel no longer waits for, since the mount was ended while its request was in hand.
_TOO_LATE = f"fuse_reply_* failed with {os.strerror(errno.ENOENT)}"

_FORMAT = "%(asctime)s %(levelname)s %(processName)s: %(message)s"


def configure(level: str, file: Path | None) -> None:
    """Send records of *level* and above to *file*, or to standard error.

    Args:
        level: one of `LEVELS`.
        file: appended to.

    Raises:
        OSError: the file cannot be opened.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr) if file is None else logging.FileHandler(file)
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("llfuse").addFilter(lambda record: not record.getMessage().endswith(_TOO_LATE))


def gather() -> None:
    """Have the records of processes forked from now on written by this one."""
    multiprocessing_logging.install_mp_handler()


def release() -> None:
    """Undo `gather`: write what has been sent and log directly again."""
    multiprocessing_logging.uninstall_mp_handler()
