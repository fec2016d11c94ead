"""What a mount refuses or ignores: --deny, --chown and --chmod."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llloop
from tests.conftest import Serve
from tests.expect import fails, outcome
from tests.mount.command_line import check_refused
from tests.server import Server
from tests.server_processes import is_replaced, process_ids
from tests.syscalls import renameat2

pytestmark = [pytest.mark.mounted, pytest.mark.own_loop]

RENAME_EXCHANGE = 2

Action = Callable[[Path], Any]


def create_unnamed(mnt: Path) -> None:
    os.close(os.open(mnt, os.O_TMPFILE | os.O_RDWR))


# Each change, and the values of --deny that refuse it.
CHANGES: dict[str, tuple[Action, set[str]]] = {
    "create": (lambda mnt: (mnt / "new").touch(), {"create"}),
    "mkdir": (lambda mnt: (mnt / "new").mkdir(), {"create"}),
    "mkfifo": (lambda mnt: os.mkfifo(mnt / "new"), {"create"}),
    "unnamed": (create_unnamed, {"create"}),
    "symlink": (lambda mnt: (mnt / "new").symlink_to("file"), {"create", "symlink"}),
    "link": (lambda mnt: os.link(mnt / "file", mnt / "new"), {"create", "link"}),
    "unlink": (lambda mnt: (mnt / "file").unlink(), {"delete"}),
    "rmdir": (lambda mnt: (mnt / "empty").rmdir(), {"delete"}),
    "rename": (lambda mnt: (mnt / "file").rename(mnt / "new"), {"rename"}),
    "replace": (lambda mnt: (mnt / "file").rename(mnt / "other"), {"rename", "delete"}),
    "exchange": (lambda mnt: renameat2(mnt / "file", mnt / "other", RENAME_EXCHANGE), {"rename"}),
    "setxattr": (lambda mnt: os.setxattr(mnt / "file", "user.new", b"value"), {"xattr"}),
    "removexattr": (lambda mnt: os.removexattr(mnt / "file", "user.old"), {"xattr"}),
    "write": (lambda mnt: (mnt / "file").write_bytes(b"changed"), set()),
    "chmod": (lambda mnt: (mnt / "file").chmod(0o600), set()),
}


def fill(directory: Path) -> None:
    for name in ("file", "other"):
        (directory / name).write_bytes(name.encode())
    os.setxattr(directory / "file", "user.old", b"value")
    (directory / "empty").mkdir()


def snapshot(directory: Path) -> dict[str, Any]:
    return {
        path.name: (path.lstat().st_ino, stat.filemode(path.lstat().st_mode), os.listxattr(path, follow_symlinks=False))
        for path in directory.iterdir()
    }


@pytest.mark.parametrize("what", ["create", "delete", "rename", "link", "symlink", "xattr"])
def test_denied_requests_change_nothing(serve: Serve, what: str) -> None:
    server = serve(f"--deny={what}")
    for name, (change, denied_by) in CHANGES.items():
        place = server.source / name
        place.mkdir()
        fill(place)
        before = snapshot(place)
        result = outcome(change, server.mountpoint / name)
        if what in denied_by:
            assert result == "EPERM", name
            assert snapshot(place) == before, name
        else:
            assert result != "EPERM", name
            assert name == "write" or snapshot(place) != before or name == "unnamed", name


def test_several_denials(serve: Serve) -> None:
    server = serve("--deny", "rename,delete", "--deny=link")
    fill(server.source)
    for name in ("unlink", "rmdir", "rename", "replace", "link"):
        assert outcome(CHANGES[name][0], server.mountpoint) == "EPERM", name
    (server.mountpoint / "new").touch()


@pytest.mark.root
def test_denied_xattrs_let_a_write_clear_capabilities(serve: Serve) -> None:
    server = serve("--deny=xattr")
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    (server.source / "file").touch()
    os.setxattr(server.source / "file", "security.capability", capability)
    (server.mountpoint / "file").write_bytes(b"changed")
    assert os.listxattr(server.source / "file") == []


def attributes(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid


CHANGES_OF_ATTRIBUTES: dict[str, tuple[str, Action]] = {
    "chmod": ("--chmod", lambda file: file.chmod(0o606)),
    "fchmod": ("--chmod", lambda file: on_descriptor(os.fchmod, file, 0o606)),
    "chown": ("--chown", lambda file: os.chown(file, 4001, 4002)),
    "chgrp": ("--chown", lambda file: os.chown(file, -1, 4002)),
    "fchown": ("--chown", lambda file: on_descriptor(os.fchown, file, 4001, 4002)),
}


def on_descriptor(call: Callable[..., None], file: Path, *values: int) -> None:
    with file.open("rb") as opened:
        call(opened.fileno(), *values)


@pytest.mark.root
@pytest.mark.parametrize("name", CHANGES_OF_ATTRIBUTES)
@pytest.mark.parametrize("policy", ["ignore", "deny", "real"])
def test_changes_of_owner_and_mode(serve: Serve, name: str, policy: str) -> None:
    option, change = CHANGES_OF_ATTRIBUTES[name]
    server = serve(option, policy)
    source, file = server.source / "file", server.mountpoint / "file"
    source.write_bytes(b"content")
    source.chmod(0o4755)
    before = attributes(source)
    assert outcome(change, file) == ("EPERM" if policy == "deny" else None)
    assert (attributes(source) == before) == (policy != "real")
    assert attributes(file) == attributes(source)
    # Other attributes can be changed.
    os.utime(file, (1, 2))
    os.truncate(file, 3)
    assert (source.stat().st_mtime, source.stat().st_size) != (2, 7)
    assert source.stat().st_size == 3


@pytest.mark.root
def test_an_acl_is_a_change_of_the_mode(serve: Serve) -> None:
    acl = bytes.fromhex("02000000 01000700ffffffff 04000700ffffffff 20000700ffffffff")
    for policy, expected in (("ignore", None), ("deny", "EPERM")):
        server = serve("--chmod", policy)
        (server.source / "file").touch(0o600)
        file = server.mountpoint / "file"
        assert outcome(os.setxattr, file, "system.posix_acl_access", acl) == expected
        assert attributes(server.source / "file")[0] == attributes(file)[0] == 0o600


@pytest.mark.root
def test_policies_survive_the_front(serve: Serve) -> None:
    server: Server = serve("--deny=delete", "--chmod=deny")
    server.expect_log("llloop-front was killed by signal 9")
    (server.source / "file").touch(0o644)
    (before,) = process_ids(server, "front")
    os.kill(before, 9)
    assert is_replaced(server, "front", before)
    for change in (os.unlink, lambda file: file.chmod(0o600)):
        with fails(errno.EPERM):
            change(server.mountpoint / "file")


def test_refusals(tmp_path: Path) -> None:
    check_refused(
        tmp_path,
        (["--deny=writing"], "--deny must be one of create, delete, rename, link, symlink, xattr, not 'writing'"),
        (["--chown=never"], "Invalid value for '--chown'"),
        (["--deny=delete", "--loop=llfuse"], "exclude each other"),
        (["--chmod=deny", "--loop=llfuse"], "exclude each other"),
        (["--chown=ignore", "--loop=llfuse"], "exclude each other"),
    )


def test_python(tmp_path: Path) -> None:
    for name in ("src", "mnt"):
        (tmp_path / name).mkdir()
    (tmp_path / "src/file").touch()
    with llloop.mount(tmp_path / "src", tmp_path / "mnt", deny=["delete", "link"], chmod="deny"):
        with fails(errno.EPERM):
            (tmp_path / "mnt/file").unlink()
        with fails(errno.EPERM):
            (tmp_path / "mnt/file").chmod(0o600)


def test_shown_attributes_in_a_mount_of_any_user(serve: Serve) -> None:
    server = serve("--force-user=7001", "--force-group=7002", "--mode=a+rX,go-w")
    (server.source / "file").write_bytes(b"content")
    (server.source / "file").chmod(0o600)
    file = server.mountpoint / "file"
    assert attributes(file) == (0o644, 7001, 7002)
    assert file.read_bytes() == b"content"
    if os.geteuid() != 0:
        with fails(errno.EACCES):  # the user who mounts is not the owner in the mount
            file.write_bytes(b"changed")
        with fails(errno.EPERM):
            file.chmod(0o666)
