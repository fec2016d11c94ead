"""POSIX ACLs are stored, inherited and enforced as in the source's file system."""

import errno
import os
import random
import shutil
import stat
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.as_user import Caller, run_as
from tests.conftest import Serve
from tests.server import Tree
from tests.twins import Twins, outcome_of, outcomes

pytestmark = [pytest.mark.root, pytest.mark.own_loop]

ACCESS = "system.posix_acl_access"
DEFAULT = "system.posix_acl_default"
# <linux/posix_acl_xattr.h>
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NO_ID = 0xFFFFFFFF
R, W, X = 4, 2, 1

TEAM = 5000
CLUB = 5001
OWNER = Caller(4001, 4001)
NAMED = Caller(4002, 4002)
IN_TEAM = Caller(4003, 4003, groups=(TEAM,))
IN_CLUB = Caller(4004, CLUB)
IN_BOTH = Caller(4005, 4005, groups=(CLUB, TEAM))
STRANGER = Caller(4006, 4006)
ROOT = Caller(0, 0)
CALLERS = {
    "owner": OWNER,
    "named": NAMED,
    "in team": IN_TEAM,
    "in club": IN_CLUB,
    "in both": IN_BOTH,
    "stranger": STRANGER,
    "root": ROOT,
}


def acl(
    owner: int,
    group: int,
    other: int,
    mask: int | None = None,
    users: dict[int, int] | None = None,
    groups: dict[int, int] | None = None,
) -> bytes:
    entries = [(USER_OBJ, owner, NO_ID)]
    entries += [(USER, permission, uid) for uid, permission in sorted((users or {}).items())]
    entries += [(GROUP_OBJ, group, NO_ID)]
    entries += [(GROUP, permission, gid) for gid, permission in sorted((groups or {}).items())]
    entries += [(MASK, mask, NO_ID)] if mask is not None else []
    entries += [(OTHER, other, NO_ID)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def make_file(path: Path, mode: int = 0o640, uid: int = 4001, gid: int = TEAM) -> Path:
    path.write_bytes(b"content")
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


def create(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def try_to_open(path: Path) -> dict[str, Any]:
    def opened(flags: int) -> None:
        os.close(os.open(path, flags))

    return outcomes(
        {
            "read": lambda: opened(os.O_RDONLY),
            "write": lambda: opened(os.O_WRONLY),
            "both": lambda: opened(os.O_RDWR),
            "execute": lambda: os.access(path, os.X_OK),
            "truncate": lambda: os.truncate(path, 7),
        }
    )


def test_acl_is_stored_and_changes_the_mode(tree: Tree) -> None:
    wanted = acl(R | W, R, 0, mask=R | W, users={4002: R | W}, groups={CLUB: R})

    def set_it(directory: Path) -> bytes:
        path = make_file(directory / "file")
        os.setxattr(path, ACCESS, wanted)
        return os.getxattr(path, ACCESS)

    twins = Twins.of(tree)
    assert twins.both(set_it) == wanted
    assert ACCESS in os.listxattr(twins.mounted / "file")
    # The group bits of the mode are the mask, independent of the rights of the owning group.
    assert stat.S_IMODE(os.stat(twins.mounted / "file").st_mode) == 0o660


def test_chmod_changes_the_mask(tree: Tree) -> None:
    def change(directory: Path) -> list[bytes]:
        path = make_file(directory / "file")
        os.setxattr(path, ACCESS, acl(R | W, R, 0, mask=R | W, users={4002: R | W}))
        found = []
        for mode in (0o600, 0o640, 0o777, 0o000, 0o2755):
            path.chmod(mode)
            found.append(os.getxattr(path, ACCESS))
        return found

    Twins.of(tree).both(change)


def test_named_user_and_group_get_their_permissions(tree: Tree) -> None:
    path = make_file(tree.src / "file", 0o600)
    os.setxattr(path, ACCESS, acl(R | W, 0, 0, mask=R | W, users={4002: R | W}, groups={CLUB: R}))
    mounted = tree.mnt / "file"
    assert run_as(NAMED, try_to_open, mounted)["both"] is None
    found = run_as(IN_CLUB, try_to_open, mounted)
    assert (found["read"], found["write"]) == (None, "EACCES")
    assert run_as(IN_BOTH, try_to_open, mounted)["read"] is None
    for caller in (IN_TEAM, STRANGER):
        assert set(run_as(caller, try_to_open, mounted).values()) == {"EACCES", False}


def test_mask_does_not_widen_permissions_of_the_group(tree: Tree) -> None:
    """The mode's group bits are the mask. Without FUSE_POSIX_ACL, the kernel would grant them to the group."""
    path = make_file(tree.src / "file", 0o600)
    os.setxattr(path, ACCESS, acl(R | W | X, 0, 0, mask=R | W | X, users={4002: R | W | X}))
    assert stat.S_IMODE(os.stat(tree.mnt / "file").st_mode) == 0o770
    assert set(run_as(IN_TEAM, try_to_open, tree.mnt / "file").values()) == {"EACCES", False}


def test_mask_limits_entries(tree: Tree) -> None:
    path = make_file(tree.src / "file", 0o600)
    os.setxattr(path, ACCESS, acl(R | W, R | W, R | W, mask=R, users={4002: R | W}, groups={CLUB: R | W}))
    for caller in (NAMED, IN_TEAM, IN_CLUB):
        found = run_as(caller, try_to_open, tree.mnt / "file")
        assert (found["read"], found["write"]) == (None, "EACCES")
    # The mask does not apply to others.
    assert run_as(STRANGER, try_to_open, tree.mnt / "file")["both"] is None


@pytest.mark.parametrize("seed", range(4))
def test_random_acls_are_enforced_as_in_the_source(tree: Tree, seed: int) -> None:
    choice = random.Random(seed)

    def permission() -> int:
        return choice.randrange(8)

    acls = []
    for _ in range(60):
        users = {uid: permission() for uid in (4001, 4002, 4004) if choice.random() < 0.5}
        groups = {gid: permission() for gid in (TEAM, CLUB, 4006) if choice.random() < 0.5}
        mask = permission() if users or groups or choice.random() < 0.3 else None
        acls.append(acl(permission(), permission(), permission(), mask, users, groups))

    def make(directory: Path) -> None:
        for number, value in enumerate(acls):
            os.setxattr(make_file(directory / f"file{number}"), ACCESS, value)
            (directory / f"directory{number}").mkdir()
            (directory / f"directory{number}" / "inside").write_bytes(b"")
            os.chown(directory / f"directory{number}", 4001, TEAM)
            os.setxattr(directory / f"directory{number}", ACCESS, value)

    def try_all(directory: Path) -> list[Any]:
        found: list[Any] = []
        for number in range(len(acls)):
            below = directory / f"directory{number}"
            found.append(try_to_open(directory / f"file{number}"))
            found.append(outcome_of(os.listdir, below))
            found.append(outcome_of(lambda path: path.stat().st_size, below / "inside"))
            found.append(outcome_of(create, below / "new"))
            found.append(outcome_of(os.unlink, below / "new"))
        return found

    twins = Twins.of(tree)
    twins.prepare(make)
    for caller in CALLERS.values():
        twins.both(try_all, caller=caller)


def make_one_of_each(directory: Path, umask: int) -> None:
    for mode in (0o000, 0o600, 0o666, 0o777, 0o640):
        suffix = f"{mode:o}-{umask:o}"
        os.close(os.open(directory / f"file-{suffix}", os.O_CREAT | os.O_EXCL | os.O_RDWR, mode))
        os.mkdir(directory / f"directory-{suffix}", mode)
        os.mkfifo(directory / f"fifo-{suffix}", mode)
        os.mknod(directory / f"node-{suffix}", mode | stat.S_IFREG)
        os.symlink("nowhere", directory / f"symlink-{suffix}")
    os.mkdir(directory / f"directory-777-{umask:o}" / "below")


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("caller", [ROOT, OWNER, IN_TEAM], ids=["root", "owner", "in team"])
def test_default_acl_replaces_the_umask(tree: Tree, caller: Caller, umask: int) -> None:
    values = {
        "rich": acl(7, 5, 0, mask=7, users={4002: 7}, groups={CLUB: R}),
        "minimal": acl(7, 5, 5),
        "narrow mask": acl(7, 7, 7, mask=R, users={4002: 7}),
        "nothing": acl(0, 0, 0),
    }

    def make(directory: Path) -> None:
        for name, value in values.items():
            (directory / name).mkdir()
            os.chown(directory / name, 0, TEAM)
            (directory / name).chmod(0o2777)
            os.setxattr(directory / name, DEFAULT, value)

    twins = Twins.of(tree)
    twins.prepare(make)
    for name in values:
        twins.both(lambda directory, n=name: make_one_of_each(directory / n, umask), caller=caller.with_umask(umask))


def test_default_acl_sets_the_mode_of_new_files(tree: Tree) -> None:
    tree.src.chmod(0o777)
    os.setxattr(tree.mnt, DEFAULT, acl(R | W, R | W, R))
    run_as(STRANGER.with_umask(0o077), lambda: os.close(os.open(tree.mnt / "file", os.O_CREAT, 0o666)))
    assert stat.S_IMODE(os.stat(tree.mnt / "file").st_mode) == 0o664
    assert os.stat(tree.src / "file").st_uid == STRANGER.uid


def test_minimal_acl_becomes_the_mode(tree: Tree) -> None:
    def set_it(directory: Path) -> Any:
        path = make_file(directory / "file", 0o600)
        os.setxattr(path, ACCESS, acl(R | W, R, R))
        return outcome_of(os.getxattr, path, ACCESS)

    twins = Twins.of(tree)
    assert twins.both(set_it) == "ENODATA"
    assert stat.S_IMODE(os.stat(twins.mounted / "file").st_mode) == 0o644


@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS.keys())
def test_same_users_may_change_acls_as_in_the_source(tree: Tree, caller: Caller) -> None:
    def make(directory: Path) -> None:
        for name in ("bare", "with", "setgid"):
            make_file(directory / name, 0o2775 if name == "setgid" else 0o664)
            (directory / f"{name} directory").mkdir()
            os.chown(directory / f"{name} directory", 4001, TEAM)
        os.setxattr(directory / "with", ACCESS, acl(7, 5, 0, mask=7, users={4002: 7}))
        os.setxattr(directory / "with directory", DEFAULT, acl(7, 5, 0, mask=7, users={4002: 7}))
        (directory / "setgid directory").chmod(0o2775)
        os.symlink("bare", directory / "symlink")

    def try_one(path: Path, kind: str) -> dict[str, Any]:
        value = acl(R | W, R, 0, mask=R | W, users={4002: R | W})
        without_mask = acl(7, 7, 7, users={4002: 7})
        return outcomes(
            {
                "set": lambda: os.setxattr(path, kind, value, follow_symlinks=False),
                "get": lambda: os.getxattr(path, kind, follow_symlinks=False),
                "broken": lambda: os.setxattr(path, kind, b"\2\0\0\0broken", follow_symlinks=False),
                "no mask": lambda: os.setxattr(path, kind, without_mask, follow_symlinks=False),
                "mode": lambda: oct(os.lstat(path).st_mode),
                "remove": lambda: os.removexattr(path, kind, follow_symlinks=False),
            }
        )

    def try_all(directory: Path) -> list[Any]:
        return [try_one(directory / name, kind) for name in sorted(os.listdir(directory)) for kind in (ACCESS, DEFAULT)]

    twins = Twins.of(tree)
    twins.prepare(make)
    twins.both(try_all, caller=caller)


def test_setfacl_and_getfacl_work(tree: Tree) -> None:
    if not (shutil.which("setfacl") and shutil.which("getfacl")):
        pytest.skip("the acl tools are not installed")

    def use_tools(directory: Path) -> str:
        (directory / "deep" / "deeper").mkdir(parents=True)
        make_file(directory / "deep" / "deeper" / "file")
        for arguments in (["-R", "-m", "u:4002:rwX,g:5001:rX"], ["-R", "-d", "-m", "u:4002:rwX"], ["-x", "g:5001"]):
            subprocess.run(["setfacl", *arguments, "deep"], cwd=directory, check=True, timeout=30)
        make_file(directory / "deep" / "deeper" / "later")
        done = subprocess.run(
            ["getfacl", "-R", "-n", "deep"], cwd=directory, check=True, timeout=30, capture_output=True, text=True
        )
        return done.stdout

    assert "user:4002:rwx" in Twins.of(tree).both(use_tools)


@pytest.mark.parametrize("option", ["never", "auto"])
def test_acl_changed_in_the_source_is_enforced(serve: Serve, option: str) -> None:
    server = serve("--cache", option)
    path = make_file(server.source / "file", 0o600)
    mounted = server.mountpoint / "file"
    assert run_as(NAMED, try_to_open, mounted)["read"] == "EACCES"
    os.setxattr(path, ACCESS, acl(R | W, 0, 0, mask=R, users={4002: R}))
    time.sleep(1.1 if option == "auto" else 0)
    assert run_as(NAMED, try_to_open, mounted)["read"] is None
    os.removexattr(path, ACCESS)
    path.chmod(0o600)
    time.sleep(1.1 if option == "auto" else 0)
    assert run_as(NAMED, try_to_open, mounted)["read"] == "EACCES"
    with pytest.raises(OSError) as caught:
        os.getxattr(mounted, ACCESS)
    assert caught.value.errno == errno.ENODATA
