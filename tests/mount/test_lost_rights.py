"""What somebody could do when the kernel last looked, and cannot do any more: the mount against a plain directory.

The kernel checks rights by the attributes that it keeps; here it keeps them for a minute. A process looks at files and
opens them, then the source changes, then the process acts. Errors and what they leave must be as in the twin directory.
"""

import itertools
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llloop.linux.syscalls import set_capabilities
from tests import syscalls
from tests.as_user import Caller, Child
from tests.conftest import fresh_directory, running
from tests.server import Server
from tests.twins import Twins, demand_equal, describe, outcome_of
from tests.watchdog import Watchdog

pytestmark = [pytest.mark.root, pytest.mark.mounted]

TEAM, CLUB = 5000, 5001
ALICE = Caller(4001, 4001, groups=(TEAM,))
BOB = Caller(4002, 4002)
NOBODY = 2**32 - 1
TIMES = ((1, 2), (3, 4))


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An ACL as system.posix_acl_access holds it, of (tag, permissions, id) as in <linux/posix_acl.h>."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


# An ACL: everybody except Alice may read and write.
NOT_ALICE = acl((1, 7, NOBODY), (2, 0, 4001), (4, 7, NOBODY), (16, 7, NOBODY), (32, 7, NOBODY))
FOR_BOB = acl((1, 7, NOBODY), (2, 7, 4002), (4, 7, NOBODY), (16, 7, NOBODY), (32, 5, NOBODY))


@pytest.fixture(scope="module")
def remembering(via: str, serve_options: list[str], watchdog: Watchdog) -> Iterator[Server]:
    """A mount whose kernel asks for nothing again while a test runs."""
    timeouts = [f"--{what}-timeout=60" for what in ("attr", "entry", "negative")]
    with running(Server.prepare(via, watchdog, [*serve_options, *timeouts])) as server:
        yield server


@pytest.fixture
def twins(remembering: Server, request: pytest.FixtureRequest) -> Iterator[Twins]:
    with fresh_directory(remembering, request.node.name) as tree:
        both = Twins.of(tree)
        for directory in (both.native, both.behind):
            directory.chmod(0o777)
        yield both


class Waiting:
    """A process that prepares, and acts on a signal from the test."""

    def __init__(self, directory: Path, prepare: Callable[..., Any], act: Callable[..., Any], caller: Caller) -> None:
        waiting, self._go = os.pipe()
        prepared, ready = os.pipe()

        def run() -> Any:
            memory = prepare(directory)
            os.write(ready, b"!")
            os.read(waiting, 1)
            return act(directory, memory)

        self._child = Child(run, caller=caller)
        os.close(ready)
        os.close(waiting)
        self._is_prepared = os.read(prepared, 1) == b"!"
        os.close(prepared)

    def act(self) -> Any:
        if self._is_prepared:
            os.write(self._go, b"!")
        os.close(self._go)
        return self._child.result()


def compare(
    twins: Twins,
    make: Callable[[Path], Any],
    prepare: Callable[[Path], Any],
    change: Callable[[Path], Any],
    act: Callable[[Path, Any], Any],
    caller: Caller = ALICE,
) -> Any:
    """Let `caller` prepare in what root has made, have root change it, let `caller` act; return what came of it."""
    found = []
    for directory, behind in ((twins.native, twins.native), (twins.mounted, twins.behind)):
        make(behind)
        process = Waiting(directory, prepare, act, caller)
        change(behind)
        found.append(process.act())
    demand_equal(found[1], found[0], "another outcome")
    demand_equal(describe(twins.behind), describe(twins.native), "the source differs from the native twin")
    return found[0]


def close(fd: int) -> None:
    os.close(fd)


def execute(path: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            os.execv(path, [str(path)])
        except OSError as error:
            os._exit(error.errno or 1)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Calls on a file: by its path, and by a descriptor that is open for reading and writing.
ON_PATHS: dict[str, Callable[[Path], Any]] = {
    "chmod": lambda path: os.chmod(path, 0o640),
    "chmod u+s": lambda path: os.chmod(path, 0o4755),
    "chmod g+s": lambda path: os.chmod(path, 0o2755),
    "chgrp": lambda path: os.chown(path, -1, TEAM),
    "chgrp to its own": lambda path: os.chown(path, -1, 4001),
    "chown": lambda path: os.chown(path, 4001, -1),
    "set times": lambda path: syscalls.utimensat(path, *TIMES),
    "set one time": lambda path: os.utime(path, (1, 1)),
    "touch": lambda path: os.utime(path),
    "truncate": lambda path: os.truncate(path, 3),
    "open to read": lambda path: close(os.open(path, os.O_RDONLY)),
    "open to write": lambda path: close(os.open(path, os.O_WRONLY)),
    "open for both": lambda path: close(os.open(path, os.O_RDWR)),
    "open to append": lambda path: close(os.open(path, os.O_WRONLY | os.O_APPEND)),
    "open and truncate": lambda path: close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
    "read and truncate": lambda path: close(os.open(path, os.O_RDONLY | os.O_TRUNC)),
    "open without atime": lambda path: close(os.open(path, os.O_RDONLY | os.O_NOATIME)),
    "open or create": lambda path: close(os.open(path, os.O_RDWR | os.O_CREAT)),
    "get xattr": lambda path: os.getxattr(path, "user.there"),
    "set xattr": lambda path: os.setxattr(path, "user.new", b"new"),
    "remove xattr": lambda path: os.removexattr(path, "user.there"),
    "link": lambda path: os.link(path, path.with_name(path.name + " linked")),
    "execute": execute,
}
ON_DESCRIPTORS: dict[str, Callable[[int], Any]] = {
    "fchmod": lambda fd: os.fchmod(fd, 0o640),
    "fchmod u+s": lambda fd: os.fchmod(fd, 0o4755),
    "fchmod g+s": lambda fd: os.fchmod(fd, 0o2755),
    "fchgrp": lambda fd: os.fchown(fd, -1, TEAM),
    "futimens": lambda fd: syscalls.utimensat(fd, *TIMES),
    "ftouch": lambda fd: os.utime(fd),
    "ftruncate": lambda fd: os.ftruncate(fd, 3),
    "fsetxattr": lambda fd: os.setxattr(fd, "user.new", b"new"),
    "fgetxattr": lambda fd: os.getxattr(fd, "user.there"),
    "fremovexattr": lambda fd: os.removexattr(fd, "user.there"),
    "write": lambda fd: os.pwrite(fd, b"written", 0),
    "open again": lambda fd: close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR)),
}
WITH_ACLS: dict[str, Callable[[Path], Any]] = {
    "set acl": lambda path: os.setxattr(path, "system.posix_acl_access", FOR_BOB),
    "remove acl": lambda path: os.removexattr(path, "system.posix_acl_access"),
}


def owned(uid: int, gid: int, mode: int) -> Callable[[Path], None]:
    """Return what gives a file this owner, group (-1: the one that it has) and mode."""

    def change(path: Path) -> None:
        os.chown(path, uid, gid)
        path.chmod(mode)

    return change


def closed_to_alice(path: Path) -> None:
    os.chown(path, 0, 0)
    os.setxattr(path, "system.posix_acl_access", NOT_ALICE)


# Changes of a file or directory of Alice, mode 0755.
CHANGES: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: None,
    "is root's": lambda path: os.chown(path, 0, 0),
    "is root's and open to all": owned(0, 0, 0o777),
    "is root's and closed": owned(0, 0, 0o700),
    "is root's and set-ID": owned(0, TEAM, 0o6755),
    "is Bob's": lambda path: os.chown(path, 4002, 4002),
    "may only be read": lambda path: path.chmod(0o444),
    "may not even be read": lambda path: path.chmod(0o000),
    "has a group that Alice is not in": owned(-1, CLUB, 0o2775),
    "is open to Alice's group": owned(0, TEAM, 0o770),
    "is closed to Alice's group only": owned(0, TEAM, 0o707),
    "is closed to Alice by an ACL": closed_to_alice,
}


def make_files(directory: Path) -> None:
    actions: dict[str, Callable[..., Any]] = ON_PATHS | ON_DESCRIPTORS | WITH_ACLS
    for name in actions:
        path = directory / name
        path.write_bytes(b"#!/bin/true\n")
        os.setxattr(path, "user.there", b"value")
        os.chown(path, 4001, 4001)
        path.chmod(0o755)


def look_at_files(directory: Path) -> dict[str, int]:
    for name in os.listdir(directory):
        os.stat(directory / name)
        outcome_of(os.getxattr, directory / name, "system.posix_acl_access")
    return {name: os.open(directory / name, os.O_RDWR) for name in ON_DESCRIPTORS}


@pytest.mark.parametrize("name", CHANGES)
def test_file_with_new_owner_or_mode(twins: Twins, via: str, name: str) -> None:
    if via == "llfuse" and "ACL" in name:
        pytest.skip("the plain loop enforces no ACLs")
    if via == "llfuse" and name in ("has a group that Alice is not in", "is root's and set-ID"):
        pytest.skip("in the plain loop the kernel clears set-ID bits, those that it knows of, in the caller's name")
    paths = ON_PATHS if via == "llfuse" else ON_PATHS | WITH_ACLS

    def act(directory: Path, descriptors: dict[str, int]) -> dict[str, Any]:
        found = {what: outcome_of(do, directory / what) for what, do in paths.items()}
        return found | {what: outcome_of(do, descriptors[what]) for what, do in ON_DESCRIPTORS.items()}

    def change(directory: Path) -> None:
        for path in list(directory.iterdir()):
            CHANGES[name](path)

    found = compare(twins, make_files, look_at_files, change, act)
    if name == "nothing":
        assert {what for what, came in found.items() if isinstance(came, str)} <= {"chown", "remove acl"}
    if name == "is root's":
        refused = {what for what, came in found.items() if came == "EPERM"}
        assert {"chmod", "chmod u+s", "fchmod u+s", "set times", "futimens"} <= refused


# Calls in a directory that contains files and directories of Alice and Bob.
IN_DIRECTORIES: dict[str, Callable[[Path], Any]] = {
    "create": lambda path: close(os.open(path / "new", os.O_CREAT | os.O_WRONLY)),
    "create with set-ID bits": lambda path: close(os.open(path / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o6755)),
    "make a directory": lambda path: os.mkdir(path / "new"),
    "make a fifo": lambda path: os.mkfifo(path / "new"),
    "make a symlink": lambda path: os.symlink("mine", path / "new"),
    "link": lambda path: os.link(path / "mine", path / "new"),
    "link from elsewhere": lambda path: os.link(path.parent / "outside" / "file", path / "new"),
    "unlink": lambda path: os.unlink(path / "mine"),
    "unlink Bob's": lambda path: os.unlink(path / "bobs"),
    "rmdir": lambda path: os.rmdir(path / "my directory"),
    "rmdir Bob's": lambda path: os.rmdir(path / "bobs directory"),
    "rename": lambda path: os.rename(path / "mine", path / "new"),
    "rename Bob's": lambda path: os.rename(path / "bobs", path / "new"),
    "rename over Bob's": lambda path: os.rename(path / "mine", path / "bobs"),
    "rename a directory": lambda path: os.rename(path / "my directory", path / "new"),
    "move out": lambda path: os.rename(path / "mine", path.parent / "outside" / f"{path.name} moved"),
    "move a directory out": lambda path: os.rename(path / "my directory", path.parent / "outside" / f"{path.name} dir"),
    "move in": lambda path: os.rename(path.parent / "outside" / path.name, path / "new"),
    "list": lambda path: sorted(os.listdir(path)),
    "set a default acl": lambda path: os.setxattr(path, "system.posix_acl_default", FOR_BOB),
}
OWN_LOOP_ONLY: dict[str, Callable[[Path], Any]] = {
    "exchange": lambda path: syscalls.renameat2(path / "mine", path / "bobs", syscalls.RENAME_EXCHANGE),
    "make a file without a name": lambda path: close(os.open(path, os.O_TMPFILE | os.O_RDWR)),
}
BY_DESCRIPTORS: dict[str, Callable[[int], Any]] = {
    "create at": lambda fd: close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd)),
    "unlink at": lambda fd: os.unlink("mine", dir_fd=fd),
    "rename at": lambda fd: os.rename("bobs", "new", src_dir_fd=fd, dst_dir_fd=fd),
    "chmod of the directory": lambda fd: os.fchmod(fd, 0o1700),
    "open the directory again": lambda fd: close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)),
}
STICKY: dict[str, Callable[[Path], Any]] = {
    "is root's and sticky": owned(0, 0, 0o1777),
    "is root's, sticky, and open to Alice's group": owned(0, TEAM, 0o1770),
    "is root's, set-group-ID, and open to Alice's group": owned(0, TEAM, 0o2770),
    "is root's, and hands down a group that Alice is not in": owned(0, CLUB, 0o2777),
}


def make_directories(directory: Path) -> None:
    actions: dict[str, Callable[..., Any]] = IN_DIRECTORIES | OWN_LOOP_ONLY | BY_DESCRIPTORS
    (directory / "outside").mkdir()
    for path in [directory / "outside" / "file", *(directory / "outside" / name for name in actions)]:
        path.touch()
        os.chown(path, 4001, 4001)
    for path in (directory / name for name in actions):
        path.mkdir()
        for name, uid in (("mine", 4001), ("bobs", 4002)):
            (path / name).write_text(name)
            os.chown(path / name, uid, uid)
        for name, uid in (("my directory", 4001), ("bobs directory", 4002)):
            (path / name).mkdir()
            os.chown(path / name, uid, uid)
        os.chown(path, 4001, 4001)
        path.chmod(0o755)
    (directory / "outside").chmod(0o777)


def look_at_directories(directory: Path) -> dict[str, int]:
    for path, names, files in os.walk(directory):
        for name in names + files:
            os.stat(Path(path, name))
    return {name: os.open(directory / name, os.O_RDONLY | os.O_DIRECTORY) for name in BY_DESCRIPTORS}


@pytest.mark.parametrize("name", [*CHANGES, *STICKY])
def test_directory_with_new_owner_or_mode(twins: Twins, via: str, name: str) -> None:
    if via == "llfuse" and "ACL" in name:
        pytest.skip("the plain loop enforces no ACLs")
    actions = IN_DIRECTORIES if via == "llfuse" else IN_DIRECTORIES | OWN_LOOP_ONLY

    def act(directory: Path, descriptors: dict[str, int]) -> dict[str, Any]:
        found = {what: outcome_of(do, directory / what) for what, do in actions.items()}
        return found | {what: outcome_of(do, descriptors[what]) for what, do in BY_DESCRIPTORS.items()}

    def change(directory: Path) -> None:
        for path in list(directory.iterdir()):
            if path.name != "outside":
                (CHANGES | STICKY)[name](path)

    found = compare(twins, make_directories, look_at_directories, change, act)
    refused = {what for what, came in found.items() if came in ("EPERM", "EACCES")}
    assert {"create", "unlink", "rename", "move out"} <= refused or name not in ("is root's", "is Bob's")


# Names that lead elsewhere

HANDED_OVER: dict[str, Callable[[Path], Any]] = {
    "unlink": lambda path: os.unlink(path),
    "rename": lambda path: os.rename(path, path.with_name("new")),
    "rename over": lambda path: os.rename(path.with_name("mine"), path),
    "open": lambda path: close(os.open(path, os.O_RDWR)),
    "open or create": lambda path: close(os.open(path, os.O_RDWR | os.O_CREAT)),
    "chmod": lambda path: os.chmod(path, 0o777),
    "set times": lambda path: syscalls.utimensat(path, *TIMES),
    "truncate": lambda path: os.truncate(path, 0),
    "set xattr": lambda path: os.setxattr(path, "user.new", b"new"),
    "link": lambda path: os.link(path, path.with_name("new")),
}
ADDED: dict[str, Callable[[Path], Any]] = {
    "create": lambda path: close(os.open(path, os.O_RDWR | os.O_CREAT)),
    "create only": lambda path: close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)),
    "mkdir": lambda path: os.mkdir(path),
    "mkfifo": lambda path: os.mkfifo(path),
    "symlink": lambda path: os.symlink("x", path),
    "link over": lambda path: os.link(path.with_name("mine"), path),
}
EXCHANGE = {
    "exchange": lambda path: syscalls.renameat2(path.with_name("mine"), path, syscalls.RENAME_EXCHANGE),
    "rename to no other": lambda path: syscalls.renameat2(path.with_name("mine"), path, syscalls.RENAME_NOREPLACE),
}


def put(uid: int, mode: int, is_directory: bool = False) -> Callable[[Path], None]:
    """What root puts in the place of a name."""

    def change(path: Path) -> None:
        if is_directory:
            path.mkdir()
        else:
            path.write_text("another")
        os.chown(path, uid, uid)
        path.chmod(mode)

    return change


@pytest.mark.parametrize("mode", [0o1777, 0o777], ids=["sticky", "open"])
@pytest.mark.parametrize("was_there", [True, False], ids=["was-there", "was-missing"])
@pytest.mark.parametrize(
    "replacement",
    [put(4002, 0o644), put(4001, 0o644), put(4002, 0o777, is_directory=True), None],
    ids=["bobs", "own", "directory", "nothing"],
)
def test_name_of_another_file(
    twins: Twins, via: str, mode: int, was_there: bool, replacement: Callable[[Path], None] | None
) -> None:
    # While the kernel caches that a name is missing, it sends no request for most calls with this name.
    actions = ADDED | ({"rename over": HANDED_OVER["rename over"]} if not was_there else HANDED_OVER)
    if via != "llfuse":
        actions |= {name: do for name, do in EXCHANGE.items() if was_there or name != "exchange"}

    def make(directory: Path) -> None:
        for name in actions:
            path = directory / name
            path.mkdir()
            for uid, own in ((4001, "mine"), (4001, "x")):
                if own == "mine" or was_there:
                    (path / own).write_text("Alice's")
                    os.chown(path / own, uid, uid)
            path.chmod(mode)

    def look(directory: Path) -> None:
        for name in actions:
            for own in ("mine", "x"):
                outcome_of(os.stat, directory / name / own)

    def change(directory: Path) -> None:
        for name in actions:
            path = directory / name / "x"
            path.unlink(missing_ok=True)
            if replacement is not None:
                replacement(path)

    def act(directory: Path, _: None) -> dict[str, Any]:
        return {what: outcome_of(do, directory / what / "x") for what, do in actions.items()}

    compare(twins, make, look, change, act)


def test_exchanged_names(twins: Twins) -> None:
    """The kernel has both files in its cache, each with the other's name."""

    def make(directory: Path) -> None:
        for what in ("unlink", "rename", "rename over"):
            path = directory / what
            path.mkdir()
            for name, uid in (("mine", 4001), ("bobs", 4002), ("other", 4001)):
                (path / name).write_text(name)
                os.chown(path / name, uid, uid)
            path.chmod(0o1777)

    def look(directory: Path) -> None:
        for what, name in itertools.product(("unlink", "rename", "rename over"), ("mine", "bobs", "other")):
            os.stat(directory / what / name)

    def change(directory: Path) -> None:
        for what in ("unlink", "rename", "rename over"):
            syscalls.renameat2(directory / what / "mine", directory / what / "bobs", syscalls.RENAME_EXCHANGE)

    def act(directory: Path, _: None) -> list[Any]:
        return [
            outcome_of(os.unlink, directory / "unlink" / "mine"),
            outcome_of(os.rename, directory / "rename" / "mine", directory / "rename" / "new"),
            outcome_of(os.rename, directory / "rename over" / "other", directory / "rename over" / "mine"),
        ]

    assert compare(twins, make, look, change, act) == ["EPERM", "EPERM", "EPERM"]


# Root, and users with some of its capabilities


def test_root_without_capabilities_has_no_privileges(twins: Twins) -> None:
    """Services and containers often run as root with few capabilities."""

    def look(directory: Path) -> dict[str, int]:
        descriptors = look_at_files(directory)
        set_capabilities(0, 0, 0)
        return descriptors

    def act(directory: Path, descriptors: dict[str, int]) -> dict[str, Any]:
        found = {what: outcome_of(do, directory / what) for what, do in ON_PATHS.items()}
        return found | {what: outcome_of(do, descriptors[what]) for what, do in ON_DESCRIPTORS.items()}

    def make(directory: Path) -> None:
        make_files(directory)
        for path in directory.iterdir():
            os.chown(path, 0, 0)

    def change(directory: Path) -> None:
        for path in directory.iterdir():
            os.chown(path, 4002, 4002)

    found = compare(twins, make, look, change, act, caller=Caller(0, 0))
    assert found["fchmod u+s"] == "EPERM"
