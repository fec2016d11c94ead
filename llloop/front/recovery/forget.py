"""FORGET requests, which the kernel sends once and never again: what a front has received of one, the next finishes.

The request itself says that it is not finished: it lies in its slot, where a process that dies leaves it, until
it is struck out. How far it has come is noted in the journal.
"""

from __future__ import annotations

import errno
import os

from llloop.front.tree import Tree
from llloop.linux.fuse import BATCH_FORGET_REQUEST, FORGET_ONE, FORGET_REQUEST, OPCODE, Opcode
from llloop.shared.journal import FORGETTING, Journal
from llloop.shared.slots import Slots

# The note: which entry of the request, the first being 1, and above how often the kernel had looked it up before.
_LOOKUPS_BITS = 48
_LOOKUPS_MASK = (1 << _LOOKUPS_BITS) - 1


class Forgetting:
    """Does what FORGET and BATCH_FORGET ask for.

    Args:
        arena: where requests lie.
        journal: where the next front finds how far this one has come.
        tree: forgets.
    """

    def __init__(self, slots: Slots, journal: Journal, tree: Tree) -> None:
        self._slots = slots
        self._memory = slots.memory
        self._cells = journal.cells
        self._tree = tree

    def forget(self, base: int, length: int) -> None:
        """Serve the request at *base*, *length* bytes long.

        Raises:
            OSError: EINVAL, if it is shorter than it says.
        """
        if OPCODE.unpack_from(self._memory, base)[1] == Opcode.BATCH_FORGET:
            (count,) = BATCH_FORGET_REQUEST.unpack_from(self._memory, base)
            if BATCH_FORGET_REQUEST.size + count * FORGET_ONE.size > length:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._forget(base, 0)

    def _forget(self, base: int, start: int) -> None:
        cells = self._cells
        lookups_of = self._tree.inodes.lookups
        forget = self._tree.forget
        for index, (nodeid, lookups) in enumerate(self._entries(base)[start:], start + 1):
            cells[FORGETTING] = index << _LOOKUPS_BITS | lookups_of(nodeid)
            forget(nodeid, lookups)
        OPCODE.pack_into(self._memory, base, 0, 0)
        cells[FORGETTING] = 0

    def _entries(self, base: int) -> list[tuple[int, int]]:
        """Return what the request at *base* names: inodes, and how many lookups each is to lose."""
        memory = self._memory
        if OPCODE.unpack_from(memory, base)[1] == Opcode.FORGET:
            return [FORGET_REQUEST.unpack_from(memory, base)]
        (count,) = BATCH_FORGET_REQUEST.unpack_from(memory, base)
        start = base + BATCH_FORGET_REQUEST.size
        return list(FORGET_ONE.iter_unpack(memory[start : start + count * FORGET_ONE.size]))

    def finish(self) -> None:
        """Serve what a dead front has left, before anything else is received."""
        note = self._cells[FORGETTING]
        begun = note >> _LOOKUPS_BITS
        for slot, state in enumerate(self._slots.states):
            base = self._slots.request_offset(slot)
            length, opcode = OPCODE.unpack_from(self._memory, base)
            if not state and opcode in (Opcode.FORGET, Opcode.BATCH_FORGET):
                self._slots.complete(slot, length)
                if begun:
                    nodeid, _ = self._entries(base)[begun - 1]
                    self._tree.inodes.restore_lookups(nodeid, note & _LOOKUPS_MASK)
                self._forget(base, max(begun - 1, 0))
        self._cells[FORGETTING] = 0  # the front died between striking out and this
