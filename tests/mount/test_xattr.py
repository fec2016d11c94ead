"""setxattr, getxattr, listxattr, removexattr, on each file type."""

from __future__ import annotations

import errno
import os

import pytest

from tests.expect import fails, outcome, python
from tests.server import Tree
from tests.syscalls import getxattr_into, listxattr_into, opened


@pytest.fixture(autouse=True)
def source_with_attributes(tree: Tree) -> None:
    (tree.src / "probe").touch()
    try:
        os.setxattr(tree.src / "probe", "user.probe", b"")
    except OSError as error:
        pytest.skip(f"the source has no user attributes: {error}")
    finally:
        os.unlink(tree.src / "probe")


def test_set_get_list_remove(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    (tree.mnt / "directory").mkdir()
    for name in ("file", "directory"):
        path = tree.mnt / name
        before = set(os.listxattr(path))
        os.setxattr(path, "user.one", b"first")
        os.setxattr(path, "user.two", bytes(range(256)))
        assert os.getxattr(path, "user.one") == os.getxattr(tree.src / name, "user.one") == b"first"
        assert os.getxattr(path, "user.two") == os.getxattr(tree.src / name, "user.two") == bytes(range(256))
        assert set(os.listxattr(path)) == set(os.listxattr(tree.src / name)) == before | {"user.one", "user.two"}
        os.setxattr(path, "user.one", b"changed and longer than before")
        assert os.getxattr(path, "user.one") == b"changed and longer than before"
        os.removexattr(path, "user.one")
        assert set(os.listxattr(path)) == set(os.listxattr(tree.src / name)) == before | {"user.two"}
        with fails(errno.ENODATA):
            os.getxattr(path, "user.one")
        with fails(errno.ENODATA):
            os.removexattr(path, "user.one")


def test_set_directly_in_the_source(tree: Tree) -> None:
    (tree.src / "file").touch()
    os.setxattr(tree.src / "file", "user.direct", b"1")
    assert os.getxattr(tree.mnt / "file", "user.direct") == b"1"
    os.setxattr(tree.src / "file", "user.direct", b"two")
    assert os.getxattr(tree.mnt / "file", "user.direct") == b"two"
    os.removexattr(tree.src / "file", "user.direct")
    with fails(errno.ENODATA):
        os.getxattr(tree.mnt / "file", "user.direct")


def test_create_and_replace(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    path = tree.mnt / "file"
    with fails(errno.ENODATA):
        os.setxattr(path, "user.a", b"x", os.XATTR_REPLACE)
    assert "user.a" not in os.listxattr(tree.src / "file")
    os.setxattr(path, "user.a", b"created", os.XATTR_CREATE)
    with fails(errno.EEXIST):
        os.setxattr(path, "user.a", b"again", os.XATTR_CREATE)
    assert os.getxattr(tree.src / "file", "user.a") == b"created"
    os.setxattr(path, "user.a", b"replaced", os.XATTR_REPLACE)
    assert os.getxattr(tree.src / "file", "user.a") == b"replaced"
    with fails(errno.EINVAL):
        os.setxattr(path, "user.a", b"x", 4)


def test_empty_value(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    os.setxattr(tree.mnt / "file", "user.empty", b"")
    assert os.getxattr(tree.mnt / "file", "user.empty") == b""
    assert os.getxattr(tree.src / "file", "user.empty") == b""
    assert "user.empty" in os.listxattr(tree.mnt / "file")
    os.setxattr(tree.mnt / "file", "user.empty", b"full")
    os.setxattr(tree.mnt / "file", "user.empty", b"", os.XATTR_REPLACE)
    assert os.getxattr(tree.src / "file", "user.empty") == b""


def test_buffers_of_any_size(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    path = tree.mnt / "file"
    os.setxattr(path, "user.ten", b"0123456789")
    assert getxattr_into(path, b"user.ten", 0) == 10
    assert getxattr_into(path, b"user.ten", 10) == 10
    assert getxattr_into(path, b"user.ten", 1000) == 10
    for size in (1, 9):
        with fails(errno.ERANGE):
            getxattr_into(path, b"user.ten", size)
    whole = listxattr_into(path, 0)
    assert whole == listxattr_into(tree.src / "file", 0) >= len(b"user.ten\0")
    assert listxattr_into(path, whole) == listxattr_into(path, whole + 1000) == whole
    for size in (1, whole - 1):
        with fails(errno.ERANGE):
            listxattr_into(path, size)


@pytest.mark.parametrize("size", [1, 100, 3000, 4096, 30_000, 65_536, 65_537])
def test_values_of_any_size(tree: Tree, size: int) -> None:
    (tree.src / "reference").touch()
    (tree.mnt / "file").touch()
    value = os.urandom(size)
    expected = outcome(os.setxattr, tree.src / "reference", "user.large", value)
    assert outcome(os.setxattr, tree.mnt / "file", "user.large", value) == expected
    if expected is None:
        assert os.getxattr(tree.mnt / "file", "user.large") == value
        assert os.getxattr(tree.src / "file", "user.large") == value


def test_many_attributes(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    # 100 of them fit into the single block that ext4 has for all extended attributes.
    for number in range(100):
        os.setxattr(tree.mnt / "file", f"user.{number}", b"%d" % number)
    names = [name for name in os.listxattr(tree.mnt / "file") if name.startswith("user.")]
    assert sorted(names) == sorted(f"user.{number}" for number in range(100))
    for number in range(100):
        assert os.getxattr(tree.mnt / "file", f"user.{number}") == b"%d" % number


def test_unusual_names(tree: Tree) -> None:
    for side, file in ((tree.src, "reference"), (tree.mnt, "file")):
        (side / file).touch()
    lengths = ("user." + "x" * 250, "user." + "x" * 251)
    characters = ("user.", "user.a.b.c", "user.with space", "user.\u00e4\u4e16")
    for name in (*lengths, *characters, "nonsense.name", "plain", "", "user", "system.nothing"):
        outcomes = []
        for path in (tree.src / "reference", tree.mnt / "file"):
            outcomes.append(
                (
                    outcome(os.getxattr, path, name),
                    outcome(os.setxattr, path, name, b"v"),
                    outcome(os.getxattr, path, name),
                    outcome(os.removexattr, path, name),
                )
            )
        assert outcomes[0] == outcomes[1], name


def test_undecodable_name(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    name = b"user.\xff\xfe"
    os.setxattr(tree.mnt / "file", name, b"v")
    assert os.getxattr(tree.src / "file", name) == b"v"
    assert os.fsdecode(name) in os.listxattr(tree.mnt / "file")
    os.removexattr(tree.mnt / "file", name)


def test_through_descriptors(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDONLY) as descriptor:
        os.setxattr(descriptor, "user.fd", b"by descriptor")
        assert os.getxattr(descriptor, "user.fd") == b"by descriptor"
        assert "user.fd" in os.listxattr(descriptor)
        assert os.getxattr(tree.src / "file", "user.fd") == b"by descriptor"
        os.removexattr(descriptor, "user.fd")
    with opened(tree.mnt, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.setxattr(descriptor, "user.fd", b"directory")
        assert os.getxattr(tree.src, "user.fd") == b"directory"


def test_of_an_unlinked_open_file(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        os.setxattr(descriptor, "user.before", b"1")
        os.unlink(tree.mnt / "file")
        os.setxattr(descriptor, "user.after", b"2")
        assert os.getxattr(descriptor, "user.before") == b"1"
        assert os.getxattr(descriptor, "user.after") == b"2"
        assert {"user.before", "user.after"} <= set(os.listxattr(descriptor))
        os.removexattr(descriptor, "user.before")
        with fails(errno.ENODATA):
            os.getxattr(descriptor, "user.before")


def test_on_symlinks(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    os.symlink("file", tree.mnt / "symlink")
    os.symlink("nowhere", tree.mnt / "dangling")
    os.setxattr(tree.mnt / "symlink", "user.followed", b"target")
    assert os.getxattr(tree.src / "file", "user.followed") == b"target"
    with fails(errno.ENOENT):
        os.setxattr(tree.mnt / "dangling", "user.x", b"x")
    with fails(errno.EPERM):
        os.setxattr(tree.mnt / "symlink", "user.x", b"x", follow_symlinks=False)
    os.symlink("file", tree.src / "reference")
    reading = [
        outcome(os.getxattr, path, "user.x", follow_symlinks=False)
        for path in (tree.src / "reference", tree.mnt / "symlink")
    ]
    assert reading[0] == reading[1]
    listing = [os.listxattr(path, follow_symlinks=False) for path in (tree.src / "reference", tree.mnt / "symlink")]
    assert listing[0] == listing[1]


@pytest.mark.root
def test_trusted_attributes_on_symlinks_and_files(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    os.symlink("file", tree.mnt / "symlink")
    os.symlink("nowhere", tree.mnt / "dangling")
    os.mkfifo(tree.mnt / "fifo")
    for name in ("file", "symlink", "dangling", "fifo"):
        os.setxattr(tree.mnt / name, "trusted.note", name.encode(), follow_symlinks=False)
    for name in ("file", "symlink", "dangling", "fifo"):
        for side in (tree.mnt, tree.src):
            assert os.getxattr(side / name, "trusted.note", follow_symlinks=False) == name.encode()
            assert "trusted.note" in os.listxattr(side / name, follow_symlinks=False)
    os.removexattr(tree.mnt / "symlink", "trusted.note", follow_symlinks=False)
    with fails(errno.ENODATA):
        os.getxattr(tree.src / "symlink", "trusted.note", follow_symlinks=False)
    assert os.getxattr(tree.src / "file", "trusted.note") == b"file"


@pytest.mark.user
@pytest.mark.skipif(os.geteuid() == 0, reason="root may set them")
def test_ordinary_user_cannot_set_trusted_attributes(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    with fails(errno.EPERM):
        os.setxattr(tree.mnt / "file", "trusted.x", b"x")
    with fails(errno.ENODATA):
        os.getxattr(tree.mnt / "file", "trusted.x")


def test_xattrs_belong_to_the_file(tree: Tree) -> None:
    (tree.mnt / "first").touch()
    os.setxattr(tree.mnt / "first", "user.tag", b"tag")
    os.link(tree.mnt / "first", tree.mnt / "second")
    os.rename(tree.mnt / "first", tree.mnt / "renamed")
    assert os.getxattr(tree.mnt / "second", "user.tag") == os.getxattr(tree.mnt / "renamed", "user.tag") == b"tag"
    (tree.mnt / "first").touch()
    with fails(errno.ENODATA):
        os.getxattr(tree.mnt / "first", "user.tag")


@pytest.mark.at_once("the kernel takes its own word for sizes and times of a file that it knows")
def test_setting_updates_the_change_time(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    before = os.stat(tree.mnt / "file")
    python("import os, sys, time; time.sleep(0.02); os.setxattr(sys.argv[1], 'user.x', b'')", tree.mnt / "file")
    after = os.stat(tree.mnt / "file")
    assert after.st_ctime_ns == os.stat(tree.src / "file").st_ctime_ns
    assert (after.st_ctime_ns > before.st_ctime_ns) and after.st_mtime_ns == before.st_mtime_ns


def test_errors_of_missing_files_and_names(tree: Tree) -> None:
    for action in (
        lambda: os.getxattr(tree.mnt / "missing", "user.x"),
        lambda: os.setxattr(tree.mnt / "missing", "user.x", b""),
        lambda: os.listxattr(tree.mnt / "missing"),
        lambda: os.removexattr(tree.mnt / "missing", "user.x"),
    ):
        with fails(errno.ENOENT):
            action()


def test_tree_copied_with_xattrs(tree: Tree) -> None:
    (tree.src / "from").mkdir()
    for number in range(5):
        (tree.src / "from" / f"{number}").touch()
        os.setxattr(tree.src / "from" / f"{number}", "user.number", b"%d" % number)
    python(
        "import subprocess, sys; subprocess.run(['cp', '-a', *sys.argv[1:]], check=True)",
        tree.mnt / "from",
        tree.mnt / "to",
    )
    for number in range(5):
        assert os.getxattr(tree.src / "to" / f"{number}", "user.number") == b"%d" % number
