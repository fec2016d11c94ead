"""Pins: O_PATH descriptors of removed files that the kernel still knows, kept until the kernel forgets them.

A pin counts towards the share of the file's owner. If a user has used up the share, the user's oldest pins are closed.
Such a file can still be reached if it is open. If it is not, calls on O_PATH descriptors of it fail with ESTALE.
"""

from __future__ import annotations

import fcntl
import os
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator

from llloop.front.descriptor_shares import Shares
from llloop.front.inodes import Inodes
from llloop.linux.syscalls import fstatx
from llloop.shared.leadership import Leadership


class Pins:
    """The descriptors of removed files by inode.

    Args:
        inodes: the inode table, which also keeps each pin for the next front.
        shares: limits each user's descriptors.
        leadership: decides which thread serves.
        closing: a list for descriptors to close later, because closing a removed file may take long.
    """

    def __init__(self, inodes: Inodes, shares: Shares, leadership: Leadership, closing: list[int]) -> None:
        self._leadership = leadership
        self._closing = closing
        self._inodes = inodes
        self._shares = shares
        self._table: dict[int, int] = {}
        # The owner of each pin, and each user's pins, the oldest first. An OrderedDict finds its first item in
        # constant time, a dict skips all deleted ones.
        self._users: dict[int, int] = {}
        self._of_user: dict[int, OrderedDict[int, None]] = {}
        shares.reclaim = self.drop_oldest

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[int]:
        return iter(self._table)

    def get(self, nodeid: int) -> int | None:
        """Return the descriptor of a removed file, or None."""
        return self._table.get(nodeid)

    def descriptors(self) -> Iterable[int]:
        """Return all descriptors."""
        return self._table.values()

    def add(self, nodeid: int, fd: int, uid: int) -> None:
        """Pin the inode *nodeid* of the user *uid* with its O_PATH descriptor *fd*.

        If the user's share is used up by other descriptors, *fd* is closed instead.
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
        self._inodes.set_pin(nodeid, fd)

    def _keep(self, nodeid: int, fd: int, uid: int) -> None:
        self._table[nodeid] = fd
        self._users[nodeid] = uid
        self._of_user.setdefault(uid, OrderedDict())[nodeid] = None
        self._shares.take(uid)

    def take_over(self, left: set[int]) -> None:
        """Take over the pins of a dead front, except those whose descriptors are lost.

        Args:
            left: the descriptors that the front has left; the pins are removed from it.
        """
        for nodeid, fd in self._inodes.pins():
            is_path = fd in left and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH
            if is_path and self._inodes.get(nodeid).is_same(attributes := fstatx(fd)):
                left.discard(fd)
                self._keep(nodeid, fd, attributes.uid)
            else:
                self._inodes.set_pin(nodeid, -1)

    def drop(self, nodeid: int) -> bool:
        """Unpin an inode; return whether it was pinned."""
        if nodeid not in self._table:
            return False
        fd = self._take(nodeid)
        if fd is not None:
            self._closing.append(fd)
        return fd is not None

    def _take(self, nodeid: int) -> int | None:
        """Remove a pin and return its descriptor, which the caller must close."""
        fd = self._table.pop(nodeid, None)
        if fd is None:
            return None
        uid = self._users.pop(nodeid)
        mine = self._of_user[uid]
        del mine[nodeid]
        if not mine:
            del self._of_user[uid]
        self._shares.give_back(uid)
        self._inodes.set_pin(nodeid, -1)
        return fd

    def drop_oldest(self, uid: int) -> bool:
        """Unpin the oldest pin of the user *uid*; return whether there was one."""
        mine = self._of_user.get(uid)
        return mine is not None and self.drop(next(iter(mine)))

    def close_where(self, condition: Callable[[int], bool], used: Container[int]) -> None:
        """Unpin removed files whose descriptors meet a condition, except *used* inodes, which are open."""
        for nodeid, fd in list(self._table.items()):
            if nodeid not in used and condition(fd):
                self.drop(nodeid)

    def release_unused(self, used: Container[int], needed: int = 0) -> bool:
        """Unpin removed files that are not open, so that their space becomes free.

        The kernel sends FORGET a moment after a removal, sometimes after the next request.

        Args:
            used: the inodes that are open.
            needed: another inode to keep pinned.

        Returns:
            Whether there were such files.
        """
        unused = [nodeid for nodeid in self._table if nodeid not in used and nodeid != needed]
        for nodeid in unused:
            fd = self._take(nodeid)
            if fd is None:  # another thread has closed it during the last call
                continue
            if self._leadership.is_in_use(fd):
                self._closing.append(fd)
            else:
                self._leadership.call(os.close, fd)
        return bool(unused)
