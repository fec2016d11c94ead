"""User namespaces, from which the kernel takes the map of an id-mapped mount."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from llloop.linux import syscalls
from llloop.linux.id_maps import IDS, IdMap, IdRange
from llloop.linux.process import fork

_CLONE_NEWUSER = 0x10000000  # <linux/sched.h>


def has_all_ids() -> bool:
    """Return whether all ids exist in the user namespace of this process, as in the initial one."""
    return Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(IDS)]


def user_namespace(users: IdMap, groups: IdMap) -> int:
    """Return a descriptor of a new user namespace with these maps (user_namespaces(7)). No process is in it.

    The kernel takes the map of a mount from a user namespace: the ids of the source are those inside of it.

    Raises:
        OSError: user namespaces are not available, or a map is not permitted.
    """
    made, make = os.pipe2(os.O_CLOEXEC)
    done, finish = os.pipe2(os.O_CLOEXEC)

    def enter() -> None:
        number = 0
        try:
            os.close(finish)
            os.close(made)
            syscalls.unshare(_CLONE_NEWUSER)
        except OSError as error:
            number = error.errno or 1
        os.write(make, bytes([number]))
        os.read(done, 1)  # until the parent has the descriptor, or has ended

    process = fork(enter, "llloop-namespace")
    try:
        os.close(make)
        os.close(done)
        number = os.read(made, 1)[0]
        if number:
            raise OSError(number, os.strerror(number))
        directory = Path("/proc") / str(process.pid)
        for name, ids in (("uid_map", users), ("gid_map", groups)):
            (directory / name).write_text(_lines(ids.ranges))
        return os.open(directory / "ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(made)
        os.close(finish)
        process.wait()


def _lines(ranges: Iterable[IdRange]) -> str:
    return "".join(f"{one.source} {one.mount} {one.count}\n" for one in ranges)
