"""The front's part of `--watch`: what the kernel may cache for long, because the watcher hears of changes.

The watcher ignores events of inodes that the kernel does not know. So the front counts an inode as known before it
tells the kernel of it. But the front has read the attributes before that, and an event may have been ignored in
between. The *clock* shows that: the watcher advances it after it has read events and before it looks at what is known.
The front reads the clock before it reads attributes, and again after it has counted the inode. If the clock has
advanced, the reply gets the timeouts of a mount without `--watch`. (The watcher's membarrier(2) makes both see the
other's stores in order.)
"""

from __future__ import annotations

import stat
from collections.abc import Callable

from llloop.front.cache_policy import Validity
from llloop.front.inodes import Inodes
from llloop.front.request import FuseRequest
from llloop.linux import syscalls
from llloop.linux.syscalls import Attributes
from llloop.shared.leadership import Leadership
from llloop.shared.watch_state import NUMBER_MASK, WatchState

_NEVER = -1  # no time of the clock


class Heard:
    """Decides which timeouts a reply gets.

    Args:
        state: what front and watcher tell each other.
        root: the attributes of the source directory.
        inodes: the inode table.
        leadership: decides which thread serves. While a thread is stalled, two requests are being served, and the clock
            of one of them is not kept.
        long: the timeouts for what is heard.
        short: the timeouts for all else.
    """

    def __init__(
        self,
        state: WatchState,
        root: Attributes,
        inodes: Inodes,
        leadership: Leadership,
        long: Validity,
        short: Validity,
    ) -> None:
        self._state = state
        self._inodes = inodes
        self._leadership = leadership
        self._long = long
        # For an inode with further names, which may just be looked up under another one.
        self.only_entry = long._replace(both=long.only_entry)
        self._short = short
        self._clock = state.clock
        self._begun = _NEVER
        self._generation = _NEVER
        self._devices: frozenset[int] = frozenset()
        self._changes = state.changes
        state.count_known(root.ino)  # the kernel is never told of it
        syscalls.be_synchronised()

    def before(self, handler: Callable[[FuseRequest], None]) -> Callable[[FuseRequest], None]:
        """Return a handler that reads the clock first, for requests that tell the kernel of names."""

        def serve(request: FuseRequest) -> None:
            self._begun = self._clock[0]
            handler(request)

        return serve

    def is_heard(self, device: int) -> bool:
        """Return whether changes of a file system are heard (`Attributes.device`)."""
        generation = self._state.generation
        if generation != self._generation:
            self._devices = self._state.devices()
            self._generation = generation
        return device in self._devices

    def of_entry(self, nodeid: int, attributes: Attributes) -> Validity:
        """Return the timeouts for a reply that tells the kernel of an inode, and count the inode as known."""
        is_new = not self._inodes.lookups(nodeid)
        if is_new:
            self._state.count_known(attributes.ino)
        validity = self.of_attributes(nodeid, attributes)
        if validity is self._short or not self._is_undisturbed():
            return self._short
        if is_new and attributes.nlink > 1 and not stat.S_ISDIR(attributes.mode):
            return self.only_entry
        return validity

    def of_attributes(self, nodeid: int, attributes: Attributes) -> Validity:
        """Return the timeouts for attributes of an inode that the kernel knows."""
        return self._long if self.is_heard(attributes.device) else self._short

    def of_statx(self, nodeid: int) -> Validity:
        """Return the timeouts for a reply to STATX."""
        return self._long if self.is_heard(self._inodes.get(nodeid).device) else self._short

    def of_missing(self, directory: int) -> Validity:
        """Return the timeouts for the reply that there is no such name in a directory."""
        return self.of_statx(directory) if self._is_undisturbed() else self._short

    def _is_undisturbed(self) -> bool:
        """Return whether the watcher has read no events since the request began."""
        return self._begun == self._clock[0] and not self._leadership.stalled

    def forgotten(self, nodeid: int, number: int) -> None:
        """Note that the kernel does not know the inode *nodeid*, of this number (st_ino), any more."""
        self._state.count_forgotten(number)

    def changes_of(self, nodeid: int, attributes: Attributes) -> tuple[int, int] | None:
        """Return what changes whenever others change a file in the source; None if such changes are not heard."""
        if self.of_attributes(nodeid, attributes) is self._short:
            return None
        return self._generation, self._changes[attributes.ino & NUMBER_MASK]
