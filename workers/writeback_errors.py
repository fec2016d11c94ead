"""Errors of writes from the kernel's page cache, for which no program waits.

The kernel reports such an error only once, to the next close(2) or fsync(2) of the file in any process. So llloop
reports it to every close(2) of each file that was open for writing, also of duplicated descriptors. It cannot know
whether the program checks the result of the first close(2) (Python's mmap keeps a duplicate).
"""

from __future__ import annotations

import logging
import os

from llloop.shared.messages import Request

_log = logging.getLogger(__name__)

# The number of inodes whose errors are kept, the latest ones.
_MAX_INODES = 1024


class WritebackErrors:
    """The last write error of each inode.

    An error is identified by the worker's count of failed writes. The count survives the worker, the errors do not.
    """

    def __init__(self) -> None:
        self._errors: dict[tuple[int, int], tuple[int, int]] = {}
        self._told: dict[int, int] = {}

    def note(self, fd: int, number: int, count: int) -> None:
        """Note that a write failed, and log the first failure of each inode.

        Args:
            fd: the file.
            number: the errno.
            count: how many writes have failed, including this one.
        """
        key = _key(fd)
        if self._errors.pop(key, None) is None:
            _log.warning(
                "%s: data from a mapping or from --writeback could not be written and is lost: %s",
                os.readlink(f"/proc/self/fd/{fd}"),
                os.strerror(number),
            )
        self._errors[key] = number, count
        if len(self._errors) > _MAX_INODES:
            del self._errors[next(iter(self._errors))]

    def error_of(self, request: Request, fd: int) -> int:
        """Return the errno with which to answer a FLUSH, 0 if there is no error to report.

        Args:
            request: the FLUSH; its first extra is the count of failed writes when the file was opened.
            fd: the file.
        """
        if not self._errors:
            return 0
        number, count = self._errors.get(_key(fd), (0, 0))
        known = self._told.get(request.handle, request.extra[0] if request.extra else 0)
        return number if count > known else 0

    def note_reported(self, request: Request, fd: int) -> None:
        """Note that fsync(2) has reported the error to this open file. The kernel does so before it sends FSYNC."""
        if self._errors:
            self._told[request.handle] = self._errors.get(_key(fd), (0, 0))[1]

    def release(self, handle: int) -> None:
        """Forget an open file."""
        self._told.pop(handle, None)


def _key(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
