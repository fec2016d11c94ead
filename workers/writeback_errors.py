"""Errors of writes from the kernel's page cache, for which no program waits.

The kernel tells of such an error once: at the next close(2) or fsync(2) of the file, whoever calls it, and it forgets
the error then. So each file that was open for writing is told by its own close(2), and by that of every copy of its
descriptor, for it cannot be known whether anybody looks at what the first one returns (mmap of Python keeps a copy).
"""

from __future__ import annotations

import logging
import os

from llloop.shared.messages import Request

_log = logging.getLogger(__name__)

# For so many inodes errors are kept, the latest ones.
_MOST = 1024


class WritebackErrors:
    """The last such error of each inode.

    An error is known by how many errors of writes the worker had counted then. The count outlives the worker, the
    errors do not.
    """

    def __init__(self) -> None:
        self._errors: dict[tuple[int, int], tuple[int, int]] = {}
        self._told: dict[int, int] = {}

    def note(self, fd: int, number: int, count: int) -> None:
        """Note that a write failed, and log it if it is the first one of its inode.

        Args:
            fd: the file.
            number: the errno.
            count: how many writes have failed, this one included.
        """
        key = _key(fd)
        if self._errors.pop(key, None) is None:
            _log.warning(
                "%s: data from a mapping or from --writeback could not be written and is lost: %s",
                os.readlink(f"/proc/self/fd/{fd}"),
                os.strerror(number),
            )
        self._errors[key] = number, count
        if len(self._errors) > _MOST:
            del self._errors[next(iter(self._errors))]

    def error_of(self, request: Request, fd: int) -> int:
        """Return the errno that the answer to a FLUSH has to tell, 0 if there is none.

        Args:
            request: the request; its first extra is the count when the file was opened.
            fd: its descriptor.
        """
        if not self._errors:
            return 0
        number, count = self._errors.get(_key(fd), (0, 0))
        known = self._told.get(request.handle, request.extra[0] if request.extra else 0)
        return number if count > known else 0

    def settle(self, request: Request, fd: int) -> None:
        """Note that an open file was told by fsync(2): the kernel tells of errors before it sends FSYNC."""
        if self._errors:
            self._told[request.handle] = self._errors.get(_key(fd), (0, 0))[1]

    def release(self, handle: int) -> None:
        """Forget an open file."""
        self._told.pop(handle, None)


def _key(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
