"""Who makes a request."""

from __future__ import annotations

from typing import NamedTuple

from llloop.front.recovery.intents import NOWHERE, Note


class Requester(NamedTuple):
    """The calling process as the header of its request describes it.

    Attributes:
        uid, gid: its file system ids.
        umask: its umask, where the request creates something.
        pid: the number of the calling thread, 0 if it is outside of the server's PID namespace.
        note: where it is noted what is done for it and must not be done twice.
    """

    uid: int
    gid: int
    umask: int = 0
    pid: int = 0
    note: Note = NOWHERE
