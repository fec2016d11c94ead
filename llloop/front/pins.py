"""Removed files that the kernel still knows, each kept by an O_PATH descriptor until the kernel forgets it.

A pin counts as its file's owner's. Whoever has used up his share of descriptors loses his oldest pins. Such a file is
reached through an open file of it; where it is not open, calls on an O_PATH descriptor of it fail with ESTALE.
"""

from __future__ import annotations

import fcntl
import os
from collections import OrderedDict
from collections.abc import Container, Iterable

from llloop.front.descriptor_shares import Shares
from llloop.front.inodes import Inodes
from llloop.linux.syscalls import fstatx
from llloop.shared.leadership import Leadership


class Pins:
    """The descriptors of removed files by inode.

    Args:
        inodes: the inode table, where each is noted for the next front.
        shares: how many descriptors each user may hold.
        leadership: which thread serves.
        closing: takes the descriptors of removed files, which may take long to close.
    """

    def __init__(self, inodes: Inodes, shares: Shares, leadership: Leadership, closing: list[int]) -> None:
        self._leadership = leadership
        self._closing = closing
        self._inodes = inodes
        self._shares = shares
        self._table: dict[int, int] = {}
        # Whose each is, and the inodes of each user's, the oldest first. A dict would pass over all that are gone.
        self._users: dict[int, int] = {}
        self._of_user: dict[int, OrderedDict[int, None]] = {}
        shares.reclaim = self.drop_oldest

    def __len__(self) -> int:
        return len(self._table)

    def get(self, nodeid: int) -> int | None:
        """Return the descriptor of a removed file, or None."""
        return self._table.get(nodeid)

    def descriptors(self) -> Iterable[int]:
        """Return all descriptors."""
        return self._table.values()

    def add(self, nodeid: int, fd: int, uid: int) -> None:
        """Keep *fd*, an O_PATH descriptor of the inode *nodeid*, which belongs to the user *uid*.

        It is closed instead if he holds too many that he needs more.
        """
        old = self._table.get(nodeid)
        if old is not None:
            if old == fd:
                return
            self.drop(nodeid)
        while not self._shares.has_room(uid):
            if not self.drop_oldest(uid):
                self._closing.append(fd)
                return
        self._keep(nodeid, fd, uid)
        self._inodes.note_pin(nodeid, fd)

    def _keep(self, nodeid: int, fd: int, uid: int) -> None:
        self._table[nodeid] = fd
        self._users[nodeid] = uid
        self._of_user.setdefault(uid, OrderedDict())[nodeid] = None
        self._shares.take(uid)

    def take_over(self, pins: dict[int, int], left: set[int]) -> None:
        """Take in the pins of a front that is gone; those whose descriptors are lost are left out.

        Args:
            pins: the descriptors by inode.
            left: the descriptors that the front has left, from which the pins are taken out.
        """
        for nodeid, fd in pins.items():
            is_path = fd in left and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH
            attributes = fstatx(fd) if is_path else None
            if attributes is not None and self._inodes.get(nodeid).is_same(attributes):
                left.discard(fd)
                self._keep(nodeid, fd, attributes.uid)
            else:
                self._inodes.note_pin(nodeid, -1)

    def drop(self, nodeid: int) -> bool:
        """Let go of a removed file; return whether it was pinned."""
        fd = self._take(nodeid)
        if fd is not None:
            self._closing.append(fd)
        return fd is not None

    def _take(self, nodeid: int) -> int | None:
        """Take a removed file out, and return its descriptor, which is the caller's now."""
        fd = self._table.pop(nodeid, None)
        if fd is None:
            return None
        uid = self._users.pop(nodeid)
        mine = self._of_user[uid]
        del mine[nodeid]
        if not mine:
            del self._of_user[uid]
        self._shares.give_back(uid)
        self._inodes.note_pin(nodeid, -1)
        return fd

    def drop_oldest(self, uid: int) -> bool:
        """Let go of that removed file of the user *uid* that was removed first; return whether there was one."""
        mine = self._of_user.get(uid)
        return mine is not None and self.drop(next(iter(mine)))

    def release_unused(self, used: Container[int], needed: int = 0) -> bool:
        """Let go of files that were removed and are not open, so that their space is free.

        The kernel tells a moment after a removal that it has forgotten the inode, sometimes after the next request.

        Args:
            used: the inodes that are open.
            needed: one more inode whose pin stays.

        Returns:
            Whether there were any.
        """
        unused = [nodeid for nodeid in self._table if nodeid not in used and nodeid != needed]
        for nodeid in unused:
            fd = self._take(nodeid)
            if fd is None:  # another thread has closed it during the last call
                continue
            if self._leadership.uses(fd):
                self._closing.append(fd)
            else:
                self._leadership.call(os.close, fd)
        return bool(unused)
