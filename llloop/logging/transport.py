"""How log records get from the processes of a mount to the one that writes them.

multiprocessing's own queue has locks that all processes share, and whoever is killed while holding one silences
the log of all. A socket that keeps messages apart needs none: a record is sent by one system call, whole or not at all.
"""

from __future__ import annotations

import logging
import select
import socket
from typing import Any

import msgpack

_LARGEST = 64 * 1024  # bytes of a record; what is longer loses the end of its text
# How long a process waits for the writer of the log before it goes on without, in seconds.
_PATIENCE = 0.1
# What of a record is needed where it is written, and can be told in a message.
_TOLD = (
    *("name", "msg", "levelno", "levelname", "pathname", "lineno", "exc_text", "created", "msecs"),
    *("process", "processName", "once", "asked_for"),
)


class LogTransport:
    """Takes the place of the queue in multiprocessing-logging's handler, with as much of its interface as that uses."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._writer.settimeout(_PATIENCE)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)

    def put_nowait(self, record: logging.LogRecord) -> None:
        """Send a record, its arguments already in its text.

        Raises:
            OSError: nobody takes it.
        """
        told = {key: value for key, value in record.__dict__.items() if key in _TOLD}
        data = _pack(told)
        if len(data) > _LARGEST:
            told["exc_text"] = None
            told["msg"] = str(told["msg"])[: _LARGEST // 8]
            data = _pack(told)
        self._writer.send(data)

    def get(self, timeout: float) -> logging.LogRecord:
        """Return the next record. It is waited for without waking up in between, whatever *timeout* says.

        Raises:
            EOFError: there is none any more, since `end`.
        """
        data = self._reader.recv(2 * _LARGEST)
        if not data:
            raise EOFError
        told = msgpack.unpackb(data, unicode_errors="surrogateescape")
        return logging.makeLogRecord(told)

    def qsize(self) -> int:
        """Return 0 if nothing is there to get, else 1."""
        return len(self._poll.poll(0))

    def end(self) -> None:
        """Let nobody send any more; what was sent can still be got."""
        self._writer.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Let go of the reading end; who sends after that gets an error."""
        self._reader.close()

    def forget(self) -> None:
        """Let go of the sending end."""
        self._writer.close()

    def join_thread(self) -> None:
        """Do nothing: no thread has to finish sending."""


def _pack(told: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(told, default=str, unicode_errors="surrogateescape")
    return packed
