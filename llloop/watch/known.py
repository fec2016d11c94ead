"""Which inodes the kernel knows, and by which nodeids, for a process that is not the front."""

from __future__ import annotations

from llloop.front.heard import usual_nodeid
from llloop.front.inodes import ROOT
from llloop.linux.syscalls import Attributes
from llloop.shared.journal import Journal
from llloop.shared.watch_state import NUMBER_MASK, WatchState


class Known:
    """Answers from memory that all processes share.

    Args:
        root: the attributes of the source directory.
        state: counts the inodes that the kernel knows.
        journal: the front's records.
    """

    def __init__(self, root: Attributes, state: WatchState, journal: Journal) -> None:
        self._root = root
        self._known = state.known
        self._journal = journal

    def nodeids(self, device: int, number: int) -> tuple[int, ...]:
        """Return the nodeids by which the kernel may know an inode; none if it certainly does not know it.

        Inodes with another nodeid than this keep short timeouts, see `llloop.front.heard`.

        Args:
            device: st_dev, as in `Attributes.device`.
            number: st_ino.
        """
        if not self._known[number & NUMBER_MASK]:
            return ()
        return (usual_nodeid(self._root, device, number),)

    def all(self) -> list[int]:
        """Return the nodeids of all inodes that the kernel knows."""
        return [ROOT, *self._journal.nodeids()]

    def names(self) -> list[tuple[int, bytes]]:
        """Return the latest known name of each inode, as (nodeid of the directory, name)."""
        return self._journal.names()
