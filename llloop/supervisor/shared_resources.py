"""The memory and pipes that the processes of a mount share. They are created before the first fork."""

from __future__ import annotations

import fcntl
import logging
import os

from llloop.config import ServeConfig
from llloop.linux import fuse
from llloop.shared import negotiation
from llloop.shared.journal import Journal
from llloop.shared.relay import RelayPipe, RelayState
from llloop.shared.slots import Slots
from llloop.shared.table import Table
from llloop.shared.trace import Trace
from llloop.shared.watch_state import WatchState
from llloop.shared.watches import Watches
from llloop.watch import fanotify

_log = logging.getLogger(__name__)

Pipe = tuple[int, int]  # (reader, writer)


class SharedResources:
    """Shared memory, pipes, and the source's descriptor.

    Args:
        config: the mount's options.
        source: the absolute path of the source.

    Attributes:
        root: an O_PATH descriptor of the source.
        slots: the request slots in shared memory.
        journal, table: the records and the inodes, which survive the front.
        requests: a request pipe to each worker.
        wanted: a pipe from each worker to the invalidator.
        ready: the pipe to which a front writes when it serves.
        awake: the pipe to which a front writes when it wants idle CPUs to be awake.
        answers: the pipe for workers' answers to the front with `--loop llfuse`.
        probed: the pipe for workers' answers to PROBE.
        watch: what the front and the watcher tell each other; None without `--watch`.
        watches: the inotify watches; None if `--watch` uses fanotify.
        trace: the trace of requests.
        trace_switch: the pipe that tells the front when readers of the trace come and leave.
        events: the pipe to the event relay; None without one.
        relay: what the event relay tells the front; None without one.

    Raises:
        OSError: a resource is exhausted. Everything that was created is closed.
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
            self.awake = self._pipe(os.O_NONBLOCK)
            self.answers = self._pipe(os.O_DIRECT)
            self.probed = self._pipe()
            self.table = Table()
            self.watch = WatchState() if config.watch else None
            self.watches = self._watches(source) if config.watch else None
            self.trace_switch = self._pipe()
            relays = _relays_events(config) and self.watches is None
            self.events = RelayPipe(self._pipe()) if relays else None
            self.relay = RelayState() if relays else None
            self.journal = Journal()
            self.trace = Trace(config.workers)
        except BaseException:
            self._close_descriptors()
            raise

    def _watches(self, source: str) -> Watches | None:
        """Return inotify watches, if fanotify cannot be used."""
        assert self.watch is not None
        reason = fanotify.why_not(source)
        if reason is None:
            return None
        try:
            watches = Watches(self.watch, self.table)
        except OSError as error:
            _log.warning("inotify cannot be used (%s); see fs.inotify.max_user_instances", error.strerror)
            return None
        self._descriptors.append(watches.fd)
        _log.info("--watch uses inotify instead of fanotify: %s", reason)
        return watches

    def _pipe(self, flags: int = 0) -> Pipe:
        ends = os.pipe2(os.O_CLOEXEC | flags)
        self._descriptors += ends
        return ends

    def _message_pipe(self, messages: int) -> Pipe:
        """Create a pipe in packet mode (pipe(7)) with room for that many messages and a non-blocking write end."""
        reader, writer = self._pipe(os.O_DIRECT)
        try:
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, messages * fuse.PAGE_SIZE)
        except PermissionError:  # the user's limit of pipe pages is reached; fewer messages fit
            _log.debug("request pipes hold fewer messages than usual; see pipe(7), pipe-user-pages-soft")
        os.set_blocking(writer, False)
        return reader, writer

    def open_payload_pipes(self) -> None:
        """Create the pipes for large payloads, for a front with llloop's own loop."""
        self._descriptors += self.slots.open_pipes().descriptors

    def close(self) -> None:
        """Close the descriptors and the memory."""
        if self._descriptors:
            self._close_descriptors()
            self.journal.close()
            self.table.close()
            self.trace.close()

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def _relays_events(config: ServeConfig) -> bool:
    """Return whether a mount has an event relay.

    The kernel refuses the relay's system calls on a read-only mount. With id maps, requests do not contain the uid by
    which the front recognises the relay.
    """
    return config.watch and config.events and not config.read_only and config.id_maps is None
