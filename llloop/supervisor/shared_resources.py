"""What the processes of a mount share: memory and pipes, made before the first fork, so that each can be replaced."""

from __future__ import annotations

import fcntl
import logging
import os

from llloop.config import ServeConfig
from llloop.linux import fuse
from llloop.shared import negotiation
from llloop.shared.journal import Journal
from llloop.shared.slots import Slots

_log = logging.getLogger(__name__)

Pipe = tuple[int, int]  # (reader, writer)


class SharedResources:
    """Memory, pipes, and the source's descriptor. Nothing here depends on the mount.

    Args:
        config: the mount's options.
        source: the absolute path of the source.

    Attributes:
        root: an O_PATH descriptor of the source.
        slots: the memory in which requests lie.
        journal: what a front leaves to the next.
        requests: a pipe to each worker.
        wanted: a pipe from each worker to the invalidator.
        ready: the pipe that a front writes to when it serves.
        answers: the pipe from the workers to a front that waits for answers.
        probed: the pipe from the workers that tells the front what they have looked at.

    Raises:
        OSError: there is not enough of something. What was made is let go of.
    """

    def __init__(self, config: ServeConfig, source: str) -> None:
        self._descriptors: list[int] = []
        try:
            self.root = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._descriptors.append(self.root)
            self.slots = Slots(config.slots, negotiation.MAX_WRITE, config.workers)
            self.requests = [self._message_pipe(config.slots) for _ in range(config.workers)]
            self.wanted = [self._message_pipe(config.slots) for _ in range(config.workers)]
            self.ready = self._pipe()
            self.answers = self._pipe(os.O_DIRECT)
            self.probed = self._pipe()
            self.journal = Journal()
        except BaseException:
            self._close_descriptors()
            raise

    def _pipe(self, flags: int = 0) -> Pipe:
        ends = os.pipe2(os.O_CLOEXEC | flags)
        self._descriptors += ends
        return ends

    def _message_pipe(self, messages: int) -> Pipe:
        """Make a pipe in packet mode (pipe(7)) that has room for that many messages, and whose writer never waits."""
        reader, writer = self._pipe(os.O_DIRECT)
        try:
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, messages * fuse.PAGE_SIZE)
        except (
            PermissionError
        ):  # the user's share of pipe pages is used up: fewer messages fit, the front does the rest
            _log.debug("request pipes hold fewer messages than usual; see pipe(7), pipe-user-pages-soft")
        os.set_blocking(writer, False)
        return reader, writer

    def open_payload_pipes(self) -> None:
        """Make the pipes through which large payloads go, for a front that has a loop of its own."""
        self._descriptors += self.slots.open_pipes().descriptors

    def close(self) -> None:
        """Let go of the descriptors and of the journal."""
        if self._descriptors:
            self._close_descriptors()
            self.journal.close()

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
