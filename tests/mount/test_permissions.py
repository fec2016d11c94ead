"""Ownership, modes and permissions: the mount compared with a directory of the same file system."""

import itertools
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.as_user import MYSELF, Caller, Child, run_as
from tests.conftest import Serve
from tests.server import Tree
from tests.twins import Twins, outcome_of, outcomes

pytestmark = pytest.mark.root

TEAM = 5000
CLUB = 5001
OWNER = Caller(4001, 4001)
MEMBER = Caller(4002, 4002, groups=(TEAM, CLUB))
PRIMARY = Caller(4003, TEAM)
STRANGER = Caller(4004, 4004)
ROOT = Caller(0, 0)
CALLERS = {"root": ROOT, "owner": OWNER, "member": MEMBER, "primary": PRIMARY, "stranger": STRANGER}

everyone = pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS.keys())


def as_directory(mode: int, uid: int = 0, gid: int = 0) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        os.chown(path, uid, gid)
        os.chmod(path, mode)

    return make


def create_with(path: Path, mode: int) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))


def make_one_of_each(directory: Path, umask: int) -> None:
    """Modes with every special bit: which of them a setgid directory leaves is where file systems go wrong."""
    for mode in (0o000, 0o644, 0o666, 0o777, 0o2755, 0o2745, 0o6777, 0o7777):
        suffix = f"{mode:o}-{umask:o}"
        create_with(directory / f"file-{suffix}", mode)
        os.mkdir(directory / f"directory-{suffix}", mode)
        os.mkfifo(directory / f"fifo-{suffix}", mode)
        os.mknod(directory / f"socket-{suffix}", mode | stat.S_IFSOCK)
        os.mknod(directory / f"node-{suffix}", mode | stat.S_IFREG)
    os.symlink("nowhere", directory / f"symlink-{umask:o}")
    os.link(directory / f"file-644-{umask:o}", directory / f"link-{umask:o}")


@everyone
@pytest.mark.parametrize(
    ("mode", "gid"),
    [(0o777, 0), (0o1777, 0), (0o2777, TEAM), (0o3777, 4001), (0o777, TEAM)],
    ids=["plain", "sticky", "setgid", "setgid-sticky-other", "group"],
)
def test_new_objects_have_owner_group_and_mode_as_in_the_source(
    tree: Tree, caller: Caller, mode: int, gid: int
) -> None:
    twins = Twins.of(tree)
    twins.prepare(as_directory(mode, 0, gid))
    for umask in (0o000, 0o022, 0o027, 0o077, 0o777):
        assert twins.both(make_one_of_each, umask, caller=caller.with_umask(umask)) is None


def test_new_file_belongs_to_the_caller(tree: Tree) -> None:
    """In a comparison both sides could be wrong; this test names the expected owner."""
    tree.src.chmod(0o777)
    run_as(MEMBER.with_umask(0o027), create_with, tree.mnt / "file", 0o666)
    run_as(MEMBER.with_umask(0o027), os.mkdir, tree.mnt / "directory", 0o777)
    for name, mode in (("file", 0o640), ("directory", 0o750)):
        for path in (tree.src / name, tree.mnt / name):
            found = path.stat()
            assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (MEMBER.uid, MEMBER.gid, mode)


def test_setgid_directory_passes_on_group_and_bit(tree: Tree) -> None:
    tree.src.chmod(0o2777)
    os.chown(tree.src, 0, TEAM)
    tree.src.chmod(0o2777)
    run_as(STRANGER, os.mkdir, tree.mnt / "below", 0o755)
    run_as(STRANGER, create_with, tree.mnt / "below" / "file", 0o644)
    below, file = (tree.mnt / "below").stat(), (tree.mnt / "below" / "file").stat()
    assert (below.st_gid, stat.S_IMODE(below.st_mode)) == (TEAM, 0o2755)
    assert (file.st_uid, file.st_gid) == (STRANGER.uid, TEAM)


def test_linked_tmpfile_belongs_to_the_caller(tree: Tree) -> None:
    def link_in(directory: Path) -> None:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o666)
        try:
            os.write(fd, b"linked in")
            # Python follows the symlink only if it gets a directory descriptor, even an unnecessary one.
            os.link(f"/proc/self/fd/{fd}", directory / "name", src_dir_fd=fd, follow_symlinks=True)
        finally:
            os.close(fd)

    twins = Twins.of(tree)
    twins.prepare(as_directory(0o2777, 0, TEAM))
    # llfuse does not support O_TMPFILE; programs then use a named file.
    if tree.server.via == "llfuse":
        assert run_as(STRANGER, outcome_of, link_in, twins.mounted) in ("EOPNOTSUPP", "ENOTSUP")
    else:
        assert twins.both(link_in, caller=STRANGER.with_umask(0o007)) is None


ALL_MODES = [owner << 6 | group << 3 | other for owner, group, other in itertools.product(range(8), repeat=3)]
# A test of a directory makes more calls. So vary the mode of one class at a time; the others have all rights or none.
CLASS_MODES = [
    bits << shift | others & ~(7 << shift) for bits in range(8) for shift in (6, 3, 0) for others in (0o777, 0)
]


def make_files_of_all_modes(directory: Path) -> None:
    for mode in ALL_MODES:
        path = directory / f"{mode:03o}"
        path.write_bytes(b"content")
        os.chown(path, 4001, TEAM)
        path.chmod(mode)


def try_all_files(directory: Path) -> dict[tuple[str, str], Any]:
    def opened(path: Path, flags: int) -> None:
        os.close(os.open(path, flags))

    found = {}
    for mode in ALL_MODES:
        path = directory / f"{mode:03o}"
        for name, action in {
            "read": lambda p: opened(p, os.O_RDONLY),
            "write": lambda p: opened(p, os.O_WRONLY),
            "both": lambda p: opened(p, os.O_RDWR),
            "append": lambda p: opened(p, os.O_WRONLY | os.O_APPEND),
            "truncate": lambda p: os.truncate(p, 7),
            "touch": lambda p: os.utime(p),
            "set time": lambda p: os.utime(p, (1, 1)),
            "access r": lambda p: os.access(p, os.R_OK),
            "access w": lambda p: os.access(p, os.W_OK),
            "access x": lambda p: os.access(p, os.X_OK),
            "get xattr": lambda p: os.getxattr(p, "user.none"),
        }.items():
            found[path.name, name] = outcome_of(action, path)
    return found


@everyone
def test_file_modes_are_enforced_as_in_the_source(tree: Tree, caller: Caller) -> None:
    twins = Twins.of(tree)
    twins.prepare(make_files_of_all_modes)
    found = twins.both(try_all_files, caller=caller)
    assert ("EACCES" in found.values()) == (caller is not ROOT)


def make_directories_of_all_modes(directory: Path) -> None:
    for mode in sorted(set(CLASS_MODES)):
        path = directory / f"{mode:03o}"
        path.mkdir()
        (path / "inside").write_bytes(b"content")
        (path / "removable").write_bytes(b"")
        (path / "inside").chmod(0o666)
        (path / "below").mkdir(mode=0o777)
        os.chown(path, 4001, TEAM)
        path.chmod(mode)


def try_directory(path: Path) -> dict[str, Any]:
    return outcomes(
        {
            "list": lambda: sorted(os.listdir(path)),
            "search": lambda: os.stat(path / "inside").st_size,
            "open inside": lambda: (path / "inside").read_bytes(),
            "search deeper": lambda: os.listdir(path / "below"),
            "missing": lambda: os.stat(path / "missing"),
            "make": lambda: create_with(path / "new", 0o600),
            "make directory": lambda: os.mkdir(path / "new directory"),
            "rename": lambda: os.rename(path / "inside", path / "renamed"),
            "link": lambda: os.link(path / "renamed", path / "second"),
            "symlink": lambda: os.symlink("renamed", path / "third"),
            "remove": lambda: os.unlink(path / "removable"),
            "remove directory": lambda: os.rmdir(path / "below"),
            "enter": lambda: os.chdir(path),
        }
    )


def try_all_directories(directory: Path) -> dict[str, Any]:
    return {f"{mode:03o}": try_directory(directory / f"{mode:03o}") for mode in sorted(set(CLASS_MODES))}


@everyone
def test_directory_modes_are_enforced_as_in_the_source(tree: Tree, caller: Caller) -> None:
    twins = Twins.of(tree)
    twins.prepare(make_directories_of_all_modes)
    twins.both(try_all_directories, caller=caller)


def test_supplementary_group_gives_access(tree: Tree) -> None:
    (tree.src / "team").write_bytes(b"for the team")
    os.chown(tree.src / "team", 0, TEAM)
    (tree.src / "team").chmod(0o640)
    assert run_as(MEMBER, outcome_of, (tree.mnt / "team").read_bytes) == b"for the team"
    assert run_as(STRANGER, outcome_of, (tree.mnt / "team").read_bytes) == "EACCES"
    # The rights of one caller must not depend on those of the last one, although both share the kernel's caches.
    assert run_as(MEMBER, outcome_of, (tree.mnt / "team").read_bytes) == b"for the team"


def test_directory_without_search_permission_hides_its_content(tree: Tree) -> None:
    deep = tree.src / "closed" / "open" / "deep"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"hidden")
    (tree.src / "closed").chmod(0o700)
    path = tree.mnt / "closed" / "open" / "deep" / "file"
    assert path.read_bytes() == b"hidden"
    assert run_as(STRANGER, outcome_of, path.read_bytes) == "EACCES"
    assert run_as(STRANGER, outcome_of, os.stat, path) == "EACCES"


def fill_sticky(directory: Path) -> None:
    for name in ("mine", "theirs"):
        (directory / name).write_bytes(b"")
        (directory / f"{name} directory").mkdir()
    for name in ("mine", "mine directory"):
        os.chown(directory / name, 4002, 4002)
    for name in ("theirs", "theirs directory"):
        os.chown(directory / name, 4004, 4004)
        (directory / name).chmod(0o777)
    os.chown(directory, 4001, TEAM)
    directory.chmod(0o1777)


@everyone
def test_sticky_directory_protects_files_of_others(tree: Tree, caller: Caller) -> None:
    def try_all(directory: Path) -> dict[str, Any]:
        return outcomes(
            {
                "rename theirs": lambda: os.rename(directory / "theirs", directory / "moved"),
                "rename over theirs": lambda: os.rename(directory / "mine", directory / "theirs"),
                "remove mine": lambda: os.unlink(directory / "mine"),
                "remove theirs": lambda: os.unlink(directory / "theirs"),
                "rmdir mine": lambda: os.rmdir(directory / "mine directory"),
                "rmdir theirs": lambda: os.rmdir(directory / "theirs directory"),
            }
        )

    twins = Twins.of(tree)
    twins.prepare(fill_sticky)
    found = twins.both(try_all, caller=caller)
    if caller is MEMBER:
        assert (found["remove mine"], found["remove theirs"]) == (None, "EPERM")


def make_file_of_owner(directory: Path) -> None:
    directory.chmod(0o777)
    for name in ("plain", "shared"):
        (directory / name).write_bytes(b"content")
        os.chown(directory / name, 4002, TEAM)
        (directory / name).chmod(0o664)
    (directory / "directory").mkdir()
    os.chown(directory / "directory", 4002, CLUB)
    os.symlink("plain", directory / "symlink")
    os.chown(directory / "symlink", 4002, 4002, follow_symlinks=False)


@everyone
@pytest.mark.parametrize("name", ["plain", "directory"])
def test_same_users_may_chmod_as_in_the_source(tree: Tree, caller: Caller, name: str) -> None:
    def try_all(directory: Path) -> list[Any]:
        def change(mode: int) -> str:
            os.chmod(directory / name, mode)
            return oct(os.stat(directory / name).st_mode)

        return [outcome_of(change, mode) for mode in (0o600, 0o755, 0o1755, 0o2755, 0o2745, 0o4755, 0o7777, 0o000)]

    twins = Twins.of(tree)
    twins.prepare(make_file_of_owner)
    twins.both(try_all, caller=caller)


def test_chmod_clears_setgid_for_owner_outside_the_group(tree: Tree) -> None:
    for owner, expected in ((STRANGER, 0o755), (MEMBER, 0o2755)):
        file = tree.src / f"{owner.uid}"
        file.write_bytes(b"")
        os.chown(file, owner.uid, TEAM)
        run_as(owner, os.chmod, tree.mnt / file.name, 0o2755)
        assert stat.S_IMODE(file.stat().st_mode) == expected


@everyone
@pytest.mark.parametrize("name", ["plain", "directory", "symlink"])
def test_same_users_may_chown_as_in_the_source(tree: Tree, caller: Caller, name: str) -> None:
    def try_all(directory: Path) -> list[Any]:
        path = directory / name
        found: list[Any] = []
        for uid, gid in ((-1, -1), (4002, -1), (-1, 4002), (-1, CLUB), (-1, 4999), (4004, -1), (0, 0)):
            found.append(outcome_of(os.lchown, path, uid, gid))
            attributes = os.lstat(path)
            found.append((attributes.st_uid, attributes.st_gid, oct(attributes.st_mode)))
        return found

    twins = Twins.of(tree)
    twins.prepare(make_file_of_owner)
    twins.both(try_all, caller=caller)


@everyone
def test_same_users_may_rename_and_link_as_in_the_source(tree: Tree, caller: Caller) -> None:
    def make(directory: Path) -> None:
        for name, mode in (("open", 0o777), ("closed", 0o755), ("team", 0o770)):
            (directory / name).mkdir()
            os.chown(directory / name, 0, TEAM)
            (directory / name / "file").write_bytes(b"")
            (directory / name / "directory").mkdir(mode=0o755)
            (directory / name).chmod(mode)

    def try_all(directory: Path) -> dict[str, Any]:
        found = {}
        for source, target in itertools.permutations(("open", "closed", "team"), 2):
            for what in ("file", "directory"):
                found[f"rename {what} {source} {target}"] = outcome_of(
                    os.rename, directory / source / what, directory / target / f"{what} of {source}"
                )
            found[f"link {source} {target}"] = outcome_of(
                os.link, directory / source / "file", directory / target / f"link of {source}"
            )
        return found

    twins = Twins.of(tree)
    twins.prepare(make)
    twins.both(try_all, caller=caller)


@everyone
def test_same_users_may_set_user_xattrs_as_in_the_source(tree: Tree, caller: Caller) -> None:
    def make(directory: Path) -> None:
        for mode in (0o600, 0o640, 0o660, 0o644, 0o666, 0o000):
            path = directory / f"{mode:03o}"
            path.write_bytes(b"")
            os.setxattr(path, "user.there", b"value")
            os.chown(path, 4001, TEAM)
            path.chmod(mode)

    def try_one(path: Path) -> dict[str, Any]:
        return outcomes(
            {
                "get": lambda: os.getxattr(path, "user.there"),
                "set": lambda: os.setxattr(path, "user.new", b"new"),
                "remove": lambda: os.removexattr(path, "user.there"),
                "trusted": lambda: os.setxattr(path, "trusted.new", b"new"),
                "security": lambda: os.setxattr(path, "security.new", b"new"),
            }
        )

    def try_all(directory: Path) -> dict[str, Any]:
        return {name: try_one(directory / name) for name in sorted(os.listdir(directory))}

    twins = Twins.of(tree)
    twins.prepare(make)
    twins.both(try_all, caller=caller)


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111, 0o600])
@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_EXCL | os.O_TRUNC | os.O_APPEND])
def test_creating_open_ignores_its_own_mode(tree: Tree, mode: int, flags: int) -> None:
    def create_and_write(directory: Path) -> int:
        fd = os.open(directory / "file", flags | os.O_CREAT, mode)
        try:
            return os.write(fd, b"written")
        finally:
            os.close(fd)

    twins = Twins.of(tree)
    twins.prepare(as_directory(0o777))
    assert twins.both(create_and_write, caller=STRANGER) == 7


def test_open_descriptor_keeps_its_permissions(tree: Tree) -> None:
    """Permissions are checked at open(2): neither another user's use of the descriptor nor a chmod changes them."""
    path = tree.mnt / "file"
    path.write_bytes(b"0123456789")
    path.chmod(0o600)
    fd = os.open(path, os.O_RDWR)
    try:

        def use() -> tuple[bytes, int, int]:
            content = os.pread(fd, 4, 0)
            written = os.pwrite(fd, b"ab", 2)
            os.ftruncate(fd, 6)
            return content, written, os.fstat(fd).st_size

        assert run_as(STRANGER, use) == (b"0123", 2, 6)
        path.chmod(0o000)
        assert run_as(STRANGER, use) == (b"01ab", 2, 6)
        assert run_as(STRANGER, outcome_of, os.open, path, os.O_RDONLY) == "EACCES"
    finally:
        os.close(fd)
    assert (tree.src / "file").read_bytes() == b"01ab45"


def test_program_needs_the_execute_bit(tree: Tree) -> None:
    def run(path: Path) -> Any:
        child = os.fork()
        if child == 0:
            try:
                os.execv(path, [str(path), "7"])
            except OSError as error:
                os._exit(100 + (error.errno or 0))
            finally:
                os._exit(99)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    twins = Twins.of(tree)

    def make(directory: Path) -> None:
        for mode in (0o755, 0o711, 0o111, 0o644, 0o750):
            (directory / f"{mode:o}").write_bytes(Path("/bin/false").read_bytes())
            (directory / f"{mode:o}").chmod(mode)

    twins.prepare(make)
    for caller in (ROOT, STRANGER):
        for name in ("755", "711", "111", "644", "750"):
            twins.both(lambda directory, n=name: run(directory / n), caller=caller)
    assert run_as(STRANGER, run, twins.mounted / "711") == 1


def test_concurrent_callers_own_their_files(tree: Tree) -> None:
    """A server that takes a caller's credentials must not mix up two callers."""
    tree.src.chmod(0o777)

    def make_many(directory: Path, prefix: str) -> None:
        for number in range(150):
            create_with(directory / f"{prefix}-{number}", 0o640)
            os.mkdir(directory / f"{prefix}-{number}-directory", 0o750)
            os.symlink("x", directory / f"{prefix}-{number}-symlink")

    callers = [Caller(4100 + n, 4200 + n, umask=0o000) for n in range(5)]
    children = [Child(make_many, tree.mnt, str(caller.uid), caller=caller) for caller in callers]
    for child in children:
        child.result()
    found = {name: os.lstat(tree.src / name) for name in os.listdir(tree.src)}
    assert len(found) == 5 * 150 * 3
    for name, attributes in found.items():
        uid = int(name.split("-")[0])
        assert (attributes.st_uid, attributes.st_gid) == (uid, uid + 100), name


@pytest.mark.mounted
def test_umask_of_the_server_has_no_effect(serve: Serve) -> None:
    previous = os.umask(0o077)
    try:
        server = serve()
    finally:
        os.umask(previous)
    run_as(MYSELF.with_umask(0), create_with, server.mountpoint / "file", 0o666)
    run_as(MYSELF.with_umask(0), os.mkdir, server.mountpoint / "directory", 0o777)
    assert stat.S_IMODE((server.source / "file").stat().st_mode) == 0o666
    assert stat.S_IMODE((server.source / "directory").stat().st_mode) == 0o777


def create_write_remove(directory: Path, name: str) -> list[str]:
    """Many times, with writes that are a worker's work; returns what failed."""
    failed = []
    for number in range(300):
        try:
            fd = os.open(directory / f"{name}-{number}", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.write(fd, b"x" * 200_000)
            finally:
                os.close(fd)
            os.unlink(directory / f"{name}-{number}")
        except OSError as error:
            failed.append(str(error))
    return failed


@pytest.mark.mounted
def test_server_without_cap_sys_ptrace_serves_users(serve: Serve) -> None:
    """While the front acts as another user, workers cannot fetch its descriptors without CAP_SYS_PTRACE."""
    permissions = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"]
    server = serve("--workers", "2", command=[*permissions, sys.executable, "-m", "llloop", "serve"])
    server.source.chmod(0o777)
    callers = [OWNER, MEMBER, PRIMARY, STRANGER]
    children = [Child(create_write_remove, server.mountpoint, str(caller.uid), caller=caller) for caller in callers]
    assert [child.result() for child in children] == [[]] * len(callers)
