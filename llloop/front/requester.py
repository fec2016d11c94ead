"""The process that makes a request."""

from __future__ import annotations

from typing import NamedTuple

from llloop.front.recovery.intents import NOWHERE, Note


class Requester(NamedTuple):
    """The calling process, from the header of its request.

    Attributes:
        uid, gid: its file system ids.
        umask: its umask, if the request creates an object.
        pid: the id of the calling thread, 0 if it is outside of the server's PID namespace.
        note: notes what is done for the request and must not be done twice.
    """

    uid: int
    gid: int
    umask: int = 0
    pid: int = 0
    note: Note = NOWHERE
