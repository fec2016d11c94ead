"""The front's part of `--watch` with inotify: it watches the directories that the kernel knows.

The front adds a watch when it tells the kernel of a directory, and removes it when the kernel forgets the directory.
What may stay in the kernel's cache for long:

* a name in a watched directory, and that a name is missing there;
* the attributes of a watched directory. The front reads them once more after it has added the watch. If they have
  changed, only the next reply may stay for long;
* the attributes and pages of a file with one link, if its directory is watched and the name is noted in `Watches`. A
  change through another link is reported to the other link's directory only.

All else gets the timeouts of a mount without `--watch`. The directory is watched before the request that reads what is
in it, since the kernel must know the directory. The name is noted after the attributes are read, like an inode that is
counted, so the clock shows changes in between (`llloop.front.heard`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

from llloop.front.cache_policy import Validity
from llloop.front.heard import Heard
from llloop.front.inodes import ROOT
from llloop.linux.syscalls import Attributes, fstatx
from llloop.shared.watches import Watches


class HeardByDirectory(Heard):
    """Decides which timeouts a reply gets; for the other arguments see `Heard`.

    Args:
        watches: the inotify watches.
        root_fd: an O_PATH descriptor of the source.
        open_name: returns a new O_PATH descriptor of an inode if a name in a directory leads to it, else None.
    """

    def __init__(
        self,
        watches: Watches,
        root_fd: int,
        open_name: Callable[[int, int, bytes], int | None],
        *arguments: Any,
    ) -> None:
        super().__init__(*arguments)
        self._watches = watches
        self._open_name = open_name
        (entry_s, _, entry_ns, _), (_, attr_s, _, attr_ns) = self._long.both, self._short.both
        # For names that are heard, with attributes that are not.
        self.only_entry = self._long._replace(both=(entry_s, attr_s, entry_ns, attr_ns))
        watches.add(ROOT, root_fd)

    def of_entry(self, nodeid: int, attributes: Attributes) -> Validity:
        """Return the timeouts for a reply that tells the kernel of an inode; watch it if it is a directory."""
        if not self._inodes.lookups(nodeid):
            self._state.count_known(attributes.ino)
        if not self.is_heard(attributes.device):
            return self._short
        inode = self._inodes.get(nodeid)
        is_directory = stat.S_ISDIR(attributes.mode)
        is_heard = self._watch(nodeid, inode.parent, inode.name, attributes) if is_directory else attributes.nlink == 1
        watches = self._watches
        if not inode.parent or not watches.is_watched(inode.parent):
            return self._short
        is_noted = watches.note_name(inode.parent, inode.name, nodeid)
        if not self._is_undisturbed():
            return self._short
        return self._long if is_heard and is_noted else self.only_entry

    def _watch(self, nodeid: int, parent: int, name: bytes, attributes: Attributes) -> bool:
        """Watch a directory; return whether *attributes* are what it has had since it is watched."""
        watches = self._watches
        if watches.is_watched(nodeid):
            return True
        fd = None if watches.is_full else self._open_name(nodeid, parent, name)
        if fd is None:
            watches.miss(nodeid)
            return False
        try:
            return watches.add(nodeid, fd) and fstatx(fd) == attributes
        finally:
            os.close(fd)

    def of_attributes(self, nodeid: int, attributes: Attributes) -> Validity:
        """Return the timeouts for attributes of an inode that the kernel knows."""
        if not self.is_heard(attributes.device):
            return self._short
        watches = self._watches
        if stat.S_ISDIR(attributes.mode):
            return self._long if watches.is_watched(nodeid) else self._short
        inode = self._inodes.get(nodeid)
        is_heard = (
            attributes.nlink == 1
            and inode.parent
            and watches.is_watched(inode.parent)
            and watches.has_name(inode.parent, inode.name, nodeid)
        )
        return self._long if is_heard else self._short

    def of_statx(self, nodeid: int) -> Validity:
        """Return the timeouts for a reply to STATX. It does not say how many links there are."""
        return self._long if self._watches.is_watched(nodeid) and self._is_known_to_be_heard(nodeid) else self._short

    def of_missing(self, directory: int) -> Validity:
        """Return the timeouts for the reply that there is no such name in a directory."""
        is_heard = self._watches.is_watched(directory) and self._is_known_to_be_heard(directory)
        return self._long if is_heard and self._is_undisturbed() else self._short

    def _is_known_to_be_heard(self, nodeid: int) -> bool:
        return self.is_heard(self._inodes.get(nodeid).device)

    def forgotten(self, nodeid: int, number: int) -> None:
        """Note that the kernel does not know an inode any more; end its watch."""
        super().forgotten(nodeid, number)
        self._watches.remove(nodeid)
