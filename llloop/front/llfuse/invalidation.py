"""Dropping cached pages with `--loop llfuse`, because llfuse makes the kernel keep them at every open."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import suppress

from llloop.shared.notifications import drop_pages

# The maximum wait for the kernel, in seconds. The kernel waits for pages that are being read, and this loop may have to
# answer that READ. Pages that are read during the open are as new as the open.
_TIMEOUT = 0.1


class Invalidator:
    """Writes notifications in its own thread, because the kernel may block the writer until a READ is answered.

    Args:
        device: a descriptor of /dev/fuse.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, "invalidation")

    def drop_pages(self, nodeid: int) -> None:
        """Make the kernel drop all cached pages of an inode; mostly it has done so on return."""
        with suppress(TimeoutError):
            self._thread.submit(drop_pages, self._device, nodeid).result(_TIMEOUT)
