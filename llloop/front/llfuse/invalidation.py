"""Telling the kernel to drop pages it has cached, where llfuse runs the loop and keeps them at every open."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import suppress

from llloop.shared.notifications import drop_pages

# The kernel waits for pages that are being read, whose READ this very loop may have to answer: so it is not waited
# for longer than this, in seconds. Pages that are read at the same time as the open are as new as the open is.
_PATIENCE = 0.1


class Invalidator:
    """Writes notifications from a thread of its own, for the kernel may hold the writer until a READ is answered.

    Args:
        device: the descriptor of /dev/fuse.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, "invalidation")

    def drop_pages(self, nodeid: int) -> None:
        """Have the kernel drop all cached pages of an inode; mostly it has done so on return."""
        with suppress(TimeoutError):
            self._thread.submit(drop_pages, self._device, nodeid).result(_PATIENCE)
