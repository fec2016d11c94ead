"""What happened in the source, as the watcher hears it."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Operation(IntEnum):
    """What was done. One event stands for one operation."""

    CREATE = 0
    MODIFY = 1
    ATTRIB = 2
    CLOSE_WRITE = 3
    MOVED = 4
    DELETE = 5


class Event(NamedTuple):
    """One operation on one object.

    Attributes:
        operation: what was done.
        is_dir: whether the object is a directory.
        device: st_dev of its file system, as in `llloop.linux.syscalls.Attributes`.
        directory: st_ino of the directory that holds the name; 0 if the kernel does not say.
        name: the name in it; empty if the kernel does not say, or if the object is that directory itself.
        new_directory, new_name: the new place for `Operation.MOVED`, else 0 and empty.
        number: st_ino of the object; 0 if unknown.
        pid: the process that did it, 0 if it is outside of the server's PID namespace.
    """

    operation: Operation
    is_dir: bool
    device: int
    directory: int
    name: bytes
    new_directory: int
    new_name: bytes
    number: int
    pid: int
