"""The tree on a temporary directory: every operation, without a kernel."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llloop.front.inodes import ROOT
from llloop.front.request import FuseRequest
from llloop.front.requester import Requester
from llloop.front.tree import Changes, check_name
from llloop.linux import fuse, syscalls
from llloop.shared.messages import Operation, decode
from tests.expect import fails
from tests.unit.source import MYSELF, Source
from tests.unit.support import open_descriptors, packets


@pytest.fixture
def file(source: Source) -> int:
    (source.path / "file").write_bytes(b"content")
    return source.tree.lookup(ROOT, b"file")[0]


# Names


def test_lookup_returns_attributes_of_the_source(source: Source, file: int) -> None:
    status = (source.path / "file").stat()
    nodeid, found = source.tree.lookup(ROOT, b"file")
    assert nodeid == file
    assert found.ino == status.st_ino
    assert (found.size, found.mode, found.nlink, found.uid) == (7, status.st_mode, 1, status.st_uid)
    assert found.mtime * 10**9 + found.mtime_nsec == status.st_mtime_ns
    inodes = source.context.inodes
    assert inodes.lookups(file) == 0, "whoever answers the kernel counts"
    inodes.count(file)
    inodes.count(file)
    assert inodes.lookups(file) == 2


def test_lookup_of_a_missing_name(source: Source, file: int) -> None:
    with fails(errno.ENOENT):
        source.tree.lookup(ROOT, b"missing")
    with fails(errno.ENAMETOOLONG):
        source.tree.lookup(ROOT, b"x" * 256)
    with fails(errno.ENOTDIR, errno.ESTALE):
        source.tree.lookup(file, b"below a file")
    with fails(errno.ESTALE):
        source.tree.lookup(4711, b"x")


@given(st.binary(max_size=12))
def test_names_must_be_single_components(name: bytes) -> None:
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        with fails(errno.EINVAL):
            check_name(name)
    else:
        assert check_name(name) == name


@pytest.mark.parametrize("name", [b"..", b".", b"", b"a/b", b"../secret", b"/etc/passwd", b"..\0", b"a\0b"])
def test_names_do_not_leave_the_source(source: Source, file: int, name: bytes) -> None:
    (source.path.parent / "secret").write_text("secret")
    tree = source.tree
    for action in (
        lambda: tree.lookup(ROOT, name),
        lambda: tree.mkdir(ROOT, name, 0o755, MYSELF),
        lambda: tree.mknod(ROOT, name, stat.S_IFREG | 0o644, 0, MYSELF),
        lambda: tree.symlink(ROOT, name, b"x", MYSELF),
        lambda: tree.link(file, ROOT, name, MYSELF),
        lambda: tree.unlink(ROOT, name, MYSELF),
        lambda: tree.rmdir(ROOT, name, MYSELF),
        lambda: tree.rename(ROOT, name, ROOT, b"new", 0, MYSELF),
        lambda: tree.rename(ROOT, b"file", ROOT, name, 0, MYSELF),
        lambda: source.files.create(ROOT, name, 0o644, os.O_RDWR, MYSELF),
    ):
        with fails(errno.EINVAL):
            action()
    assert sorted(os.listdir(source.path.parent)) == ["secret", "source"]
    assert os.listdir(source.path) == ["file"]


def test_symlinks_are_not_followed(source: Source) -> None:
    (source.path.parent / "outside").mkdir()
    (source.path / "link").symlink_to("../outside")
    nodeid, found = source.tree.lookup(ROOT, b"link")
    assert stat.S_ISLNK(found.mode)
    assert source.tree.readlink(nodeid) == b"../outside"
    with fails(errno.ESTALE, errno.ENOTDIR):
        source.tree.lookup(nodeid, b"x")
    with fails(errno.ESTALE, errno.ENOTDIR):
        source.tree.mkdir(nodeid, b"x", 0o755, MYSELF)
    assert os.listdir(source.path.parent / "outside") == []


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK])
def test_mknod(source: Source, kind: int) -> None:
    nodeid, found = source.tree.mknod(ROOT, b"new", kind | 0o666, 0, MYSELF)
    assert stat.S_IFMT(found.mode) == kind
    assert stat.S_IMODE(found.mode) == 0o644
    assert source.context.inodes.get(nodeid).number == os.stat(source.path / "new").st_ino
    with fails(errno.EEXIST):
        source.tree.mknod(ROOT, b"new", kind | 0o666, 0, MYSELF)


def test_mkdir_and_symlink(source: Source) -> None:
    nodeid, found = source.tree.mkdir(ROOT, b"dir", 0o1777, Requester(MYSELF.uid, MYSELF.gid, 0o027))
    assert stat.S_IMODE(found.mode) == 0o1750
    link, found = source.tree.symlink(nodeid, b"link", b"\xff/target", MYSELF)
    assert found.size == 8
    assert os.readlink(os.fsencode(source.path) + b"/dir/link") == b"\xff/target"
    assert source.tree.readlink(link) == b"\xff/target"


def test_new_objects_belong_to_the_requester(source: Source) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can act as others")
    who = Requester(4711, 4712, 0)
    os.chmod(source.path, 0o777)
    _, found = source.tree.mkdir(ROOT, b"dir", 0o777, who)
    assert (found.uid, found.gid, stat.S_IMODE(found.mode)) == (4711, 4712, 0o777)
    _, _, found = source.files.create(ROOT, b"file", 0o666, os.O_RDWR, who)
    assert (found.uid, found.gid, stat.S_IMODE(found.mode)) == (4711, 4712, 0o666)
    _, found = source.tree.mkdir(ROOT, b"own", 0o777, Requester(0, 0, 0o077))
    assert (found.uid, found.gid, stat.S_IMODE(found.mode)) == (0, 0, 0o700)


def test_link(source: Source, file: int) -> None:
    nodeid, found = source.tree.link(file, ROOT, b"second", MYSELF)
    assert (nodeid, found.nlink) == (file, 2)
    assert (source.path / "second").samefile(source.path / "file")
    with fails(errno.EEXIST):
        source.tree.link(file, ROOT, b"file", MYSELF)


def test_link_to_a_symlink_does_not_follow_it(source: Source, file: int) -> None:
    link, _ = source.tree.symlink(ROOT, b"link", b"file", MYSELF)
    source.tree.link(link, ROOT, b"second", MYSELF)
    assert os.readlink(source.path / "second") == "file"


def test_unlinked_inode_is_pinned(source: Source, file: int) -> None:
    source.tree.unlink(ROOT, b"file", MYSELF)
    assert os.listdir(source.path) == []
    found = source.tree.getattr(file)
    assert (found.nlink, found.size) == (0, 7)
    source.tree.setattr(file, Changes(fuse.FATTR_SIZE | fuse.FATTR_MODE, mode=0o600, size=3), None, MYSELF)
    number, found = source.files.open(file, os.O_RDONLY, False, MYSELF)
    assert os.pread(source.context.handles.get(number).descriptor, 10, 0) == b"con"
    assert stat.S_IMODE(found.mode) == 0o600


def test_last_forget_drops_the_inode(source: Source) -> None:
    tree = source.tree
    before = open_descriptors()
    for number in range(50):
        nodeid, _ = tree.mknod(ROOT, b"%d" % number, stat.S_IFREG | 0o644, 0, MYSELF)
        tree.link(nodeid, ROOT, b"link-%d" % number, MYSELF)
        tree.unlink(ROOT, b"%d" % number, MYSELF)
        if number % 2:
            tree.unlink(ROOT, b"link-%d" % number, MYSELF)
        tree.forget(nodeid, 1)
        tree.forget(nodeid, 1)
        assert nodeid not in source.context.inodes
    assert len(source.context.inodes) == 1
    assert open_descriptors() == before


def test_replaced_file_is_not_changed_by_name(source: Source, file: int) -> None:
    """If a name leads to another file by now, the kernel must look it up again."""
    (source.path / "unknown").write_text("unknown")
    (source.path / "other").write_text("known under another name")
    source.tree.lookup(ROOT, b"other")
    os.rename(source.path / "other", source.path / "moved")
    before = open_descriptors()
    acts: list[Callable[[bytes], object]] = [
        lambda n: source.tree.unlink(ROOT, n, MYSELF),
        lambda n: source.tree.rmdir(ROOT, n, MYSELF),
        lambda n: source.tree.rename(ROOT, n, ROOT, b"new", 0, MYSELF),
        lambda n: source.tree.rename(ROOT, b"file", ROOT, n, 0, MYSELF),
        lambda n: source.tree.rename(ROOT, b"file", ROOT, n, syscalls.RENAME_EXCHANGE, MYSELF),
    ]
    for name in (b"unknown", b"moved"):
        for act in acts:
            with fails(errno.ESTALE):
                act(name)
    assert sorted(os.listdir(source.path)) == ["file", "moved", "unknown"]
    assert open_descriptors() == before
    source.tree.lookup(ROOT, b"moved")
    source.tree.rename(ROOT, b"file", ROOT, b"moved", 0, MYSELF)
    assert sorted(os.listdir(source.path)) == ["moved", "unknown"]


def test_failed_removals_leak_nothing(source: Source, file: int) -> None:
    source.tree.mkdir(ROOT, b"dir", 0o755, MYSELF)
    (source.path / "dir" / "x").write_text("x")
    before = open_descriptors()
    failing: list[tuple[int, Callable[[], object]]] = [
        (errno.ENOENT, lambda: source.tree.unlink(ROOT, b"missing", MYSELF)),
        (errno.EISDIR, lambda: source.tree.unlink(ROOT, b"dir", MYSELF)),
        (errno.ENOTEMPTY, lambda: source.tree.rmdir(ROOT, b"dir", MYSELF)),
        (errno.ENOTDIR, lambda: source.tree.rmdir(ROOT, b"file", MYSELF)),
    ]
    for number, action in failing:
        with fails(number):
            action()
    assert open_descriptors() == before
    assert source.tree.getattr(file).nlink == 1


def test_removed_directory_accepts_no_names(source: Source) -> None:
    nodeid, _ = source.tree.mkdir(ROOT, b"dir", 0o755, MYSELF)
    source.tree.rmdir(ROOT, b"dir", MYSELF)
    assert source.tree.getattr(nodeid).nlink == 0
    with fails(errno.ENOENT):
        source.tree.lookup(nodeid, b"x")
    with fails(errno.ENOENT):
        source.tree.mkdir(nodeid, b"x", 0o755, MYSELF)


# Renames


def test_rename_within_and_across_directories(source: Source, file: int) -> None:
    directory, _ = source.tree.mkdir(ROOT, b"dir", 0o755, MYSELF)
    source.tree.rename(ROOT, b"file", directory, b"moved", 0, MYSELF)
    assert source.tree.getattr(file).size == 7
    assert list(source.tree.directory_fds.places(file)) == [(directory, b"moved")]
    source.tree.rename(ROOT, b"dir", ROOT, b"renamed", 0, MYSELF)
    assert source.tree.getattr(file).size == 7, "what is below a renamed directory is still found"


def test_rename_pins_the_replaced_file(source: Source, file: int) -> None:
    (source.path / "victim").write_text("victim!!")
    victim, _ = source.tree.lookup(ROOT, b"victim")
    source.tree.rename(ROOT, b"file", ROOT, b"victim", 0, MYSELF)
    assert source.tree.getattr(victim).nlink == 0
    assert source.tree.getattr(victim).size == 8
    assert source.tree.getattr(file).size == 7


def test_rename_over_another_name_of_the_file_does_nothing(source: Source, file: int) -> None:
    source.tree.link(file, ROOT, b"second", MYSELF)
    before = open_descriptors()
    source.tree.rename(ROOT, b"file", ROOT, b"second", 0, MYSELF)
    assert sorted(os.listdir(source.path)) == ["file", "second"]
    assert set(source.tree.directory_fds.places(file)) == {(ROOT, b"file"), (ROOT, b"second")}
    assert open_descriptors() == before


def test_exchange(source: Source, file: int) -> None:
    directory, _ = source.tree.mkdir(ROOT, b"dir", 0o755, MYSELF)
    inner, _ = source.tree.mknod(directory, b"inner", stat.S_IFREG | 0o644, 0, MYSELF)
    before = open_descriptors()
    source.tree.rename(ROOT, b"file", ROOT, b"dir", syscalls.RENAME_EXCHANGE, MYSELF)
    assert source.tree.lookup(ROOT, b"dir")[0] == file
    assert source.tree.getattr(file).size == 7
    assert source.tree.getattr(inner).ino == (source.path / "file" / "inner").stat().st_ino
    assert source.tree.getattr(directory).ino == (source.path / "file").stat().st_ino
    assert open_descriptors() == before


def test_failed_renames_change_nothing(source: Source, file: int) -> None:
    source.tree.mkdir(ROOT, b"dir", 0o755, MYSELF)
    (source.path / "other").write_text("other")
    other, _ = source.tree.lookup(ROOT, b"other")
    before = open_descriptors()
    failing: list[tuple[int, Callable[[], object]]] = [
        (errno.ENOENT, lambda: source.tree.rename(ROOT, b"missing", ROOT, b"x", 0, MYSELF)),
        (errno.EISDIR, lambda: source.tree.rename(ROOT, b"file", ROOT, b"dir", 0, MYSELF)),
        (errno.EEXIST, lambda: source.tree.rename(ROOT, b"file", ROOT, b"other", syscalls.RENAME_NOREPLACE, MYSELF)),
        (errno.ENOENT, lambda: source.tree.rename(ROOT, b"file", ROOT, b"x", syscalls.RENAME_EXCHANGE, MYSELF)),
        (errno.EINVAL, lambda: source.tree.rename(ROOT, b"file", ROOT, b"x", 1 << 20, MYSELF)),
    ]
    for number, action in failing:
        with fails(number):
            action()
    assert open_descriptors() == before
    assert source.tree.getattr(file).size == 7
    assert source.tree.getattr(other).size == 5


# Attributes


def test_setattr_changes_only_the_given_fields(source: Source, file: int) -> None:
    before = source.tree.getattr(file)
    after = source.tree.setattr(file, Changes(0), None, MYSELF)
    assert after == before
    changes = Changes(fuse.FATTR_MODE, mode=stat.S_IFREG | 0o640, size=1, atime=(5, 5), mtime=(5, 5))
    after = source.tree.setattr(file, changes, None, MYSELF)
    assert stat.S_IMODE(after.mode) == 0o640
    assert (after.size, after.mtime, after.atime) == (before.size, before.mtime, before.atime)
    after = source.tree.setattr(file, Changes(fuse.FATTR_SIZE, size=100), None, MYSELF)
    assert (after.size, stat.S_IMODE(after.mode)) == (100, 0o640)


def test_times_are_set_separately_to_the_nanosecond(source: Source, file: int) -> None:
    after = source.tree.setattr(file, Changes(fuse.FATTR_MTIME, mtime=(-5, 123456789)), None, MYSELF)
    assert (after.mtime, after.mtime_nsec) == (-5, 123456789)
    after = source.tree.setattr(file, Changes(fuse.FATTR_ATIME, atime=(2**33, 1)), None, MYSELF)
    assert (after.atime, after.atime_nsec) == (2**33, 1)
    assert (after.mtime, after.mtime_nsec) == (-5, 123456789)
    now = fuse.FATTR_MTIME | fuse.FATTR_MTIME_NOW
    after = source.tree.setattr(file, Changes(now, mtime=(1, 1)), None, MYSELF)
    assert abs(after.mtime - os.stat(source.path).st_mtime) < 100
    assert after.atime == 2**33


def test_times_of_a_symlink(source: Source, file: int) -> None:
    link, _ = source.tree.symlink(ROOT, b"link", b"file", MYSELF)
    source.tree.setattr(link, Changes(fuse.FATTR_MTIME, mtime=(77, 0)), None, MYSELF)
    assert os.lstat(source.path / "link").st_mtime == 77
    assert os.stat(source.path / "file").st_mtime != 77


def test_truncation_through_a_handle(source: Source, file: int) -> None:
    number, _ = source.files.open(file, os.O_RDWR, False, MYSELF)
    valid = fuse.FATTR_SIZE | fuse.FATTR_FH
    assert source.tree.setattr(file, Changes(valid, size=2), number, MYSELF).size == 2
    with fails(errno.EBADF):
        source.tree.setattr(file, Changes(valid, size=2), 999, MYSELF)


def test_open_file_removed_in_the_source_is_reachable(source: Source, file: int) -> None:
    number, _ = source.files.open(file, os.O_RDWR, False, MYSELF)
    (source.path / "file").unlink()
    (source.path / "file").write_text("another file")
    assert source.tree.getattr(file).size == 7
    assert source.tree.setattr(file, Changes(fuse.FATTR_SIZE, size=1), None, MYSELF).size == 1
    again, found = source.files.open(file, os.O_RDONLY, False, MYSELF)
    assert found.size == 1
    assert (source.path / "file").read_text() == "another file"
    source.files.release(number)
    source.files.release(again)
    with fails(errno.ESTALE):
        source.tree.getattr(file)


def test_extended_attributes(source: Source, file: int) -> None:
    tree = source.tree
    try:
        os.setxattr(source.path / "file", "user.probe", b"")
    except OSError:
        pytest.skip("the temporary directory's file system has no user attributes")
    tree.setxattr(file, b"user.a", b"\0\xff", 0, MYSELF, kill_sgid=False)
    assert tree.getxattr(file, b"user.a", MYSELF) == b"\0\xff"
    assert sorted(tree.listxattr(file, MYSELF)) == [b"user.a", b"user.probe"]
    with fails(errno.EEXIST):
        tree.setxattr(file, b"user.a", b"", os.XATTR_CREATE, MYSELF, kill_sgid=False)
    with fails(errno.ENODATA):
        tree.setxattr(file, b"user.b", b"", os.XATTR_REPLACE, MYSELF, kill_sgid=False)
    tree.removexattr(file, b"user.a", MYSELF)
    with fails(errno.ENODATA):
        tree.getxattr(file, b"user.a", MYSELF)


def test_only_root_sees_trusted_attributes(source: Source, file: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can set one")
    try:
        os.setxattr(source.path / "file", "trusted.a", b"x")
    except OSError:
        pytest.skip("the temporary directory's file system has no trusted attributes")
    assert source.tree.listxattr(file, Requester(0, 0)) == [b"trusted.a"]
    assert source.tree.listxattr(file, Requester(1000, 1000)) == []


def test_statfs_and_raw_statx(source: Source, file: int) -> None:
    assert source.tree.statfs(file).f_blocks == os.statvfs(source.path).f_blocks
    raw = source.tree.statx_raw(ROOT, syscalls.STATX_BASIC_STATS, 0)
    assert len(raw) == syscalls.STATX_SIZE
    assert int.from_bytes(raw[32:40], "little") == source.path.stat().st_ino
    assert int.from_bytes(source.tree.statx_raw(file, 0x7FF, 0)[40:48], "little") == 7, "stx_size"


# Open files


def test_open_and_release(source: Source, file: int) -> None:
    before = open_descriptors()
    number, found = source.files.open(file, os.O_RDWR | os.O_APPEND, False, MYSELF)
    handle = source.context.handles.get(number)
    assert (handle.nodeid, found.size) == (file, 7)
    assert handle.shard == source.context.router.shard_of(file)
    flags = os.O_APPEND | os.O_CREAT | os.O_EXCL
    assert not fcntl.fcntl(handle.descriptor, fcntl.F_GETFL) & flags, "each WRITE says whether to append"
    source.files.release(number)
    assert open_descriptors() == before
    with fails(errno.EBADF):
        source.files.release(number)


def test_release_is_sent_only_if_the_file_was_lent(source: Source, file: int) -> None:
    number, _ = source.files.open(file, os.O_RDONLY, False, MYSELF)
    source.files.release(number)
    assert [packets(reader) for reader in source.readers] == [[], []]
    number, _ = source.files.open(file, os.O_RDONLY, False, MYSELF)
    handle = source.context.handles.get(number)
    request = FuseRequest(source.context.router.slots.memory, MYSELF.note)
    source.context.router.dispatch(request, handle, number, Operation.READ)
    source.files.release(number)
    told = [decode(message) for message in packets(source.readers[handle.shard])]
    assert [request.operation for request in told] == [Operation.READ, Operation.RELEASE]
    assert told[1].extra == (number,)


def test_o_trunc(source: Source, file: int) -> None:
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY):
        (source.path / "file").write_text("content")
        number, found = source.files.open(file, flags | os.O_TRUNC, False, MYSELF)
        assert found.size == 0
        source.files.release(number)


def test_o_trunc_does_not_truncate_a_replaced_file(source: Source, file: int) -> None:
    (source.path / "file").rename(source.path / "old")
    (source.path / "file").write_text("precious")
    before = open_descriptors()
    with fails(errno.ESTALE):
        source.files.open(file, os.O_WRONLY | os.O_TRUNC, False, MYSELF)
    assert (source.path / "file").read_text() == "precious"
    assert open_descriptors() == before


def test_create(source: Source) -> None:
    number, nodeid, found = source.files.create(ROOT, b"new", 0o666, os.O_RDWR | os.O_CREAT, MYSELF)
    assert found.ino == source.context.inodes.get(nodeid).number
    assert stat.S_IMODE(found.mode) == 0o644
    os.write(source.context.handles.get(number).descriptor, b"x")
    assert (source.path / "new").read_text() == "x"


def test_create_never_opens_an_existing_file(source: Source) -> None:
    (source.path / "there").write_text("precious")
    with fails(errno.ESTALE):
        source.files.create(ROOT, b"there", 0o666, os.O_RDWR | os.O_CREAT | os.O_TRUNC, MYSELF)
    with fails(errno.EEXIST):
        source.files.create(ROOT, b"there", 0o666, os.O_RDWR | os.O_CREAT | os.O_EXCL, MYSELF)
    assert (source.path / "there").read_text() == "precious"


def test_tmpfile_is_linked(source: Source) -> None:
    try:
        number, nodeid, found = source.files.tmpfile(ROOT, 0o600, os.O_RDWR, MYSELF)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("the temporary directory's file system has no O_TMPFILE")
    assert found.nlink == 0
    assert source.tree.getattr(nodeid).nlink == 0
    os.write(source.context.handles.get(number).descriptor, b"content")
    assert source.tree.link(nodeid, ROOT, b"named", MYSELF)[0] == nodeid
    assert (source.path / "named").read_text() == "content"
    source.tree.unlink(ROOT, b"named", MYSELF)
    assert source.tree.getattr(nodeid).nlink == 0


# Directories


def names(source: Source, number: int, offset: int) -> list[bytes]:
    return [name for _, _, name in source.files.entries(number, offset)]


def test_listing_is_stable(source: Source) -> None:
    for name in ("a", "b", "c"):
        (source.path / name).write_text("")
    number, _ = source.files.opendir(ROOT, MYSELF)
    first = names(source, number, 0)
    assert sorted(first) == [b".", b"..", b"a", b"b", b"c"]
    (source.path / "b").unlink()
    (source.path / "d").write_text("")
    assert names(source, number, 2) == first
    assert sorted(names(source, number, 0)) == [b".", b"..", b"a", b"c", b"d"], "rewinddir(3) reads afresh"


def test_listing_has_inode_numbers_and_types(source: Source) -> None:
    (source.path / "file").write_text("")
    (source.path / "dir").mkdir()
    (source.path / "link").symlink_to("x")
    number, _ = source.files.opendir(ROOT, MYSELF)
    found = {name: (ino, kind) for ino, kind, name in source.files.entries(number, 0)}
    assert found[b"."][0] == source.path.stat().st_ino
    for name, kind in ((b"file", stat.S_IFREG), (b"dir", stat.S_IFDIR), (b"link", stat.S_IFLNK)):
        assert found[name] == (os.lstat(os.fsencode(source.path) + b"/" + name).st_ino, kind >> 12)


def test_opendir_of_a_file_gives_enotdir(source: Source, file: int) -> None:
    with fails(errno.ENOTDIR, errno.ESTALE):
        source.files.opendir(file, MYSELF)


def test_root_handle_is_opened_once(source: Source) -> None:
    assert source.files.root_handle() == source.files.root_handle()


# Each needs space in the source: a block of a directory or of an attribute, or another user's quota.
TAKING_SPACE: dict[str, tuple[object, str, Callable[[Source, int], object]]] = {
    "mkdir": (os, "mkdir", lambda source, _: source.tree.mkdir(ROOT, b"dir", 0o755, MYSELF)),
    "mknod": (os, "mknod", lambda source, _: source.tree.mknod(ROOT, b"node", 0o644, 0, MYSELF)),
    "symlink": (os, "symlink", lambda source, _: source.tree.symlink(ROOT, b"symlink", b"target", MYSELF)),
    "create": (os, "open", lambda source, _: source.files.create(ROOT, b"new", 0o644, os.O_WRONLY, MYSELF)),
    "link": (os, "link", lambda source, other: source.tree.link(other, ROOT, b"link", MYSELF)),
    "rename": (os, "rename", lambda source, _: source.tree.rename(ROOT, b"other", ROOT, b"renamed", 0, MYSELF)),
    "renameat2": (
        syscalls,
        "renameat2",
        lambda source, _: source.tree.rename(ROOT, b"other", ROOT, b"renamed", 1, MYSELF),
    ),
    "setxattr": (
        os,
        "setxattr",
        lambda source, other: source.tree.setxattr(other, b"user.x", b"1", 0, MYSELF, kill_sgid=False),
    ),
    "chown": (syscalls, "chown", lambda source, other: _set(source, other, fuse.FATTR_UID, uid=os.geteuid())),
    "truncate": (os, "ftruncate", lambda source, other: _set(source, other, fuse.FATTR_SIZE, size=100)),
}


def _set_xattr(source: Source, nodeid: int) -> None:
    source.tree.setxattr(nodeid, b"user.x", b"1", 0, MYSELF, kill_sgid=False)


def _set(source: Source, nodeid: int, valid: int, **values: Any) -> None:
    source.tree.setattr(nodeid, Changes(valid, **values), None, MYSELF)


@pytest.mark.parametrize("what", TAKING_SPACE)
def test_removed_files_are_released_without_space(
    source: Source, file: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FORGET arrives a moment after the removal: removed files must not fill the file system."""
    module, name, act = TAKING_SPACE[what]
    (source.path / "other").touch()
    other, _ = source.tree.lookup(ROOT, b"other")
    source.tree.unlink(ROOT, b"file", MYSELF)
    call = getattr(module, name)
    refused = 0

    def full_while_pinned(*arguments: Any, **options: Any) -> Any:
        nonlocal refused
        if source.tree.directory_fds.held(file) is not None and (name != "open" or arguments[1] & os.O_CREAT):
            refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call(*arguments, **options)

    monkeypatch.setattr(module, name, full_while_pinned)
    act(source, other)
    assert refused == 1
    # If the source stays full, the error is ENOSPC.
    monkeypatch.setattr(os, "mkdir", lambda *arguments, **options: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with fails(errno.ENOSPC):
        source.tree.mkdir(ROOT, b"another", 0o755, MYSELF)


def test_removed_file_in_use_is_not_released(source: Source, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody holds it by a descriptor that opens nothing (O_PATH): its pin is all that leads to it."""
    (source.path / "other").touch()
    other, _ = source.tree.lookup(ROOT, b"other")
    source.tree.unlink(ROOT, b"file", MYSELF)
    source.tree.unlink(ROOT, b"other", MYSELF)
    chown = syscalls.chown

    def full_while_the_other_is_pinned(fd: int, uid: int, gid: int) -> None:
        if source.tree.directory_fds.held(other) is not None:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        chown(fd, uid, gid)

    monkeypatch.setattr(syscalls, "chown", full_while_the_other_is_pinned)
    _set(source, file, fuse.FATTR_UID, uid=os.geteuid())
    assert source.tree.directory_fds.held(file) is not None
