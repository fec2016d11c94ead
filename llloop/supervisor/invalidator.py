"""The invalidator process, which makes the kernel drop pages on behalf of the workers.

The kernel blocks the process that asks for it until the pages are no longer read or written back (`notifications`). The
workers and the front answer those requests, so they must not ask. A worker sends an order to this process, continues
with other requests, and gets a message when the pages are dropped.
"""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from llloop.linux.credentials import drop_capabilities_except
from llloop.shared import notifications
from llloop.shared.messages import MAX_MESSAGE, Operation, decode_invalidation, encode


@dataclass(frozen=True, slots=True)
class InvalidatorSetup:
    """What the invalidator inherits from the supervisor.

    Attributes:
        device: a descriptor of /dev/fuse.
        wanted: for each worker, the read end of the pipe for its orders.
        pipes: for each worker, the write end of its request pipe.
    """

    device: int
    wanted: Sequence[int]
    pipes: Sequence[int]


def run_invalidator(setup: InvalidatorSetup) -> None:
    """Serve until the file system is unmounted.

    Each worker has its own thread here, so that a worker that hangs only delays its own inodes.
    """
    drop_capabilities_except(0)
    threads = [
        threading.Thread(target=_serve, args=(setup.device, wanted, pipe))
        for wanted, pipe in zip(setup.wanted, setup.pipes, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _serve(device: int, wanted: int, pipe: int) -> None:
    """Carry out the orders of one worker, one after the other."""
    while message := os.read(wanted, MAX_MESSAGE):
        unique, nodeid, offset, length = decode_invalidation(message)
        try:
            notifications.drop_pages(device, nodeid, offset, length)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
        _tell(pipe, encode((Operation.INVALIDATED, 0, -1, -1, -1, 0, 0, 0, 0, 0, (unique,))))


def _tell(pipe: int, message: bytes) -> None:
    while True:
        try:
            os.write(pipe, message)
        except BlockingIOError:
            poll = select.poll()
            poll.register(pipe, select.POLLOUT)
            poll.poll()
        else:
            return
