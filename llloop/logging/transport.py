"""Sending log records from the processes of a mount to the process that writes them.

The queue of multiprocessing has locks that all processes share. A process that is killed while it holds one would
stop the logging of all others. A SOCK_SEQPACKET socket needs no lock: one system call sends a whole record or nothing.
"""

from __future__ import annotations

import logging
import select
import socket
from typing import Any

import msgpack

_MAX_RECORD = 64 * 1024  # bytes of a record; a longer one is truncated
# How long a process waits if the socket is full, in seconds. Then it drops the record.
_SEND_TIMEOUT = 0.1
# The attributes of a record that are sent.
_SENT_ATTRIBUTES = (
    *("name", "msg", "levelno", "levelname", "pathname", "lineno", "exc_text", "created", "msecs"),
    *("process", "processName", "once", "on_demand"),
)


class LogTransport:
    """Replaces the queue of multiprocessing-logging's handler; implements the methods that the handler uses."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._writer.settimeout(_SEND_TIMEOUT)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)

    def put_nowait(self, record: logging.LogRecord) -> None:
        """Send a record whose arguments are already formatted into its message.

        Raises:
            OSError: the socket stayed full, or the reader has closed it.
        """
        attributes = {key: value for key, value in record.__dict__.items() if key in _SENT_ATTRIBUTES}
        data = _pack(attributes)
        if len(data) > _MAX_RECORD:
            attributes["exc_text"] = None
            attributes["msg"] = str(attributes["msg"])[: _MAX_RECORD // 8]
            data = _pack(attributes)
        self._writer.send(data)

    def get(self, timeout: float) -> logging.LogRecord:
        """Wait for the next record and return it. Ignore *timeout*, so that the thread does not wake up in between.

        Raises:
            EOFError: `end` was called, and all records have been returned.
        """
        data = self._reader.recv(2 * _MAX_RECORD)
        if not data:
            raise EOFError
        attributes = msgpack.unpackb(data, unicode_errors="surrogateescape")
        return logging.makeLogRecord(attributes)

    def qsize(self) -> int:
        """Return 1 if a record can be read, else 0."""
        return len(self._poll.poll(0))

    def end(self) -> None:
        """Shut down the sending end for all processes; records that were sent can still be read."""
        self._writer.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the reading end; later sends fail."""
        self._reader.close()

    def close_writer(self) -> None:
        """Close this process's sending end."""
        self._writer.close()

    def join_thread(self) -> None:
        """Do nothing, because there is no sending thread."""


def _pack(attributes: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(attributes, default=str, unicode_errors="surrogateescape")
    return packed
