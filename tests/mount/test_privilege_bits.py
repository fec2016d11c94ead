"""setuid, setgid and file capabilities: lost at a write, truncate or chown when, and only when, they are natively."""

import mmap
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.as_user import Caller, run_as
from tests.mirror import Tree
from tests.twins import Twins, outcome_of

pytestmark = pytest.mark.root

TEAM = 5000
ROOT = Caller(0, 0)
OWNER = Caller(4001, 4001)
MEMBER = Caller(4002, 4002, groups=(TEAM,))
STRANGER = Caller(4003, 4003)
CALLERS = {"root": ROOT, "owner": OWNER, "member": MEMBER, "stranger": STRANGER}

# <linux/capability.h>: version 2 with the effective flag, CAP_NET_RAW permitted.
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
SIZE = 300_000

# 0o2767 is missing here: see test_setgid_without_group_execution_follows_the_server.
MODES = (0o4777, 0o2777, 0o6777, 0o2775, 0o4666, 0o1777, 0o777)


def make_privileged(directory: Path) -> None:
    directory.chmod(0o777)
    for mode in MODES:
        for suffix in ("", "+capability"):
            path = directory / f"{mode:o}{suffix}"
            path.write_bytes(b"x" * SIZE)
            os.chown(path, 4001, TEAM)
            path.chmod(mode)
            if suffix:
                os.setxattr(path, "security.capability", CAPABILITY)


def opened(flags: int, use: Callable[[int], Any]) -> Callable[[Path], Any]:
    def do(path: Path) -> Any:
        fd = os.open(path, flags)
        try:
            return use(fd)
        finally:
            os.close(fd)

    return do


def write_mapped(fd: int) -> None:
    with mmap.mmap(fd, SIZE) as view:
        view[10:13] = b"new"
        view.flush()


def copy_range(path: Path) -> int:
    fd = os.open(path, os.O_RDWR)
    try:
        return os.copy_file_range(fd, fd, 1000, 0, 50_000)
    finally:
        os.close(fd)


ACTIONS: dict[str, Callable[[Path], Any]] = {
    "read": opened(os.O_RDONLY, lambda fd: os.read(fd, 10)),
    "open for writing": opened(os.O_RDWR, lambda fd: None),
    "write": opened(os.O_WRONLY, lambda fd: os.write(fd, b"new")),
    "write nothing": opened(os.O_WRONLY, lambda fd: os.write(fd, b"")),
    "write much": opened(os.O_WRONLY, lambda fd: os.write(fd, b"n" * 200_000)),
    "append": opened(os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"new")),
    "write synchronously": opened(os.O_WRONLY | os.O_SYNC, lambda fd: os.write(fd, b"new")),
    "write in two goes": opened(os.O_WRONLY, lambda fd: (os.write(fd, b"new"), os.pwrite(fd, b"new", 5000))),
    "truncate": lambda path: os.truncate(path, 10),
    "truncate to the same size": lambda path: os.truncate(path, SIZE),
    "ftruncate": opened(os.O_RDWR, lambda fd: os.ftruncate(fd, 10)),
    "open with O_TRUNC": opened(os.O_WRONLY | os.O_TRUNC, lambda fd: None),
    "open for reading with O_TRUNC": opened(os.O_RDONLY | os.O_TRUNC, lambda fd: os.fstat(fd).st_size),
    "touch": lambda path: os.utime(path),
    "chown to the same": lambda path: os.chown(path, 4001, TEAM),
    "chown to another": lambda path: os.chown(path, 4003, -1),
    "chgrp": lambda path: os.chown(path, -1, 4001),
    "fchown": opened(os.O_RDONLY, lambda fd: os.fchown(fd, 4001, -1)),
    "chmod": lambda path: os.chmod(path, 0o6755),
    "set an xattr": lambda path: os.setxattr(path, "user.mark", b"value"),
    "rename": lambda path: os.rename(path, path),
    "link": lambda path: os.link(path, path.with_name(path.name + " second")),
}
OWN_LOOP_ACTIONS: dict[str, Callable[[Path], Any]] = {
    "allocate": opened(os.O_RDWR, lambda fd: os.posix_fallocate(fd, SIZE, 50_000)),
    "copy_file_range": copy_range,
}
everyone = pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS.keys())


def do_to_all(directory: Path, action: Callable[[Path], Any]) -> dict[str, Any]:
    return {name: outcome_of(action, directory / name) for name in sorted(os.listdir(directory))}


@everyone
@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
def test_privileges_go_when_they_go_natively(tree: Tree, caller: Caller, action: Callable[[Path], Any]) -> None:
    twins = Twins.of(tree)
    twins.prepare(make_privileged)
    twins.both(do_to_all, action, caller=caller)


@pytest.mark.own_loop
@everyone
@pytest.mark.parametrize("action", OWN_LOOP_ACTIONS.values(), ids=OWN_LOOP_ACTIONS.keys())
def test_privileges_go_with_newer_calls_too(tree: Tree, caller: Caller, action: Callable[[Path], Any]) -> None:
    twins = Twins.of(tree)
    twins.prepare(make_privileged)
    twins.both(do_to_all, action, caller=caller)


@pytest.mark.own_loop
@everyone
@pytest.mark.parametrize("mode", [0o2767, 0o6766])
def test_setgid_without_group_execution_follows_the_server(tree: Tree, caller: Caller, mode: int) -> None:
    """This mark of the mandatory locks that Linux gave up lends nobody a group.

    Natively it is dropped unless the caller is in the file's group, which a FUSE server is not told. So here a
    write may drop more than natively, never less; and setuid has to go as ever. (Through the fallback the kernel
    itself decides, and never drops the mark.)
    """
    found = {}
    for side in (tree.src, tree.mnt):
        path = tree.src / f"file of {side.parent.name}"
        path.write_bytes(b"content")
        os.chown(path, 4001, TEAM)
        path.chmod(mode)
        outcome = run_as(caller, outcome_of, opened(os.O_WRONLY, lambda fd: os.write(fd, b"new")), side / path.name)
        found[side] = (outcome, stat.S_IMODE(path.stat().st_mode))
        path.unlink()
    assert found[tree.mnt][0] == found[tree.src][0]
    assert found[tree.mnt][1] | stat.S_ISGID == found[tree.src][1] | stat.S_ISGID
    assert found[tree.mnt][1] & ~found[tree.src][1] == 0


def test_a_chown_that_names_nobody_is_harmless(tree: Tree) -> None:
    """Natively it drops set-ID bits; through FUSE the kernel finds nothing to ask for and the server never sees it."""
    path = tree.mnt / "file"
    path.write_bytes(b"content")
    path.chmod(0o4755)
    os.chown(path, -1, -1)
    found = path.stat()
    assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())
    assert stat.S_IMODE(found.st_mode) in (0o755, 0o4755)
    assert stat.S_IMODE((tree.src / "file").stat().st_mode) == stat.S_IMODE(found.st_mode)


@pytest.mark.parametrize("mode", [0o4777, 0o6777])
def test_a_users_write_drops_setuid_at_once(tree: Tree, mode: int) -> None:
    """While the file is still open, and although its attributes were cached a moment ago."""
    path = tree.mnt / "file"
    path.write_bytes(b"program")
    path.chmod(mode)
    assert stat.S_IMODE(path.stat().st_mode) == mode

    def write_and_look() -> tuple[int, int, int]:
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, b"evil")
        return tuple(stat.S_IMODE(a.st_mode) for a in (os.fstat(fd), path.stat(), (tree.src / "file").stat()))  # type: ignore[return-value]

    assert run_as(STRANGER, write_and_look) == (0o777, 0o777, 0o777)


def test_file_capabilities_go_with_a_write_by_root_too(tree: Tree) -> None:
    for name in ("file", "second"):
        (tree.mnt / name).write_bytes(b"program")
        os.setxattr(tree.mnt / name, "security.capability", CAPABILITY)
        assert os.getxattr(tree.src / name, "security.capability") == CAPABILITY
    with open(tree.mnt / "file", "r+b") as file:
        file.write(b"evil")
    os.truncate(tree.mnt / "second", 3)
    for name in ("file", "second"):
        assert outcome_of(os.getxattr, tree.src / name, "security.capability") == "ENODATA"
        assert outcome_of(os.getxattr, tree.mnt / name, "security.capability") == "ENODATA"


def test_roots_write_keeps_setuid(tree: Tree) -> None:
    """CAP_FSETID: package managers write a program and its mode in any order."""
    path = tree.mnt / "file"
    path.write_bytes(b"program")
    path.chmod(0o4755)
    with open(path, "r+b") as file:
        file.write(b"update")
    assert stat.S_IMODE((tree.src / "file").stat().st_mode) == 0o4755
    os.truncate(path, 3)
    assert stat.S_IMODE((tree.src / "file").stat().st_mode) == 0o4755


def test_a_mapped_write_stays_a_write_of_the_page_cache(tree: Tree) -> None:
    """Natively a store into a mapping drops nothing; through a mount the kernel may send it as a write, never more."""
    path = tree.mnt / "file"
    path.write_bytes(b"x" * SIZE)
    path.chmod(0o4777)
    run_as(STRANGER, opened(os.O_RDWR, write_mapped), path)
    assert (tree.src / "file").read_bytes()[10:13] == b"new"
    assert stat.S_IMODE((tree.src / "file").stat().st_mode) in (0o4777, 0o777)


def test_setcap_and_getcap_work(tree: Tree) -> None:
    tools = [shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") for name in ("setcap", "getcap")]
    if None in tools:
        pytest.skip("setcap is not installed")
    setcap, getcap = map(str, tools)

    def use_tools(directory: Path) -> str:
        path = directory / "program"
        shutil.copy("/bin/true", path)
        subprocess.run([setcap, "cap_net_raw+ep", "program"], cwd=directory, check=True, timeout=30)
        before = subprocess.run([getcap, "program"], cwd=directory, check=True, timeout=30, capture_output=True)
        with open(path, "ab") as file:
            file.write(b"more")
        after = subprocess.run([getcap, "program"], cwd=directory, check=True, timeout=30, capture_output=True)
        return before.stdout.decode() + after.stdout.decode()

    assert Twins.of(tree).both(use_tools).count("cap_net_raw") == 1
