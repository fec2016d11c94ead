"""Small file systems for a test, so that a full, read-only or broken source is real."""

import fcntl
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest


def _run(*command: str | Path) -> None:
    # mkfs and losetup are in sbin, which is not in every PATH.
    environment = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"


def _need(program: str) -> None:
    if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        pytest.skip(f"{program} is not installed")


def _unmount(where: Path) -> None:
    # The loop device releases its image a moment after the unmount. This takes longer if another program that searches
    # for a free loop device has just opened it.
    deadline = time.monotonic() + 30
    while True:
        try:
            _run("umount", where)
            return
        except AssertionError:
            if time.monotonic() > deadline:
                # A server that a failing test left behind may hold it. Unmount it anyway.
                _run("umount", "-l", where)
                raise
        time.sleep(0.1)


@contextmanager
def mounted(what: str | Path, where: Path, *arguments: str) -> Iterator[Path]:
    if not where.exists():
        where.mkdir()
    _run("mount", *arguments, what, where)
    try:
        yield where
    finally:
        _unmount(where)


@contextmanager
def tmpfs(where: Path, options: str) -> Iterator[Path]:
    with mounted("llloop-test", where, "-t", "tmpfs", "-o", options) as path:
        yield path


def make_image(image: Path, size: int, kind: str = "ext4", *arguments: str) -> Path:
    _need(f"mkfs.{kind}")
    with open(image, "wb") as file:
        file.truncate(size)
    _run(f"mkfs.{kind}", "-q", *arguments, image)
    return image


@contextmanager
def ext4(directory: Path, size: int = 32 << 20, *arguments: str) -> Iterator[Path]:
    """An ext4 file system below `directory`; it reuses a freed inode number for the next file."""
    image = make_image(directory / "ext4.image", size, "ext4", "-F", "-m", "0", *arguments)
    try:
        with mounted(image, directory / "ext4", "-o", "loop") as path:
            yield path
    finally:
        image.unlink()


@contextmanager
def overlay(directory: Path, lower: Path) -> Iterator[Path]:
    """`lower` under an empty upper directory; both are on tmpfs, which supports the attributes of overlayfs."""
    layers = directory / "layers"
    with tmpfs(layers, "size=8m"):
        shutil.copytree(lower, layers / "lower")
        for name in ("upper", "work"):
            (layers / name).mkdir()
        options = f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work"
        with ExitStack() as stack:
            try:
                where = stack.enter_context(
                    mounted("llloop-test", directory / "overlay", "-t", "overlay", "-o", options)
                )
            except AssertionError as error:
                pytest.skip(f"no overlay can be mounted here: {error}")
            yield where


_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878  # <linux/fs.h>
# A file system that stays frozen blocks every process that writes to it, also the watchdog of the tests.
_LONGEST_FREEZE = 30.0


def thaw(directory: Path) -> None:
    """Thaw the file system before the block of `frozen` ends."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # it is already thawed
            fcntl.ioctl(fd, _FITHAW, 0)
    finally:
        os.close(fd)


@contextmanager
def frozen(directory: Path) -> Iterator[None]:
    """The file system of `directory` is frozen in the block, as during a snapshot: all changes wait."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    timer = threading.Timer(_LONGEST_FREEZE, thaw, (directory,))
    fcntl.ioctl(fd, _FIFREEZE, 0)
    try:
        timer.start()
        yield
    finally:
        timer.cancel()
        timer.join()
        thaw(directory)
        os.close(fd)
