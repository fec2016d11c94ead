"""The command `llloop trace`."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any

import click

from llloop.cli.common import UntouchedPath, report_errors
from llloop.control import client
from llloop.errors import LlloopError
from llloop.linux import mounts, syscalls
from llloop.linux.fuse import NO_ID, Opcode
from llloop.logging.escape import printable
from llloop.shared.metrics import name_of
from llloop.shared.trace import Answered, Begun, TraceReader

_INTERVAL = 0.05  # seconds between two looks at the trace
_START = 2.0  # how long to wait until the front traces, in seconds

# Of which answers the size is a number of bytes, and of which the first value is.
_SIZES = frozenset({Opcode.READ})
_VALUES = frozenset({Opcode.WRITE, Opcode.COPY_FILE_RANGE})

_EXIT_CODES = """\b
Exit codes:
  0  stopped by Ctrl-C or SIGTERM, or nobody reads the output any more
  1  the server of the mount is gone, does not answer, belongs to another user, ends, or runs --loop llfuse
  2  an option is invalid
  4  MOUNTPOINT is not an llloop mount
"""


@click.command(epilog=_EXIT_CODES)
@click.argument("mountpoint", type=UntouchedPath())
@click.option("--json", "as_json", is_flag=True, help="Print each request as one line of JSON.")
@click.option(
    "--path",
    "globs",
    multiple=True,
    metavar="GLOB",
    help="Show only requests for paths that match GLOB, as the shell does it; * also matches a slash. A GLOB without a "
    "slash is compared with the last component of the path (*.log), any other with the path below MOUNTPOINT "
    "(/photos/*) and with the complete path. Repeatable: a path must match one of them. Default: all requests.",
)
@click.option("--errors", is_flag=True, help="Show only requests that fail.")
@report_errors
def trace(mountpoint: str, as_json: bool, globs: tuple[str, ...], errors: bool) -> None:
    """Show each request that programs make in the llloop mount at MOUNTPOINT, until Ctrl-C.

    A line appears when the request is answered. It shows when the request came, process id, program, user id,
    operation, path, result, and how many microseconds the answer took. The result is OK, the number of bytes, or the
    name of an error. Requests that have no answer at the end are shown as "unanswered". What the kernel answers from
    its cache is no request. Under --io kernel, this also applies to the reads and writes of most files.

    Nobody waits for this command: if it is too slow, it misses requests and says how many. While it runs, each request
    takes some microseconds more.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shown = _Shown(mounts.resolve_mountpoint(mountpoint), globs, errors)
    with client.stream_of(mountpoint, "trace") as stream, suppress(KeyboardInterrupt):
        reader = _reader(mountpoint, stream)
        printer = _Printer(as_json)
        try:
            _follow(mountpoint, stream, reader, printer, shown)
        finally:
            with suppress(ValueError):
                printer.requests(shown.answered(reader.read()))
            printer.requests(shown.unanswered(reader.unanswered()))
            _tell_missed(reader.missed)


def _reader(mountpoint: str, stream: client.Stream) -> TraceReader:
    try:
        if len(stream.descriptors) == 1:
            return TraceReader(stream.descriptors[0], stream.result["shards"])
    except (OSError, ValueError):
        pass
    raise LlloopError(f"{mountpoint}: its server is another version of llloop, or not llloop: it sent no trace")


def _follow(mountpoint: str, stream: client.Stream, reader: TraceReader, printer: _Printer, shown: _Shown) -> None:
    """Print requests until the server ends the stream.

    Raises:
        LlloopError: the server has ended the stream.
        KeyboardInterrupt: this command is to end.
    """
    connection = stream.connection.fileno()
    deadline = time.monotonic() + _START
    while not reader.is_written and time.monotonic() < deadline and not syscalls.is_readable(connection):
        time.sleep(0.001)
    note = "; the kernel reads and writes files itself (--io kernel)" if stream.result["io_by_kernel"] else ""
    _tell(f"tracing {mountpoint}, end with Ctrl-C{note}")
    missed = 0
    while True:
        ended = syscalls.is_readable(connection, _INTERVAL)
        try:
            printer.requests(shown.answered(reader.read()))
        except ValueError as error:
            raise LlloopError(f"{mountpoint}: its server has written an invalid trace: {error}") from None
        if ended:
            raise LlloopError(f"{mountpoint}: its server has ended the trace")
        if reader.missed > missed:
            missed = reader.missed
            _tell(f"{missed} requests are missing, because this command is too slow")


def _tell(text: str) -> None:
    click.echo(f"llloop: {printable(text)}", err=True)


def _tell_missed(missed: int) -> None:
    if missed:
        _tell(f"{missed} requests are missing in total")


class _Shown:
    """Which requests to show, and what of them.

    Args:
        mountpoint: the absolute path of the mount point.
        globs: patterns of which a path must match one; all paths match if there are none.
        errors: whether to show only requests that fail.
    """

    def __init__(self, mountpoint: str, globs: tuple[str, ...], errors: bool) -> None:
        self._mountpoint = mountpoint.rstrip("/")
        self._globs = globs
        self._errors = errors
        # From the monotonic clock to seconds since 1970.
        self._wall = time.time_ns() - time.monotonic_ns()

    def answered(self, pairs: Iterable[tuple[Begun, Answered]]) -> Iterator[dict[str, Any]]:
        """Yield the fields of answered requests."""
        for begun, answered in pairs:
            error = _error_of(begun, answered)
            if (error or not self._errors) and self._matches(begun):
                size = _bytes_of(begun, answered)
                result = errno.errorcode.get(error, str(error)) if error else "OK"
                yield self._fields(begun, result, size, answered.time)

    def unanswered(self, requests: Iterable[Begun]) -> Iterator[dict[str, Any]]:
        """Yield the fields of requests without an answer."""
        now = time.monotonic_ns()
        for begun in requests:
            if not self._errors and self._matches(begun):
                yield self._fields(begun, "unanswered", None, now)

    def _matches(self, begun: Begun) -> bool:
        paths = [os.fsdecode(path) for path in (begun.path, begun.target) if path]
        return not self._globs or any(self._fits(path, glob) for path in paths for glob in self._globs)

    def _fits(self, path: str, glob: str) -> bool:
        if "/" not in glob:
            return fnmatchcase(os.path.basename(path), glob)
        return any(fnmatchcase(one, glob) for one in (path, path.lstrip("/"), self._mountpoint + path))

    def _fields(self, begun: Begun, result: str, size: int | None, end: int) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "time": (begun.taken + self._wall) / 1e9,
            "pid": begun.pid or None,
            "program": os.fsdecode(begun.program) or None,
            "uid": None if begun.uid == NO_ID else begun.uid,
            "operation": name_of(begun.opcode),
            "path": os.fsdecode(begun.path) or None,
            "result": result,
            "microseconds": max(0, end - begun.taken) / 1e3,
        }
        if begun.target:
            fields["target"] = os.fsdecode(begun.target)
        if size is not None:
            fields["bytes"] = size
        return fields


def _error_of(begun: Begun, answered: Answered) -> int:
    """Return the errno that the program gets, or 0.

    A successful LOOKUP with nodeid 0 says that there is no such name, and that the kernel may keep that.
    """
    if begun.opcode == Opcode.LOOKUP and not answered.error and not answered.value:
        return errno.ENOENT
    return answered.error


def _bytes_of(begun: Begun, answered: Answered) -> int | None:
    """Return how many bytes of data a request has moved; None if it moves none, or has failed."""
    if answered.error:
        return None
    return answered.size if begun.opcode in _SIZES else answered.value if begun.opcode in _VALUES else None


class _Printer:
    """Prints requests; ends the command quietly if nobody reads its output."""

    def __init__(self, as_json: bool) -> None:
        self._line = json.dumps if as_json else _text

    def requests(self, requests: Iterable[dict[str, Any]]) -> None:
        """Print requests, each as one line."""
        try:
            for one in requests:
                sys.stdout.write(self._line(one) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise KeyboardInterrupt from None


def _text(fields: dict[str, Any]) -> str:
    """Return a request as a line for people."""
    when = datetime.fromtimestamp(fields["time"]).strftime("%H:%M:%S.%f")
    pid, program, uid, path = (
        "-" if fields[name] is None else fields[name] for name in ("pid", "program", "uid", "path")
    )
    path = f"{path} -> {fields['target']}" if "target" in fields else path
    result = f"{fields['bytes']} bytes" if "bytes" in fields else fields["result"]
    return printable(
        f"{when} {pid:>7} {program:<15} {uid:>5} {fields['operation']:<11} {path:<30} {result:<12} "
        f"{fields['microseconds']:>9.0f} us"
    )
