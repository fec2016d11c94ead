"""The share of the front's descriptors for each user, so that no user can take all of them.

Open files, open directories and removed files that are still referenced need descriptors, whose number is limited. A
user may hold as many descriptors as are free. So the first user can have half of all, the second a quarter, and some
are always free.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection

# Root and the user who runs the server may hold so many times as many descriptors as are free.
_PRIVILEGED = 8
# This fraction of all descriptors (1/64) is reserved for them.
_RESERVE = 64
# The weight of directories: listing still works when the user's share for files is used up.
DIRECTORY_WEIGHT = 4


def _nothing(uid: int) -> bool:
    """Report that nothing can be reclaimed."""
    return False


class Shares:
    """Counts descriptors by user.

    Args:
        capacity: the maximum number of descriptors of all users together.
        privileged: the ids of users who may hold more than others.

    Attributes:
        reclaim: closes a descriptor that a user does not need; returns whether there was one.
    """

    def __init__(self, capacity: int, privileged: Collection[int] = (0,)) -> None:
        self._free = capacity
        self._reserve = capacity // _RESERVE
        self._privileged = frozenset(privileged)
        self._held: dict[int, int] = {}
        self.reclaim: Callable[[int], bool] = _nothing

    def held(self, uid: int) -> int:
        """Return the number of descriptors of the user *uid*."""
        return self._held.get(uid, 0)

    def has_room(self, uid: int, weight: int = 1) -> bool:
        """Return whether the user *uid* may hold another descriptor; *weight* multiplies the share."""
        if uid in self._privileged:
            return self._held.get(uid, 0) < self._free * weight * _PRIVILEGED
        return self._held.get(uid, 0) < (self._free - self._reserve) * weight

    def ensure_room(self, uid: int, weight: int = 1) -> None:
        """Check that the user *uid* may hold another descriptor; reclaim descriptors of the user if necessary.

        Raises:
            OSError: EMFILE, if the share is used up and nothing can be reclaimed.
        """
        while not self.has_room(uid, weight):
            if not self.reclaim(uid):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def take(self, uid: int) -> None:
        """Count another descriptor of the user *uid*."""
        self._free -= 1
        self._held[uid] = self._held.get(uid, 0) + 1

    def give_back(self, uid: int) -> None:
        """Count one descriptor of the user *uid* less."""
        self._free += 1
        left = self._held[uid] - 1
        if left:
            self._held[uid] = left
        else:
            del self._held[uid]
