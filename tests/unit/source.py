"""A source directory and all that serves it, but for the kernel and the workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llloop import wire
from llloop.arena import Arena
from llloop.config import ServeConfig
from llloop.front.mirror import Mirror, build_mirror
from llloop.front.requester import Requester
from llloop.ledger import Ledger
from llloop.negotiation import Capabilities, Feature
from tests.unit.support import ClosedAtOnce, close_ledger

MYSELF = Requester(os.geteuid(), os.getegid(), 0o022)


class Source:
    """A source and what serves it, but for the kernel."""

    def __init__(self, path: Path, pipes: list[tuple[int, int]], **options: Any) -> None:
        self.path = path
        self.readers = [reader for reader, _ in pipes]
        self.root = os.open(path, os.O_PATH | os.O_DIRECTORY)
        config = ServeConfig(source=str(path), mountpoint="/nowhere", workers=len(pipes), **options)
        self.ledger = Ledger(1 << 16)
        arena = Arena(4, 8 * wire.PAGE_SIZE, len(pipes))
        capabilities = Capabilities(38, Feature.SETXATTR_EXT)
        writers = [writer for _, writer in pipes]
        # No device: nothing is registered with the kernel, since passthrough is not among the capabilities.
        self.mirror: Mirror = build_mirror(config, capabilities, arena, self.ledger, writers, self.root, -1)
        self.tree = self.mirror.tree
        self.files = self.mirror.files
        # Nobody takes up here what a loop does when it has answered.
        self.tree.anchors._closing = self.tree.anchors.pins._closing = self.files._closing = ClosedAtOnce()

    def close(self) -> None:
        for number in list(self.mirror.handles._table):
            self.files.release(number)
        self.tree.anchors.shrink()
        for nodeid in list(self.tree.anchors.pins._table):
            self.tree.anchors.drop(nodeid)
        os.close(self.root)
        close_ledger(self.ledger)
