"""Files that root opens in directories where other users can create files."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llloop.cli.daemon import Daemon
from llloop.errors import HostError
from llloop.linux import trusted_files
from tests.as_user import Caller, run_as
from tests.server import reachable_directory, remove_tree

STRANGER = Caller(4001, 4001)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in which everybody may put things, as in /tmp, and one of somebody else's."""
    path = reachable_directory("llloop-trusted-")
    (path / "sticky").mkdir()
    (path / "sticky").chmod(0o1777)
    (path / "theirs").mkdir()
    if os.geteuid() == 0:
        os.chown(path / "theirs", 4001, 4001)
    (path / "victim").write_text("precious\n")
    yield path
    remove_tree(path)


def append(path: Path) -> None:
    with open(trusted_files.open_file(str(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT), "wb") as file:
        file.write(b"text")


def replace(path: Path) -> None:
    trusted_files.replace_file(str(path), b"text")


def as_pid_file(path: Path) -> None:
    daemon = Daemon(path)
    daemon.write_pid_file()
    daemon.remove_pid_file()


ways = pytest.mark.parametrize("write", [append, replace, as_pid_file])


def symlink(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def hard_link(path: Path, victim: Path) -> None:
    os.link(victim, path)


def named_pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def own_file(path: Path, victim: Path) -> None:
    path.touch()


def dangling(path: Path, victim: Path) -> None:
    path.symlink_to(victim.parent / "new")


@needs_root
@ways
@pytest.mark.parametrize("where", ["sticky", "theirs"])
@pytest.mark.parametrize("plant", [symlink, dangling, hard_link, named_pipe, own_file])
def test_files_of_another_user_are_refused(
    place: Path, write: Callable[[Path], None], where: str, plant: Callable[[Path, Path], None]
) -> None:
    path, victim = place / where / "planted", place / "victim"
    victim.chmod(0o600)
    if plant is hard_link:  # with fs.protected_hardlinks, the kernel forbids this to other users
        plant(path, victim)
    else:
        run_as(STRANGER, plant, path, victim)
    before = os.lstat(path)
    with pytest.raises((OSError, HostError)):
        write(path)
    assert victim.read_text() == "precious\n"
    assert not (place / "new").exists()
    assert os.path.samestat(os.lstat(path), before), "it was replaced"
    assert sorted(os.listdir(path.parent)) == ["planted"], "something is left behind"


@needs_root
@ways
def test_symlink_of_another_user_on_the_path_is_refused(place: Path, write: Callable[[Path], None]) -> None:
    (place / "etc").mkdir()
    for where in ("sticky", "theirs"):
        run_as(STRANGER, symlink, place / where / "link", place / "etc")
        with pytest.raises((OSError, HostError), match="symbolic link"):
            write(place / where / "link" / "file")
        with pytest.raises((OSError, HostError), match="symbolic link"):
            write(place / where / "link" / ".." / "victim")
    assert os.listdir(place / "etc") == []


@needs_root
def test_symlink_created_after_the_check_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place / "sticky" / "file"
    path.touch()
    real = os.open

    def late(name: str, flags: int, *arguments: int, **how: int) -> int:
        if flags & os.O_WRONLY and name == "file":
            path.unlink()
            run_as(STRANGER, symlink, path, place / "victim")
        return real(name, flags, *arguments, **how)

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(OSError):
        append(path)
    monkeypatch.undo()
    assert (place / "victim").read_text() == "precious\n"


@ways
def test_own_symlinks_and_files_are_used(place: Path, write: Callable[[Path], None]) -> None:
    (place / "real").mkdir()
    (place / "sticky" / "link").symlink_to("../real")
    (place / "real" / "file").symlink_to("other")
    for _ in range(2):
        write(place / "sticky" / "link" / "file")
        write(place / "sticky" / ".." / "sticky" / "own")
    assert os.path.islink(place / "real" / "file")
    left = ["file"] if write is as_pid_file else ["file", "other"]
    assert sorted(os.listdir(place / "real")) == left


@ways
def test_relative_path_is_resolved(place: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    write(Path("file"))
    assert (place / "file").exists() == (write is not as_pid_file)


def test_new_files_respect_the_umask(place: Path) -> None:
    append(place / "a")
    replace(place / "b")
    assert {stat.S_IMODE(os.stat(place / name).st_mode) for name in "ab"} == {0o644}


@pytest.mark.parametrize("write", [replace, as_pid_file])
def test_only_regular_files_are_replaced(place: Path, write: Callable[[Path], None]) -> None:
    os.mkfifo(place / "fifo")
    for path in (Path("/dev/null"), Path("/dev/stdout"), place / "fifo", place / "sticky"):
        before = os.lstat(path)
        with pytest.raises((OSError, HostError)):
            write(path)
        assert os.path.samestat(os.lstat(path), before)


def test_devices_and_descriptors_can_be_opened(place: Path) -> None:
    append(Path("/dev/null"))
    with tempfile.NamedTemporaryFile(dir=place) as file:
        append(Path(f"/proc/self/fd/{file.fileno()}"))
        assert file.read() == b"text"
    reader, writer = os.pipe()
    append(Path(f"/proc/self/fd/{writer}"))
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    os.close(writer)


def test_pipe_without_reader_does_not_block(place: Path) -> None:
    os.mkfifo(place / "fifo")
    with pytest.raises(OSError):
        append(place / "fifo")


def test_symlink_loops_give_eloop(place: Path) -> None:
    (place / "a").symlink_to("b")
    (place / "b").symlink_to("a")
    with pytest.raises(OSError, match="levels of symbolic links"):
        append(place / "a")
    with pytest.raises(FileNotFoundError):
        append(place / "missing" / "file")
    with pytest.raises(NotADirectoryError):
        append(place / "victim" / "file")
    with pytest.raises(IsADirectoryError):
        append(place / "..")


def test_pid_file_of_another_server_is_not_removed(place: Path) -> None:
    daemon = Daemon(place / "pid")
    daemon.write_pid_file()
    (place / "pid").write_text(f"{os.getpid()}1\n")
    daemon.remove_pid_file()
    assert (place / "pid").exists()


def test_no_descriptor_is_leaked(place: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for write in (append, replace, as_pid_file):
        write(place / "sticky" / "file")
        with pytest.raises((OSError, HostError)):
            write(place / "missing" / "file")
    assert len(os.listdir("/proc/self/fd")) == before


@needs_root
def test_directories_of_other_users_are_not_trusted(place: Path) -> None:
    own = place / "own"
    own.mkdir(mode=0o755)
    run_as(STRANGER, symlink, place / "sticky" / "link", own)
    (place / "theirs" / "mine").mkdir()
    (place / "sticky" / "mine").mkdir()
    (place / "writable").mkdir()
    (place / "writable").chmod(0o777)
    found = {
        name: trusted_files.is_trusted_directory(str(place / name))
        for name in ("own", "sticky", "theirs", "sticky/link", "theirs/mine", "sticky/mine", "writable", "victim", "no")
    }
    assert {name for name, is_so in found.items() if is_so} == {"own", "sticky/mine"}
