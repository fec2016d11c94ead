"""FORGET requests, which the kernel sends once and never again: what a front has received of one, the next finishes.

The request itself says what is not finished: it lies in its slot, where a process that dies leaves it, until it is
struck out. A BATCH_FORGET can name 65,000 inodes. It is served in portions, from its end, and other requests in
between. After each portion the request is shortened in its slot. How far a portion has come is noted in the journal.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from struct import Struct

from llloop.front.request import FuseRequest
from llloop.front.router import Router
from llloop.front.tree import Tree
from llloop.linux.fuse import BATCH_FORGET_REQUEST, FORGET_ONE, FORGET_REQUEST, IN_HEADER_SIZE, OPCODE, Opcode
from llloop.shared.journal import FORGETTING, Journal

# How many inodes are forgotten at once, which takes about a millisecond. The kernel sends up to 16 such requests before
# it sends others.
PORTION = 256

# The note: how often the kernel had looked the inode up before, the place of its entry in the request, and above the
# slot of the request, the first being 1.
_LOOKUPS_BITS, _PLACE_BITS = 34, 18
_LOOKUPS_MASK = (1 << _LOOKUPS_BITS) - 1
_PLACE_MASK = (1 << _PLACE_BITS) - 1

_COUNT = Struct("=I")  # how many entries follow the header of a BATCH_FORGET


class Forgetting:
    """Does what FORGET and BATCH_FORGET ask for.

    Attributes:
        unfinished: where requests lie of which portions are left, and their lengths in bytes.

    Args:
        router: is told that the loop must not wait for the kernel while requests are unfinished.
        journal: where the next front finds how far this one has come.
        tree: forgets.
    """

    def __init__(self, router: Router, journal: Journal, tree: Tree) -> None:
        self._router = router
        self._slots = router.slots
        self._memory = router.slots.memory
        self._cells = journal.cells
        self._tree = tree
        self.unfinished: deque[tuple[int, int]] = deque()

    def forget(self, request: FuseRequest) -> None:
        """Serve a request, or a portion of it.

        Raises:
            OSError: EINVAL, if it is shorter than it says.
        """
        base, length = request.base, request.received
        if OPCODE.unpack_from(self._memory, base)[1] == Opcode.BATCH_FORGET:
            (count,) = BATCH_FORGET_REQUEST.unpack_from(self._memory, base)
            if BATCH_FORGET_REQUEST.size + count * FORGET_ONE.size > length:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if not self._serve(base, length):
            request.slot = self._slots.free_slot()

    def _serve(self, base: int, length: int) -> bool:
        """Serve a request at *base*, or a portion of it if there are slots enough to keep the rest.

        Returns:
            Whether it is finished.
        """
        memory = self._memory
        if OPCODE.unpack_from(memory, base)[1] == Opcode.FORGET:
            self._forget(base, [FORGET_REQUEST.unpack_from(memory, base)], 0)
        else:
            (count,) = BATCH_FORGET_REQUEST.unpack_from(memory, base)
            start = base + BATCH_FORGET_REQUEST.size
            while count:
                left = max(count - PORTION, 0)
                portion = memory[start + left * FORGET_ONE.size : start + count * FORGET_ONE.size]
                self._forget(base, list(FORGET_ONE.iter_unpack(portion)), left)
                # One store: what is noted does not count from here on.
                _COUNT.pack_into(memory, base + IN_HEADER_SIZE, left)
                count = left
                if count and bytes(self._slots.states).count(0) > self._slots.count // 2:
                    self._slots.hold(self._slots.slot_of(base))
                    self.unfinished.append((base, length))
                    self._router.attentive = self._router.backlog = True
                    return False
        OPCODE.pack_into(memory, base, 0, 0)
        self._cells[FORGETTING] = 0
        self._slots.let_go(self._slots.slot_of(base))
        return True

    def _forget(self, base: int, entries: list[tuple[int, int]], first: int) -> None:
        """Take inodes and how many lookups each is to lose, the last first; *first* is the place of the first."""
        cells = self._cells
        lookups_of = self._tree.inodes.lookups
        forget = self._tree.forget
        slot = self._slots.slot_of(base) + 1 << _PLACE_BITS
        for place in range(first + len(entries) - 1, first - 1, -1):
            nodeid, lookups = entries[place - first]
            cells[FORGETTING] = (slot | place) << _LOOKUPS_BITS | lookups_of(nodeid) & _LOOKUPS_MASK
            forget(nodeid, lookups)

    def finish(self) -> None:
        """Take over what a dead front has left, before anything else is received."""
        note = self._cells[FORGETTING]
        noted, place = divmod(note >> _LOOKUPS_BITS, 1 << _PLACE_BITS)
        for slot, state in enumerate(bytes(self._slots.states)):
            base = self._slots.request_offset(slot)
            length, opcode = OPCODE.unpack_from(self._memory, base)
            if state or opcode not in (Opcode.FORGET, Opcode.BATCH_FORGET):
                continue
            self._slots.complete(slot, length)
            if noted == slot + 1:
                self._restore(base, place, note & _LOOKUPS_MASK)
            self._serve(base, length)
        self._cells[FORGETTING] = 0  # the front died between striking out and this

    def _restore(self, base: int, place: int, lookups: int) -> None:
        """Undo what a dead front has perhaps done of one entry, after which come those before it."""
        memory = self._memory
        if OPCODE.unpack_from(memory, base)[1] == Opcode.FORGET:
            self._tree.inodes.restore_lookups(FORGET_REQUEST.unpack_from(memory, base)[0], lookups)
        elif place < BATCH_FORGET_REQUEST.unpack_from(memory, base)[0]:
            nodeid, _ = FORGET_ONE.unpack_from(memory, base + BATCH_FORGET_REQUEST.size + place * FORGET_ONE.size)
            self._tree.inodes.restore_lookups(nodeid, lookups)
            _COUNT.pack_into(memory, base + IN_HEADER_SIZE, place + 1)
