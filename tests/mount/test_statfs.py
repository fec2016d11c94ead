"""statfs: how much room there is."""

from __future__ import annotations

import os
import subprocess

from tests.mirror import Tree
from tests.syscalls import opened

CONSTANT = ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax")
MIB = 1024 * 1024


def constant(status: os.statvfs_result) -> dict[str, int]:
    return {name: getattr(status, name) for name in CONSTANT}


def test_the_source_s_numbers(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    for name in ("", "file"):
        mounted, native = os.statvfs(tree.mnt / name), os.statvfs(tree.src / name)
        assert constant(mounted) == constant(native)
        # Others write to the same file system meanwhile.
        for field in ("f_bfree", "f_bavail"):
            assert abs(getattr(mounted, field) - getattr(native, field)) * native.f_frsize < 256 * MIB
        assert abs(mounted.f_ffree - native.f_ffree) < 100_000
    with opened(tree.mnt / "file", os.O_RDONLY) as descriptor:
        assert constant(os.fstatvfs(descriptor)) == constant(os.statvfs(tree.src))
    assert constant(os.statvfs(tree.mirror.mountpoint)) == constant(os.statvfs(tree.mirror.source))


def test_what_is_written_is_missing_from_the_room(tree: Tree) -> None:
    before = os.statvfs(tree.mnt)
    with opened(tree.mnt / "file", os.O_CREAT | os.O_WRONLY) as descriptor:
        for _ in range(64):
            os.write(descriptor, os.urandom(MIB))
        os.fsync(descriptor)
    after = os.statvfs(tree.mnt)
    assert (before.f_bfree - after.f_bfree) * after.f_frsize > 32 * MIB


def test_df(tree: Tree) -> None:
    listed = subprocess.run(
        ["df", "--block-size=1", "--output=size,target", tree.mnt], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1]
    native = os.statvfs(tree.src)
    assert int(listed.split()[0]) == native.f_blocks * native.f_frsize
