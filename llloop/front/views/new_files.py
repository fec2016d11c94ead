"""The modes of new files (`--create-mode`), and new files without set-ID bits."""

from __future__ import annotations

import stat
from typing import Any

from llloop.front.opening import Files
from llloop.front.requester import Requester
from llloop.linux.credentials import SETID_BITS
from llloop.linux.syscalls import Attributes
from llloop.mode_changes import ModeChange


class NewModes:
    """Decides the mode of a new file.

    Args:
        change: the change of the permissions that remain after the umask, or None.
        keeps_setid: whether a new file may have set-ID bits. It must not if it may belong to somebody else.
    """

    def __init__(self, change: ModeChange | None, *, keeps_setid: bool) -> None:
        self._change = change
        self._keeps_setid = keeps_setid

    def of(self, mode: int, who: Requester) -> tuple[int, Requester]:
        """Return the mode of a new file with the requested *mode*, and the requester with the umask that remains."""
        if not self._keeps_setid and not stat.S_ISDIR(mode):
            mode &= ~SETID_BITS
        if self._change is None:
            return mode, who
        return self._change.applied(mode & ~who.umask), who._replace(umask=0)


class FilesWithNewModes(Files):
    """See `Files`; *modes* decides the modes of new files."""

    def __init__(self, *arguments: Any, modes: NewModes) -> None:
        super().__init__(*arguments)
        self._modes = modes

    def create(self, parent: int, name: bytes, mode: int, flags: int, who: Requester) -> tuple[int, int, Attributes]:
        """See `Files.create`."""
        mode, who = self._modes.of(mode, who)
        return super().create(parent, name, mode, flags, who)

    def tmpfile(self, parent: int, mode: int, flags: int, who: Requester) -> tuple[int, int, Attributes]:
        """See `Files.tmpfile`."""
        mode, who = self._modes.of(mode, who)
        return super().tmpfile(parent, mode, flags, who)
