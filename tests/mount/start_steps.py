"""Starts a server again and again, and has one of its steps go wrong each time.

`python -m tests.mount.start_steps SRC MNT HOW EVERY`: HOW is "error" or a signal; of EVERY so many one is tried.
A step that no other start takes, because somebody had asked that server for its status, is left out.

A step is a call that llloop makes while it starts: of one of its own functions, or of one that is written in C, which
is where system calls are made. Each line that is printed is the JSON of one step: what it is, how the process ended,
what it said, and what it left.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import llloop
from llloop.config import ServeConfig
from llloop.errors import LlloopError
from llloop.linux.syscalls import is_readable
from llloop.supervisor.supervisor import Supervisor, serve
from tests.watchdog import mount_entry, processes_of_session

PACKAGE = os.path.dirname(llloop.__file__) + os.sep
IN_THE_WAY = "/in/the/way"
SECONDS = 25.0

Step = tuple[str, int, str]


def step_of(frame: FrameType, event: str, argument: Any) -> Step | None:
    caller = frame if event == "c_call" else frame.f_back
    if caller is None or not caller.f_code.co_filename.startswith(PACKAGE):
        return None
    if event == "call" and not frame.f_code.co_filename.startswith(PACKAGE):
        return None
    name = argument.__name__ if event == "c_call" else frame.f_code.co_name
    return os.path.relpath(caller.f_code.co_filename, PACKAGE), caller.f_lineno, name


def start(source: str, mountpoint: str, at_step: Callable[[Step], None]) -> None:
    """Serve until the mount is ready, then stop."""
    supervisor_pid = os.getpid()
    begun: list[bool] = []  # from the first step of Supervisor on; a with block undoes earlier steps

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if os.getpid() != supervisor_pid:  # a step of a forked process does not count
            sys.setprofile(None)
        elif event in ("call", "c_call"):
            step = step_of(frame, event, argument)
            begun[:] = [any(begun) or (step is not None and step[2] == "show_title")]
            if step is not None and any(begun):
                at_step(step)

    def ready(served: Supervisor) -> None:
        sys.setprofile(None)
        os.kill(supervisor_pid, signal.SIGTERM)

    code = 1
    try:
        sys.setprofile(profile)
        code = serve(ServeConfig(source=source, mountpoint=mountpoint, workers=1), ready)
    except LlloopError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    finally:
        sys.setprofile(None)
    os._exit(code)


def forked(work: Callable[[], None]) -> dict[str, Any]:
    """Run it in a session of its own; return how it ended, what it said, and what was left in the end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(writer, 2)
        os.close(reader)
        work()
        os._exit(99)
    os.close(writer)
    deadline = time.monotonic() + SECONDS
    ended = os.pidfd_open(child)
    if not is_readable(ended, SECONDS):
        os.kill(child, signal.SIGKILL)
    os.close(ended)
    _, status = os.waitpid(child, 0)
    while (left := processes_of_session(child)) and time.monotonic() < deadline:
        time.sleep(0.005)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    return {"code": os.waitstatus_to_exitcode(status), "said": said, "processes": len(left)}


def all_steps(source: str, mountpoint: str) -> list[Step]:
    reader, writer = os.pipe()

    noted: set[Step] = set()

    def note(step: Step) -> None:
        # The parent reads only at the end, and a pipe has no room for every repetition.
        if step not in noted:
            noted.add(step)
            os.write(writer, json.dumps(step).encode() + b"\n")

    ended = forked(lambda: start(source, mountpoint, note))
    assert ended["code"] == 0, ended
    os.close(writer)
    with open(reader, "rb") as pipe:
        return [tuple(json.loads(line)) for line in pipe]


def main(source: str, mountpoint: str, how: str, every: int) -> None:
    struck = mmap.mmap(-1, 1)  # shared with the forked processes

    def strike(wanted: Step) -> Callable[[Step], None]:
        def at_step(step: Step) -> None:
            if step == wanted:
                sys.setprofile(None)
                struck[0] = True
                if how == "error":
                    raise OSError(errno.EDQUOT, "No room", IN_THE_WAY)
                os.kill(os.getpid(), getattr(signal, how))

        return at_step

    for step in all_steps(source, mountpoint)[::every]:
        struck[0] = False
        ended = forked(lambda step=step: start(source, mountpoint, strike(step)))  # type: ignore[misc]
        mounted = mount_entry(mountpoint) is not None
        if mounted:
            os.system(f"umount --lazy '{mountpoint}'")
        if struck[0]:
            print(json.dumps({"step": step, "mounted": mounted, **ended}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
