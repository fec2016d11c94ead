"""Asking a file system that may never answer: in a child, with a deadline."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, TypeVar

import msgpack

from llloop import errors
from llloop.linux import syscalls
from llloop.linux.stdio import let_go_of_standard_descriptors

T = TypeVar("T")

_MAX_ANSWER = 65536  # bytes


def in_time(work: Callable[[], T], seconds: float, late: errors.LlloopError) -> T:
    """Return what *work* returns, or raise what it raises, if it ends in time.

    It runs in a forked child. A child that hangs in a system call is killed and left behind; it ends when the file
    system answers.

    Args:
        work: what is to be done. Its result must be something that msgpack can carry.
        seconds: how long it may take.
        late: raised if it takes longer.

    Raises:
        LlloopError: *work* raised one, *late*, or no child can be started.
        OSError: *work* raised one.
    """
    try:
        reader, writer = os.pipe2(os.O_CLOEXEC)
    except OSError as error:
        raise errors.HostError(f"no pipe can be made: {error.strerror}; allow more open files (ulimit -n)") from None
    try:
        child = os.fork()
        if child == 0:
            _answer(work, writer)
    except OSError as error:
        os.close(reader)
        raise errors.HostError(f"no process can be started: {error.strerror}; allow more (ulimit -u)") from None
    finally:
        os.close(writer)
    try:
        if not syscalls.is_readable(reader, seconds):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, os.WNOHANG)
            raise late
        data = os.read(reader, _MAX_ANSWER)
    finally:
        os.close(reader)
    os.waitpid(child, 0)
    told: dict[str, Any] = msgpack.unpackb(data, unicode_errors="surrogateescape") if data else {}
    if "code" in told:
        raise errors.of_code(told["code"], told["text"])
    if "errno" in told:
        raise OSError(told["errno"], os.strerror(told["errno"]), told["path"])
    if "result" not in told:
        raise errors.LlloopError("a check ended without a result; was its process killed?")
    result: T = told["result"]
    return result


def _answer(work: Callable[[], Any], writer: int) -> None:
    """Run in the child: do the work, tell the result, and end without what a program does at its end."""
    try:
        # Whoever waits for the end of this process's output must not wait for a file system that hangs.
        kept = os.dup2(writer, 3, inheritable=False) if writer != 3 else writer
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        told: dict[str, Any]
        try:
            let_go_of_standard_descriptors()
            told = {"result": work()}
        except errors.LlloopError as error:
            told = {"code": error.exit_code, "text": str(error)}
        except OSError as error:
            told = {"errno": error.errno or 0, "path": os.fsdecode(error.filename) if error.filename else None}
        os.write(kept, msgpack.packb(told, unicode_errors="surrogateescape"))
    finally:
        os._exit(0)
