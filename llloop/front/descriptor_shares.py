"""A share of the front's descriptors for each user: one who uses up his own leaves enough for all others.

Open files, open directories and removed files that somebody still refers to take descriptors, and a process may have
only so many. A user may hold as many of them as are left for everybody else. So the first can have half of all, the
second a quarter, and there are always some left.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection

# Root, and whoever runs the server, may hold so many times as much as is left.
_PRIVILEGED = 8
# So much of all is left to them alone, as a divisor.
_RESERVE = 64
# Open directories may go so many times beyond the share: listing goes on when files can no longer be opened.
DIRECTORY = 4


def _nothing(uid: int) -> bool:
    """There is nothing to take back."""
    return False


class Shares:
    """Counts descriptors by user.

    Args:
        capacity: how many descriptors all users together may hold.
        privileged: the users who may hold more than others.

    Attributes:
        reclaim: takes back a descriptor that a user can do without; returns whether there was one.
    """

    def __init__(self, capacity: int, privileged: Collection[int] = (0,)) -> None:
        self._free = capacity
        self._reserve = capacity // _RESERVE
        self._privileged = frozenset(privileged)
        self._held: dict[int, int] = {}
        self.reclaim: Callable[[int], bool] = _nothing

    def held(self, uid: int) -> int:
        """Return how many descriptors the user *uid* holds."""
        return self._held.get(uid, 0)

    def has_room(self, uid: int, weight: int = 1) -> bool:
        """Whether the user *uid* may hold one more; *weight* stretches his share."""
        if uid in self._privileged:
            return self._held.get(uid, 0) < self._free * weight * _PRIVILEGED
        return self._held.get(uid, 0) < (self._free - self._reserve) * weight

    def ensure_room(self, uid: int, weight: int = 1) -> None:
        """Refuse one more descriptor to a user who has used up his share, if there is nothing to take back from him.

        Raises:
            OSError: EMFILE.
        """
        while not self.has_room(uid, weight):
            if not self.reclaim(uid):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def take(self, uid: int) -> None:
        """Count one more descriptor of the user *uid*."""
        self._free -= 1
        self._held[uid] = self._held.get(uid, 0) + 1

    def give_back(self, uid: int) -> None:
        """Count one less."""
        self._free += 1
        left = self._held[uid] - 1
        if left:
            self._held[uid] = left
        else:
            del self._held[uid]
