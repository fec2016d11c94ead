"""statfs(2)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.filesystems import tmpfs
from tests.server import Tree
from tests.syscalls import opened

CONSTANT = ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax")
MIB = 1024 * 1024


def constant(status: os.statvfs_result) -> dict[str, int]:
    return {name: getattr(status, name) for name in CONSTANT}


def test_statfs_equals_the_source(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    for name in ("", "file"):
        mounted, native = os.statvfs(tree.mnt / name), os.statvfs(tree.src / name)
        assert constant(mounted) == constant(native)
        # Other programs write to the same file system meanwhile.
        for field in ("f_bfree", "f_bavail"):
            assert abs(getattr(mounted, field) - getattr(native, field)) * native.f_frsize < 256 * MIB
        assert abs(mounted.f_ffree - native.f_ffree) < 100_000
    with opened(tree.mnt / "file", os.O_RDONLY) as descriptor:
        assert constant(os.fstatvfs(descriptor)) == constant(os.statvfs(tree.src))
    assert constant(os.statvfs(tree.server.mountpoint)) == constant(os.statvfs(tree.server.source))


@pytest.mark.root
def test_written_data_reduces_the_free_space(serve: Serve, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "size=16m") as source:
        server = serve(source=source)
        try:
            before = os.statvfs(server.mountpoint)
            (server.mountpoint / "file").write_bytes(os.urandom(8 * MIB))
            after = os.statvfs(server.mountpoint)
        finally:
            # Stop the server before the file system below it is unmounted.
            server.stop()
    assert (before.f_bfree - after.f_bfree) * after.f_frsize == 8 * MIB


def test_df(tree: Tree) -> None:
    listed = subprocess.run(
        ["df", "--block-size=1", "--output=size,target", tree.mnt], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1]
    native = os.statvfs(tree.src)
    assert int(listed.split()[0]) == native.f_blocks * native.f_frsize


@pytest.mark.root
def test_statfs_of_a_file_system_below_the_source(serve: Serve, tmp_path: Path, via: str) -> None:
    if via == "llfuse":
        pytest.skip("llfuse does not say of which inode")
    (tmp_path / "source" / "below").mkdir(parents=True)
    with tmpfs(tmp_path / "source" / "below", "size=16m") as below:
        server = serve(source=tmp_path / "source")
        try:
            shown = os.statvfs(server.mountpoint / "below")
            assert constant(shown) == constant(os.statvfs(below))
            assert shown.f_blocks * shown.f_frsize == 16 * MIB
            assert constant(os.statvfs(server.mountpoint)) == constant(os.statvfs(tmp_path / "source"))
        finally:
            server.stop()
