"""Requests to workers whose answer the front waits for, because llfuse's loop wants it from the handler."""

from __future__ import annotations

import errno
import os

from llloop.front.open_files import Handle
from llloop.front.recovery.intents import NOWHERE
from llloop.front.request import FuseRequest
from llloop.front.router import Router
from llloop.shared.messages import MAX_MESSAGE, Operation, Request, decode_answer


class Exchange:
    """Sends a request to a worker and waits for its answer.

    Args:
        router: sends the request.
        answers: the read end of the pipe for workers' answers.

    Attributes:
        request: the current request; only its slot and its time are used.
        calls: the number of requests that were sent.
    """

    def __init__(self, router: Router, answers: int) -> None:
        self._router = router
        self._answers = answers
        self.request = FuseRequest(router.slots.memory, NOWHERE)
        self.request.slot = router.slots.free_slot()
        self.calls = 0

    def call(
        self,
        handle: Handle,
        number: int,
        operation: Operation,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        uid: int = 0,
        gid: int = 0,
        payload: bytes = b"",
    ) -> tuple[int, memoryview]:
        """Make a worker do *operation*; return its count or offset, and the slot's payload.

        Raises:
            OSError: the worker's error.
        """
        router, request = self._router, self.request
        self.calls += 1
        slot = request.slot
        data = router.slots.payload(slot, router.slots.payload_size)
        data[: len(payload)] = payload
        message = Request(
            operation,
            self.calls,
            slot,
            number,
            handle.descriptor,
            offset,
            length,
            flags,
            uid,
            gid,
            (),
            handle.file,
            handle.nodeid,
        )
        handle.in_worker = True
        if not router.submit(request, handle.shard, message):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        while True:
            answer = decode_answer(os.read(self._answers, MAX_MESSAGE))
            if answer.unique == self.calls:  # anything else is a second answer after a worker's restart
                break
        if answer.result < 0:
            raise OSError(-answer.result, os.strerror(-answer.result))
        return answer.result, data
