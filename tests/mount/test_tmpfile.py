"""O_TMPFILE: unnamed files, and linking them."""

from __future__ import annotations

import errno
import os
import stat
import tempfile

import pytest

from tests.expect import fails, pattern, same_fields, same_status
from tests.server import Tree
from tests.syscalls import link_descriptor, opened


@pytest.mark.own_loop
def test_tmpfile_is_an_unnamed_file(tree: Tree) -> None:
    content = pattern(300_001)
    with opened(tree.mnt, os.O_TMPFILE | os.O_RDWR, 0o640) as descriptor:
        status = os.fstat(descriptor)
        assert (status.st_nlink, status.st_size, stat.S_IMODE(status.st_mode)) == (0, 0, 0o640)
        assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())
        assert os.write(descriptor, content) == len(content)
        assert os.pread(descriptor, 400_000, 0) == content
        os.ftruncate(descriptor, 1000)
        os.fchmod(descriptor, 0o600)
        os.utime(descriptor, ns=(1, 2))
        os.fsync(descriptor)
        status = os.fstat(descriptor)
        assert (status.st_size, stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (1000, 0o600, 2)
        assert os.listdir(tree.mnt) == os.listdir(tree.src) == []
        with opened(f"/proc/self/fd/{descriptor}", os.O_RDONLY) as again:
            assert os.read(again, 2000) == content[:1000]
    assert os.listdir(tree.src) == []


@pytest.mark.own_loop
def test_tmpfile_is_linked(tree: Tree) -> None:
    (tree.mnt / "sub").mkdir()
    (tree.mnt / "taken").write_bytes(b"taken")
    with opened(tree.mnt, os.O_TMPFILE | os.O_WRONLY, 0o644) as descriptor:
        os.write(descriptor, b"complete ")
        with fails(errno.EEXIST):
            link_descriptor(descriptor, tree.mnt / "taken")
        link_descriptor(descriptor, tree.mnt / "sub" / "name")
        assert os.fstat(descriptor).st_nlink == 1
        link_descriptor(descriptor, tree.mnt / "second")
        os.write(descriptor, b"and more")
        same_fields(os.fstat(descriptor), os.stat(tree.src / "second"))
    for path in (tree.mnt / "sub" / "name", tree.mnt / "second", tree.src / "sub" / "name"):
        assert path.read_bytes() == b"complete and more"
    assert os.stat(tree.mnt / "second").st_nlink == 2
    same_status(tree.mnt / "second", tree.src / "second")
    os.unlink(tree.mnt / "second")
    os.chmod(tree.mnt / "sub" / "name", 0o600)
    assert (tree.mnt / "sub" / "name").read_bytes() == b"complete and more"


@pytest.mark.own_loop
def test_tmpfile_with_o_excl_cannot_be_linked(tree: Tree) -> None:
    with opened(tree.mnt, os.O_TMPFILE | os.O_RDWR | os.O_EXCL) as descriptor:
        os.write(descriptor, b"private")
        with fails(errno.ENOENT):
            link_descriptor(descriptor, tree.mnt / "name")
    assert os.listdir(tree.src) == []


@pytest.mark.own_loop
def test_tmpfile_follows_the_umask(tree: Tree) -> None:
    for mask, expected in ((0o077, 0o600), (0, 0o666), (0o222, 0o444)):
        previous = os.umask(mask)
        try:
            with opened(tree.mnt, os.O_TMPFILE | os.O_RDWR, 0o666) as descriptor:
                assert stat.S_IMODE(os.fstat(descriptor).st_mode) == expected
        finally:
            os.umask(previous)


@pytest.mark.own_loop
def test_tmpfile_errors(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    with fails(errno.ENOTDIR):
        os.open(tree.mnt / "file", os.O_TMPFILE | os.O_RDWR)
    with fails(errno.ENOENT):
        os.open(tree.mnt / "missing", os.O_TMPFILE | os.O_RDWR)
    with fails(errno.EINVAL):
        os.open(tree.mnt, os.O_TMPFILE | os.O_RDONLY)


@pytest.mark.own_loop
def test_many_tmpfiles(tree: Tree) -> None:
    descriptors = []
    try:
        for number in range(100):
            descriptors.append(os.open(tree.mnt, os.O_TMPFILE | os.O_RDWR))
            os.write(descriptors[-1], b"%d" % number)
        for number, descriptor in enumerate(descriptors):
            assert os.pread(descriptor, 10, 0) == b"%d" % number
        assert len({os.fstat(descriptor).st_ino for descriptor in descriptors}) == 100
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_temporary_files_of_python(tree: Tree) -> None:
    with tempfile.TemporaryFile(dir=tree.mnt) as file:
        file.write(b"temporary")
        file.seek(0)
        assert file.read() == b"temporary"
        assert os.listdir(tree.src) == []
    with tempfile.NamedTemporaryFile(dir=tree.mnt) as named:
        named.write(b"named")
        named.flush()
        assert os.stat(named.name).st_size == 5
    assert os.listdir(tree.src) == []
