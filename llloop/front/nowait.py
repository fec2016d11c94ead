"""Which reads and writes the front may do itself, because they cannot keep it waiting."""

from __future__ import annotations

import os

from llloop.front.open_files import Handle
from llloop.linux.syscalls import RAM_FILE_SYSTEMS, Attributes, file_system_type

# Up to these sizes in bytes a transfer in place costs less than waking a worker for it (`scripts/bench front`).
READ_LIMIT = 64 * 1024
WRITE_LIMIT = 32 * 1024
# While nobody else's request is under way, there is nobody whom a larger write in place keeps waiting.
LONE_WRITE_LIMIT = 128 * 1024


class Promptness:
    """Decides, mount by mount, how the front may try.

    On a file system that lives in memory nothing blocks. Elsewhere RWF_NOWAIT (preadv2(2)) makes a call fail
    rather than wait for a disk; a file system that does not know it is remembered.
    """

    def __init__(self) -> None:
        self._read_flags: dict[int, int | None] = {}
        self._write_flags: dict[int, int | None] = {}

    def decide(self, handle: Handle, attributes: Attributes, flags: int) -> None:
        """Note in a new *handle* what the front may try.

        Args:
            handle: the open file.
            attributes: its attributes.
            flags: the flags it was opened with.
        """
        mount = attributes.mount or attributes.device
        if mount not in self._read_flags:
            in_ram = file_system_type(handle.descriptor) in RAM_FILE_SYSTEMS
            self._read_flags[mount] = self._write_flags[mount] = 0 if in_ram else os.RWF_NOWAIT
        handle.mount = mount
        if handle.unsized:
            return
        read_flags = self._read_flags[mount]
        # Direct I/O and synchronous writes wait for a disk by their nature, if there is one.
        if read_flags == 0 or not flags & os.O_DIRECT:
            handle.read_flags = read_flags
            if read_flags == 0 or not flags & os.O_DSYNC:
                handle.write_flags = self._write_flags[mount]

    def refuse_reads(self, handle: Handle) -> None:
        """Note that the file system of *handle* knows no RWF_NOWAIT for reads."""
        handle.read_flags = self._read_flags[handle.mount] = None

    def refuse_writes(self, handle: Handle) -> None:
        """Note that the file system of *handle* knows no RWF_NOWAIT for writes."""
        handle.write_flags = self._write_flags[handle.mount] = None
