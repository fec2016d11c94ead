"""setuid, setgid and file capabilities are lost by write, truncate or chown exactly when they are in the source."""

import mmap
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llloop.linux.syscalls import PR_SET_DUMPABLE, prctl, set_capabilities
from tests import filesystems
from tests.as_user import Caller, run_as
from tests.conftest import Serve
from tests.server import Tree
from tests.syscalls import STATX_MODE, statx, syncfs, unshare_user
from tests.syscalls import opened as opened_file
from tests.twins import Twins, outcome_of

pytestmark = pytest.mark.root

TEAM = 5000
ROOT = Caller(0, 0)
OWNER = Caller(4001, 4001)
MEMBER = Caller(4002, 4002, groups=(TEAM,))
TEAMMATE = Caller(4004, TEAM)
STRANGER = Caller(4003, 4003)
CALLERS = {"root": ROOT, "owner": OWNER, "member": MEMBER, "teammate": TEAMMATE, "stranger": STRANGER}

# <linux/capability.h>: version 2 with the effective flag, CAP_NET_RAW permitted.
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
SIZE = 300_000
ID = "/usr/bin/id"

MODES = (0o4777, 0o2777, 0o6777, 0o2775, 0o4666, 0o1777, 0o777)
# Set-group-ID without group execution marked mandatory locks, which Linux has removed.
MARKED = (0o2767, 0o6766, 0o2740)


def make_privileged(directory: Path, modes: tuple[int, ...] = MODES) -> None:
    directory.chmod(0o777)
    for mode in modes:
        for suffix in ("", "+capability"):
            path = directory / f"{mode:o}{suffix}"
            path.write_bytes(b"x" * SIZE)
            os.chown(path, 4001, TEAM)
            path.chmod(mode)
            if suffix:
                os.setxattr(path, "security.capability", CAPABILITY)


def opened(flags: int, use: Callable[[int], Any]) -> Callable[[Path], Any]:
    def do(path: Path) -> Any:
        fd = os.open(path, flags)
        try:
            return use(fd)
        finally:
            os.close(fd)

    return do


def write_mapped(fd: int) -> None:
    with mmap.mmap(fd, SIZE) as view:
        view[10:13] = b"new"
        view.flush()


def copy_range(path: Path) -> int:
    fd = os.open(path, os.O_RDWR)
    try:
        return os.copy_file_range(fd, fd, 1000, 0, 50_000)
    finally:
        os.close(fd)


ACTIONS: dict[str, Callable[[Path], Any]] = {
    "read": opened(os.O_RDONLY, lambda fd: os.read(fd, 10)),
    "open for writing": opened(os.O_RDWR, lambda fd: None),
    "write": opened(os.O_WRONLY, lambda fd: os.write(fd, b"new")),
    "write nothing": opened(os.O_WRONLY, lambda fd: os.write(fd, b"")),
    "write much": opened(os.O_WRONLY, lambda fd: os.write(fd, b"n" * 200_000)),
    "append": opened(os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"new")),
    "write synchronously": opened(os.O_WRONLY | os.O_SYNC, lambda fd: os.write(fd, b"new")),
    "write in two goes": opened(os.O_WRONLY, lambda fd: (os.write(fd, b"new"), os.pwrite(fd, b"new", 5000))),
    "truncate": lambda path: os.truncate(path, 10),
    "truncate to the same size": lambda path: os.truncate(path, SIZE),
    "ftruncate": opened(os.O_RDWR, lambda fd: os.ftruncate(fd, 10)),
    "open with O_TRUNC": opened(os.O_WRONLY | os.O_TRUNC, lambda fd: None),
    "open for reading with O_TRUNC": opened(os.O_RDONLY | os.O_TRUNC, lambda fd: os.fstat(fd).st_size),
    "touch": lambda path: os.utime(path),
    "chown to the same": lambda path: os.chown(path, 4001, TEAM),
    "chown to another": lambda path: os.chown(path, 4003, -1),
    "chgrp": lambda path: os.chown(path, -1, 4001),
    "fchown": opened(os.O_RDONLY, lambda fd: os.fchown(fd, 4001, -1)),
    "chmod": lambda path: os.chmod(path, 0o6755),
    "set an xattr": lambda path: os.setxattr(path, "user.mark", b"value"),
    "rename": lambda path: os.rename(path, path),
    "link": lambda path: os.link(path, path.with_name(path.name + " second")),
}
OWN_LOOP_ACTIONS: dict[str, Callable[[Path], Any]] = {
    "allocate": opened(os.O_RDWR, lambda fd: os.posix_fallocate(fd, SIZE, 50_000)),
    "copy_file_range": copy_range,
}
everyone = pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS.keys())


def mode_of(target: Path | int) -> int:
    """The mode, asked for alone: with the size, which a write drops, the kernel would ask for everything afresh."""
    return stat.S_IMODE(statx(target, STATX_MODE).stx_mode)


def do_to_all(directory: Path, action: Callable[[Path], Any]) -> dict[str, Any]:
    """Each outcome, and the mode that is seen immediately afterwards."""
    return {
        name: (outcome_of(action, directory / name), mode_of(directory / name))
        for name in sorted(os.listdir(directory))
    }


@everyone
@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
def test_privileges_are_cleared_as_in_the_source(tree: Tree, caller: Caller, action: Callable[[Path], Any]) -> None:
    twins = Twins.of(tree)
    twins.prepare(make_privileged)
    twins.both(do_to_all, action, caller=caller)


@pytest.mark.own_loop
@everyone
@pytest.mark.parametrize("action", OWN_LOOP_ACTIONS.values(), ids=OWN_LOOP_ACTIONS.keys())
def test_privileges_are_cleared_by_newer_system_calls(
    tree: Tree, caller: Caller, action: Callable[[Path], Any]
) -> None:
    twins = Twins.of(tree)
    twins.prepare(make_privileged)
    twins.both(do_to_all, action, caller=caller)


@pytest.mark.own_loop
@everyone
def test_mandatory_lock_mode_is_cleared_as_in_the_source(tree: Tree, caller: Caller) -> None:
    """Members of the file's group keep it. (Through the fallback the kernel itself decides, and always keeps it.)"""
    for number, action in enumerate((ACTIONS | OWN_LOOP_ACTIONS).values()):
        directory = Tree(tree.src / str(number), tree.mnt / str(number), tree.server)
        directory.src.mkdir()
        twins = Twins.of(directory)
        twins.prepare(lambda path: make_privileged(path, MARKED))
        twins.both(do_to_all, action, caller=caller)


@everyone
def test_chown_without_ids_clears_as_in_the_source(tree: Tree, caller: Caller) -> None:
    """But not the capabilities of another user's file, although the kernel lets anybody remove them."""
    twins = Twins.of(tree)
    twins.prepare(make_privileged)
    for directory in (twins.native, twins.mounted):
        for path in directory.glob("*+capability"):
            path.unlink()
    twins.both(do_to_all, lambda path: os.chown(path, -1, -1), caller=caller)


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o4755])
def test_chown_without_ids_needs_ownership_to_clear_capabilities(tree: Tree, mode: int) -> None:
    path = tree.mnt / "program"
    path.write_bytes(b"program")
    os.chown(path, 4001, TEAM)
    path.chmod(mode)
    os.setxattr(path, "security.capability", CAPABILITY)
    for caller in (STRANGER, MEMBER):
        assert run_as(caller, outcome_of, os.chown, path, -1, -1) == "EPERM"
        assert os.getxattr(tree.src / "program", "security.capability") == CAPABILITY
        assert mode_of(path) == stat.S_IMODE((tree.src / "program").stat().st_mode) == mode
    run_as(OWNER, os.chown, path, -1, -1)
    assert outcome_of(os.getxattr, tree.src / "program", "security.capability") == "ENODATA"
    assert mode_of(path) == stat.S_IMODE((tree.src / "program").stat().st_mode) == mode & 0o777


DATA_PATHS = pytest.mark.parametrize("options", [[], ["--io=kernel"], ["--writeback"], ["--cache=never"]], ids=str)


def make_with_both(path: Path) -> None:
    path.write_bytes(b"program" * 1000)
    path.chmod(0o4755)
    os.setxattr(path, "security.capability", CAPABILITY)


@DATA_PATHS
@pytest.mark.own_loop
@pytest.mark.parametrize("by", ["stranger", "root without capabilities"])
def test_open_file_of_another_user_does_not_allow_clearing(
    tree_with: Callable[..., Tree], options: list[str], by: str
) -> None:
    """With a chown(2) that names neither owner nor group, which the kernel hardly tells from a write."""
    tree = tree_with(*options)
    path, behind = tree.mnt / "program", tree.behind / "program"
    path.write_bytes(b"program")
    os.chown(path, OWNER.uid, TEAM)
    path.chmod(0o4755)
    os.setxattr(path, "security.capability", CAPABILITY)

    def take() -> None:
        if by != "stranger":
            set_capabilities(0, 0, 0)
        os.chown(path, -1, -1)

    with opened_file(path, os.O_WRONLY):
        assert run_as(STRANGER if by == "stranger" else ROOT, outcome_of, take) in (None, "EPERM")
        for where in (path, behind):
            assert mode_of(where) == 0o4755
            assert os.getxattr(where, "security.capability") == CAPABILITY
    if by != "stranger":
        assert run_as(ROOT, outcome_of, take) == "EPERM"
        assert mode_of(path) == mode_of(behind) == 0o4755


@DATA_PATHS
@pytest.mark.own_loop
@pytest.mark.parametrize("way", ["write", "allocate", "copy", "shorten"])
@pytest.mark.parametrize("by", ["stranger", "root without capabilities"])
def test_write_through_anothers_descriptor_clears_privileges(
    tree_with: Callable[..., Tree], options: list[str], way: str, by: str
) -> None:
    tree = tree_with(*options)
    path, behind = tree.mnt / "program", tree.behind / "program"
    make_with_both(path)
    os.chown(path, OWNER.uid, TEAM)
    make_with_both(path)
    with opened_file(path, os.O_WRONLY) as fd, opened_file(path, os.O_RDONLY) as source:
        ways: dict[str, Callable[[], Any]] = {
            "write": lambda: os.write(fd, b"other"),
            "allocate": lambda: os.posix_fallocate(fd, 0, 10_000),
            "copy": lambda: os.copy_file_range(source, fd, 10, 0, 100),
            "shorten": lambda: os.ftruncate(fd, 10),
        }

        def take() -> None:
            if by != "stranger":
                set_capabilities(0, 0, 0)
            ways[way]()

        assert mode_of(path) == 0o4755
        run_as(STRANGER if by == "stranger" else ROOT, take)
        assert mode_of(path) == 0o755
        os.fsync(fd)
        assert mode_of(behind) == 0o755
        assert outcome_of(os.getxattr, behind, "security.capability") == "ENODATA"


@pytest.mark.own_loop
@pytest.mark.parametrize("caller", [STRANGER, MEMBER], ids=["stranger", "member"])
def test_writeback_of_times_needs_no_permission(serve: Serve, caller: Caller) -> None:
    """The kernel keeps another time than the source, which sets its own when the data arrives."""
    server = serve("--writeback")
    path = server.mountpoint / "file"
    path.write_bytes(b"x" * SIZE)
    os.chown(path, OWNER.uid, TEAM)
    path.chmod(0o666)
    os.utime(server.source / "file", ns=(1, path.stat().st_mtime_ns + 5_000_000))

    def change_and_close() -> bytes:
        with opened_file(path, os.O_RDONLY):
            os.setxattr(path, "user.mark", b"value")
        return path.read_bytes()

    assert run_as(caller, change_and_close) == b"x" * SIZE
    with opened_file(server.mountpoint, os.O_RDONLY) as directory:
        syncfs(directory)
    assert run_as(caller, outcome_of, lambda: os.utime(path, (1, 1))) == "EPERM"


def test_root_creates_setgid_files_after_a_write_by_a_user(tree: Tree) -> None:
    """In a directory with setgid and a group other than root's."""
    twins = Twins.of(tree)

    def prepare(directory: Path) -> None:
        os.chown(directory, 0, TEAM)
        directory.chmod(0o2777)
        (directory / "file").write_bytes(b"x" * 100)
        (directory / "file").chmod(0o666)

    twins.prepare(prepare)
    twins.both(lambda directory: os.truncate(directory / "file", 10), caller=STRANGER)
    twins.both(lambda directory: os.close(os.open(directory / "new", os.O_CREAT | os.O_EXCL, 0o2755)), caller=ROOT)
    twins.both(lambda directory: os.mknod(directory / "node", 0o2755 | stat.S_IFREG), caller=ROOT)


def test_root_of_a_user_namespace_sets_capabilities(tree: Tree) -> None:
    twins = Twins.of(tree)

    def prepare(directory: Path) -> None:
        (directory / "program").write_bytes(b"program")
        os.chown(directory / "program", OWNER.uid, OWNER.gid)

    def set_capability(directory: Path) -> None:
        prctl(PR_SET_DUMPABLE, 1)  # otherwise root owns its files in /proc
        unshare_user()
        Path("/proc/self/uid_map").write_text(f"0 {OWNER.uid} 1")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"0 {OWNER.gid} 1")
        os.setxattr(directory / "program", "security.capability", CAPABILITY)

    twins.prepare(prepare)
    assert twins.both(set_capability, caller=OWNER) is None


@pytest.mark.parametrize("options", [["--io=kernel"], ["--writeback"], ["--cache=never"], ["--cache=always"]], ids=str)
@pytest.mark.own_loop
def test_program_written_by_a_user_runs_without_set_id(tree_with: Callable[..., Tree], options: list[str]) -> None:
    """Whatever way the kernel writes: it executes with the mode in its cache."""
    tree = tree_with("-o", "suid", *options)
    shutil.copy(ID, tree.mnt / "pristine")
    content = (tree.mnt / "pristine").read_bytes()

    def effective(path: Path) -> int:
        return int(subprocess.run([path, "-u"], capture_output=True, check=True, timeout=30).stdout)

    def rewrite(path: Path, write: Callable[[int], Any], flags: int) -> tuple[int, int, int]:
        fd = os.open(path, os.O_RDWR | flags)
        before = mode_of(path)
        write(fd)
        seen = mode_of(fd)
        os.close(fd)
        return before & 0o7000, seen & 0o7000, effective(path)

    def copy_from_pristine(fd: int) -> None:
        with opened_file(tree.mnt / "pristine", os.O_RDONLY) as source:
            os.copy_file_range(source, fd, 1000, 0, 0)

    ways: dict[str, tuple[Callable[[int], Any], int]] = {
        "write": (lambda fd: os.write(fd, content[:10]), 0),
        "much": (lambda fd: os.write(fd, content), 0),
        "append": (lambda fd: os.write(fd, b"more"), os.O_APPEND),
        "synchronous": (lambda fd: os.write(fd, content[:10]), os.O_SYNC),
        "shorten": (lambda fd: os.ftruncate(fd, len(content) + 1), 0),
        "truncate": (lambda fd: os.write(fd, content), os.O_TRUNC),
        "allocate": (lambda fd: os.posix_fallocate(fd, 0, len(content) + 10), 0),
        "copy": (copy_from_pristine, 0),
    }
    for name, (write, flags) in ways.items():
        path = tree.mnt / name
        shutil.copy(ID, path)
        path.chmod(0o4777)
        assert run_as(STRANGER, effective, path) == 0, f"{name}: set-ID programs do not run at all"
        found = run_as(STRANGER, rewrite, path, write, flags)
        assert found == (0 if flags & os.O_TRUNC else stat.S_ISUID, 0, STRANGER.uid), name


@pytest.mark.parametrize("options", [["--io=kernel"], ["--writeback"], ["--cache=never"], []], ids=str)
@pytest.mark.parametrize("through", ["mount", "source"])
@pytest.mark.own_loop
def test_write_clears_set_id_set_while_open(tree_with: Callable[..., Tree], options: list[str], through: str) -> None:
    tree = tree_with(*options)
    for size in (10, 300_000):
        name = f"program of {size}"
        path = tree.mnt / name
        path.write_bytes(b"p" * size)
        path.chmod(0o777)
        os.seteuid(STRANGER.uid)  # collected writes count as writes of the user who opened the file
        try:
            fd = os.open(path, os.O_WRONLY)
        finally:
            os.seteuid(0)
        ((tree.mnt if through == "mount" else tree.behind) / name).chmod(0o6777)

        def write_and_look(fd: int = fd, size: int = size, path: Path = path) -> int:
            os.write(fd, b"e" * size)
            os.fsync(fd)
            return mode_of(path)

        assert mode_of(path) == 0o6777 or through == "source"
        assert run_as(STRANGER, write_and_look) == 0o777
        assert stat.S_IMODE((tree.behind / name).stat().st_mode) == 0o777
        os.close(fd)


@pytest.mark.parametrize("mode", [0o4777, 0o6777])
def test_write_by_a_user_clears_setuid_immediately(tree: Tree, mode: int) -> None:
    """While the file is still open, and although its attributes were just cached."""
    path = tree.mnt / "file"
    path.write_bytes(b"program")
    path.chmod(mode)
    assert stat.S_IMODE(path.stat().st_mode) == mode

    def write_and_look() -> tuple[int, int, int]:
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, b"evil")
        assert (mode_of(fd), mode_of(path)) == (0o777, 0o777)
        return tuple(stat.S_IMODE(a.st_mode) for a in (os.fstat(fd), path.stat(), (tree.src / "file").stat()))  # type: ignore[return-value]

    assert run_as(STRANGER, write_and_look) == (0o777, 0o777, 0o777)


def test_write_by_root_clears_file_capabilities(tree: Tree) -> None:
    for name in ("file", "second"):
        (tree.mnt / name).write_bytes(b"program")
        os.setxattr(tree.mnt / name, "security.capability", CAPABILITY)
        assert os.getxattr(tree.src / name, "security.capability") == CAPABILITY
    with open(tree.mnt / "file", "r+b") as file:
        file.write(b"evil")
    os.truncate(tree.mnt / "second", 3)
    for name in ("file", "second"):
        assert outcome_of(os.getxattr, tree.src / name, "security.capability") == "ENODATA"
        assert outcome_of(os.getxattr, tree.mnt / name, "security.capability") == "ENODATA"


def test_write_by_root_keeps_setuid(tree: Tree) -> None:
    """CAP_FSETID: package managers write a program and its mode in any order."""
    path = tree.mnt / "file"
    path.write_bytes(b"program")
    path.chmod(0o4755)
    with open(path, "r+b") as file:
        file.write(b"update")
    assert stat.S_IMODE((tree.src / "file").stat().st_mode) == 0o4755
    os.truncate(path, 3)
    assert stat.S_IMODE((tree.src / "file").stat().st_mode) == 0o4755


def test_mapped_write_is_not_a_write_by_the_user(tree: Tree) -> None:
    """In the source, a store into a mapping clears nothing. Through a mount, the kernel may send it as a write."""
    path = tree.mnt / "file"
    path.write_bytes(b"x" * SIZE)
    path.chmod(0o4777)
    run_as(STRANGER, opened(os.O_RDWR, write_mapped), path)
    assert (tree.src / "file").read_bytes()[10:13] == b"new"
    assert stat.S_IMODE((tree.src / "file").stat().st_mode) in (0o4777, 0o777)


def test_setcap_and_getcap_work(tree: Tree) -> None:
    tools = [shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") for name in ("setcap", "getcap")]
    if None in tools:
        pytest.skip("setcap is not installed")
    setcap, getcap = map(str, tools)

    def use_tools(directory: Path) -> str:
        path = directory / "program"
        shutil.copy("/bin/true", path)
        subprocess.run([setcap, "cap_net_raw+ep", "program"], cwd=directory, check=True, timeout=30)
        before = subprocess.run([getcap, "program"], cwd=directory, check=True, timeout=30, capture_output=True)
        with open(path, "ab") as file:
            file.write(b"more")
        after = subprocess.run([getcap, "program"], cwd=directory, check=True, timeout=30, capture_output=True)
        return before.stdout.decode() + after.stdout.decode()

    assert Twins.of(tree).both(use_tools).count("cap_net_raw") == 1


def run_program(path: Path) -> tuple[int, str]:
    done = subprocess.run([path, "-u"], capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout


def make_program(path: Path, mode: int) -> Path:
    shutil.copyfile(ID, path)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("option", ["nosuid", "suid"])
def test_noexec_mount_below_the_source(serve: Serve, option: str) -> None:
    server = serve("-o", option)
    below = server.source / "below"
    below.mkdir()
    with filesystems.tmpfs(below, "noexec,mode=755"):
        program = make_program(below / "id", 0o755)
        run = make_program(server.source / "id", 0o755)
        for path in (program, server.mountpoint / "below" / "id"):
            for caller in (ROOT, STRANGER):
                with pytest.raises(PermissionError):
                    run_as(caller, run_program, path)
                assert run_as(caller, path.read_bytes) == Path(ID).read_bytes(), "it can be read"
        assert run_as(STRANGER, run_program, server.mountpoint / run.name) == (0, "4003\n")
        server.stop()


def test_nosuid_mount_below_the_source(serve: Serve) -> None:
    """A user who can put programs there must not become root through a mount with suid."""
    server = serve("-o", "suid")
    below = server.source / "below"
    below.mkdir()
    with filesystems.tmpfs(below, "nosuid,mode=755"):
        for mode in (0o4755, 0o2755, 0o755):
            make_program(below / f"{mode:o}", mode)
        os.setxattr(make_program(below / "capable", 0o755), "security.capability", CAPABILITY)
        make_program(server.source / "4755", 0o4755)
        assert run_as(STRANGER, run_program, below / "4755") == (0, "4003\n")
        for name in ("4755", "2755", "capable"):
            with pytest.raises(PermissionError):
                run_as(STRANGER, run_program, server.mountpoint / "below" / name)
        assert run_as(STRANGER, run_program, server.mountpoint / "below" / "755") == (0, "4003\n")
        assert run_as(STRANGER, run_program, server.mountpoint / "4755") == (0, "0\n")
        server.stop()
