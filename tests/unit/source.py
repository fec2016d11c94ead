"""A source directory with all objects that serve it, without the kernel and the workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llloop.config import ServeConfig
from llloop.front.context import Context, build_context
from llloop.front.requester import Requester
from llloop.linux import fuse
from llloop.shared.journal import Journal
from llloop.shared.negotiation import Capabilities, Feature
from llloop.shared.slots import Slots
from llloop.shared.table import Table
from tests.unit.support import ClosedAtOnce, close_journal

MYSELF = Requester(os.geteuid(), os.getegid(), 0o022)


class Source:
    """A source and the objects that serve it."""

    def __init__(self, path: Path, pipes: list[tuple[int, int]], **options: Any) -> None:
        self.path = path
        self.readers = [reader for reader, _ in pipes]
        self.root = os.open(path, os.O_PATH | os.O_DIRECTORY)
        config = ServeConfig(source=str(path), mountpoint="/nowhere", workers=len(pipes), **options)
        self.journal, self.table = Journal(1 << 16), Table(1 << 16)
        slots = Slots(4, 8 * fuse.PAGE_SIZE, len(pipes))
        capabilities = Capabilities(38, Feature.SETXATTR_EXT)
        self.writers = [writer for _, writer in pipes]
        # No device: nothing is registered with the kernel, since passthrough is not among the capabilities.
        # Descriptors are closed at once, because there is no loop that does it after an answer.
        self.context: Context = build_context(
            config, capabilities, slots, self.journal, self.table, self.writers, self.root, -1, ClosedAtOnce()
        )
        self.tree = self.context.tree
        self.files = self.context.files

    def close(self) -> None:
        for number in list(self.context.handles):
            self.files.release(number)
        self.tree.directory_fds.shrink()
        for nodeid in list(self.tree.directory_fds.pins):
            self.tree.directory_fds.drop(nodeid)
        os.close(self.root)
        close_journal(self.journal)
        self.table.close()
