"""Which inodes the kernel knows, and by which nodeids, for a process that is not the front."""

from __future__ import annotations

from llloop.shared.table import Table
from llloop.shared.watch_state import NUMBER_MASK, WatchState


class Known:
    """Answers from memory that all processes share.

    Args:
        state: counts the inodes that the kernel knows.
        table: the inode table.
    """

    def __init__(self, state: WatchState, table: Table) -> None:
        self._known = state.known
        self._table = table

    def nodeids(self, device: int, number: int) -> tuple[int, ...]:
        """Return the nodeids by which the kernel knows an inode; there is one for each mount below the source.

        Args:
            device: st_dev, as in `Attributes.device`.
            number: st_ino.
        """
        return tuple(self._table.nodeids_of(number, device)) if self._known[number & NUMBER_MASK] else ()

    def all(self) -> list[int]:
        """Return the nodeids of all inodes that the kernel knows."""
        return list(self._table)

    def names(self) -> list[tuple[int, bytes]]:
        """Return the known names of all inodes, as (nodeid of the directory, name)."""
        return self._table.all_names()
