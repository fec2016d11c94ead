"""Starting and ending the trace of requests, as its readers come and leave."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from llloop.errors import LlloopError
from llloop.shared.messages import Operation, encode
from llloop.shared.negotiation import Capabilities, Feature
from llloop.supervisor.control_server import Stream
from llloop.supervisor.event_loop import EventLoop
from llloop.supervisor.shared_resources import SharedResources

MAX_READERS = 8
_RETRY = 0.05  # seconds
_MESSAGE = encode((Operation.TRACE, 0, -1, -1, -1))


class Tracing:
    """The readers of a mount's trace.

    Args:
        loop: the supervisor's event loop.
        capabilities: the result of the negotiation with the kernel, or None with `--loop llfuse`.
        resources: the trace, and the pipes to the processes that write it.
    """

    def __init__(self, loop: EventLoop, capabilities: Capabilities | None, resources: SharedResources) -> None:
        self._own_loop = capabilities is not None
        self._io_by_kernel = capabilities is not None and Feature.PASSTHROUGH in capabilities.features
        self._trace = resources.trace
        self._switch = resources.trace_switch[1]
        os.set_blocking(self._switch, False)
        self._pipes = [writer for _, writer in resources.requests]
        self._untold: Sequence[int] = ()
        self._again = loop.deadline(self._tell_workers)
        self._readers = 0

    def open(self) -> Stream:
        """Start a reader.

        Raises:
            LlloopError: there are too many readers, or `--loop llfuse` is in force.
        """
        if not self._own_loop:
            raise LlloopError("a mount that is served with --loop llfuse has no trace")
        if self._readers == MAX_READERS:
            raise LlloopError(f"{MAX_READERS} commands read the trace of this mount already")
        self._readers += 1
        if self._readers == 1:
            self._switch_to(True)
        result = {"shards": len(self._pipes), "io_by_kernel": self._io_by_kernel}
        return Stream(result, self._trace.descriptor, self._left)

    def _left(self) -> None:
        self._readers -= 1
        if not self._readers:
            self._switch_to(False)

    def _switch_to(self, wanted: bool) -> None:
        self._trace.wanted = wanted
        self._untold = self._pipes
        self._tell_workers()  # before the front, so that they trace what a tracing front gives them
        with suppress(BlockingIOError):  # the front has not read the byte before; it will see the new state then
            os.write(self._switch, b"!")

    def _tell_workers(self) -> None:
        untold = []
        for pipe in self._untold:
            try:
                os.write(pipe, _MESSAGE)
            except BlockingIOError:  # it is full
                untold.append(pipe)
        self._untold = untold
        if untold:
            self._again.set_in(_RETRY)
