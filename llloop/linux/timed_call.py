"""Calls with a timeout, in a child process, for a file system that may hang."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, TypeVar

import msgpack

from llloop import errors
from llloop.linux import syscalls
from llloop.linux.process import fork
from llloop.linux.stdio import redirect_standard_descriptors

T = TypeVar("T")

_MAX_ANSWER = 65536  # bytes


def call_with_timeout(function: Callable[[], T], timeout: float, timeout_error: errors.LlloopError) -> T:
    """Run *function* in a forked child, and return its result or raise its error.

    A child that hangs in a system call gets SIGKILL, but nobody waits for its end; it ends when the file system
    answers.

    Args:
        function: the function to run. msgpack must be able to encode its result.
        timeout: the timeout.
        timeout_error: the error to raise on timeout.

    Raises:
        LlloopError: *function* raised one, *function* timed out (*timeout_error*), or no child could be started.
        OSError: *function* raised one.
    """
    try:
        reader, writer = os.pipe2(os.O_CLOEXEC)
    except OSError as error:
        raise errors.HostError(f"no pipe can be made: {error.strerror}; allow more open files (ulimit -n)") from None
    try:
        process = fork(lambda: _answer(function, writer), "llloop-check")
    except OSError as error:
        os.close(reader)
        raise errors.HostError(f"no process can be started: {error.strerror}; allow more (ulimit -u)") from None
    finally:
        os.close(writer)
    try:
        if not syscalls.is_readable(reader, timeout):
            process.end(0)
            raise timeout_error
        data = os.read(reader, _MAX_ANSWER)
    finally:
        os.close(reader)
    process.wait()
    answer: dict[str, Any] = msgpack.unpackb(data, unicode_errors="surrogateescape") if data else {}
    if "code" in answer:
        raise errors.of_code(answer["code"], answer["text"])
    if "errno" in answer:
        raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["path"])
    if "result" not in answer:
        raise errors.LlloopError("a check ended without a result; its process may have been killed")
    result: T = answer["result"]
    return result


def _answer(function: Callable[[], Any], writer: int) -> None:
    """Run *function* in the child, and write the result to *writer*."""
    # Keep no inherited descriptor open: a program that reads such a pipe until its end must not wait for a child
    # that hangs.
    output = os.dup2(writer, 3, inheritable=False) if writer != 3 else writer
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    answer: dict[str, Any]
    try:
        redirect_standard_descriptors()
        answer = {"result": function()}
    except errors.LlloopError as error:
        answer = {"code": error.exit_code, "text": str(error)}
    except OSError as error:
        answer = {"errno": error.errno or 0, "path": os.fsdecode(error.filename) if error.filename else None}
    os.write(output, msgpack.packb(answer, unicode_errors="surrogateescape"))
