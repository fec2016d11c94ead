"""Decides which reads and writes the front does itself, because they cannot block."""

from __future__ import annotations

import os

from llloop.front.open_files import Handle
from llloop.linux.syscalls import RAM_FILE_SYSTEMS, Attributes, file_system_type

# Up to these sizes in bytes, I/O in the front costs less than waking a worker (`scripts/bench front`).
READ_LIMIT = 64 * 1024
WRITE_LIMIT = 32 * 1024
# The limit while no other request is in progress: a larger write then delays nobody.
LONE_WRITE_LIMIT = 128 * 1024


class NowaitPolicy:
    """Decides for each mount with which flags the front may try I/O.

    On a file system in RAM, I/O never blocks. Elsewhere, RWF_NOWAIT (preadv2(2)) makes a call fail instead of waiting
    for a disk. Some file systems do not support it; this class remembers which.
    """

    def __init__(self) -> None:
        self._read_flags: dict[int, int | None] = {}
        self._write_flags: dict[int, int | None] = {}

    def decide(self, handle: Handle, attributes: Attributes, flags: int) -> None:
        """Note in a new *handle* which I/O the front may try.

        Args:
            handle: the open file.
            attributes: its attributes.
            flags: its open(2) flags.
        """
        mount = attributes.mount or attributes.device
        if mount not in self._read_flags:
            in_ram = file_system_type(handle.descriptor) in RAM_FILE_SYSTEMS
            self._read_flags[mount] = self._write_flags[mount] = 0 if in_ram else os.RWF_NOWAIT
        handle.mount = mount
        if handle.unsized:
            return
        read_flags = self._read_flags[mount]
        # Direct I/O and synchronous writes always wait for a disk, if there is one.
        if read_flags == 0 or not flags & os.O_DIRECT:
            handle.read_flags = read_flags
            if read_flags == 0 or not flags & os.O_DSYNC:
                handle.write_flags = self._write_flags[mount]

    def refuse_reads(self, handle: Handle) -> None:
        """Note that the file system of *handle* does not support RWF_NOWAIT for reads."""
        handle.read_flags = self._read_flags[handle.mount] = None

    def refuse_writes(self, handle: Handle) -> None:
        """Note that the file system of *handle* does not support RWF_NOWAIT for writes."""
        handle.write_flags = self._write_flags[handle.mount] = None
