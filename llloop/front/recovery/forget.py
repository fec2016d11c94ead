"""FORGET and BATCH_FORGET requests. The kernel never sends them again, so the next front finishes them.

The request stays in its slot until it is finished, so it survives the front. A BATCH_FORGET can contain 65,000 inodes.
It is served in portions, from its end, with other requests in between. After each portion, the request in the slot is
shortened. The journal notes the progress within a portion.
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

# The number of inodes in a portion, which takes about a millisecond. The kernel sends up to 16 FORGET requests before
# it sends others.
PORTION = 256

# The note in the journal, from the lowest bits: the inode's lookup count before, the index of its entry in the request,
# and the request's slot + 1.
_LOOKUPS_BITS, _PLACE_BITS = 34, 18
_LOOKUPS_MASK = (1 << _LOOKUPS_BITS) - 1

ENTRY_COUNT = Struct("=I")  # the number of entries, after the header of a BATCH_FORGET


class Forgetting:
    """Serves FORGET and BATCH_FORGET.

    Attributes:
        unfinished: the unfinished requests: the offset of each in the memory of the slots, and its length in bytes.

    Args:
        router: must not wait for the kernel while requests are unfinished.
        journal: notes the progress for the next front.
        tree: drops the inodes.
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
            OSError: EINVAL, if it contains fewer entries than its header says.
        """
        base, length = request.base, request.received
        if OPCODE.unpack_from(self._memory, base)[1] == Opcode.BATCH_FORGET:
            (count,) = BATCH_FORGET_REQUEST.unpack_from(self._memory, base)
            if BATCH_FORGET_REQUEST.size + count * FORGET_ONE.size > length:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if not self._serve(base, length):
            request.slot = self._slots.free_slot()

    def _serve(self, base: int, length: int) -> bool:
        """Serve the request at *base*, or only a portion of it if there are enough free slots.

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
                # One store, which also invalidates the note.
                ENTRY_COUNT.pack_into(memory, base + IN_HEADER_SIZE, left)
                count = left
                if count and bytes(self._slots.states).count(0) > self._slots.count // 2:
                    self._slots.hold(self._slots.slot_of(base))
                    self.unfinished.append((base, length))
                    self._router.attentive = self._router.backlog = True
                    return False
        OPCODE.pack_into(memory, base, 0, 0)
        self._cells[FORGETTING] = 0
        self._slots.free_if_held(self._slots.slot_of(base))
        return True

    def _forget(self, base: int, entries: list[tuple[int, int]], first: int) -> None:
        """Subtract lookups of inodes, the last entry first.

        Args:
            base: the offset of the request in the memory of the slots.
            entries: nodeid and number of lookups.
            first: the index of the first entry in the request.
        """
        cells = self._cells
        lookups_of = self._tree.inodes.lookups
        forget = self._tree.forget
        slot = self._slots.slot_of(base) + 1 << _PLACE_BITS
        for place in range(first + len(entries) - 1, first - 1, -1):
            nodeid, lookups = entries[place - first]
            cells[FORGETTING] = (slot | place) << _LOOKUPS_BITS | lookups_of(nodeid) & _LOOKUPS_MASK
            forget(nodeid, lookups)

    def finish(self) -> None:
        """Finish the requests that a dead front has left, before anything else is received."""
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
        self._cells[FORGETTING] = 0  # if the front died between finishing a request and clearing the note

    def _restore(self, base: int, place: int, lookups: int) -> None:
        """Restore the lookup count of the entry that a dead front was serving, so that it can be served again."""
        memory = self._memory
        if OPCODE.unpack_from(memory, base)[1] == Opcode.FORGET:
            self._tree.inodes.restore_lookups(FORGET_REQUEST.unpack_from(memory, base)[0], lookups)
        elif place < BATCH_FORGET_REQUEST.unpack_from(memory, base)[0]:
            nodeid, _ = FORGET_ONE.unpack_from(memory, base + BATCH_FORGET_REQUEST.size + place * FORGET_ONE.size)
            self._tree.inodes.restore_lookups(nodeid, lookups)
            ENTRY_COUNT.pack_into(memory, base + IN_HEADER_SIZE, place + 1)
