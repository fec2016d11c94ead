"""`--watch`: programs that watch the mount hear of changes in the source, exactly once."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.conftest import Serve, running
from tests.inotify import Inotify, Seen
from tests.mount.test_watch import heard
from tests.server import Server, Tree, remove_tree
from tests.server_processes import process_ids, wait_until
from tests.watchdog import Watchdog

pytestmark = [pytest.mark.mounted, pytest.mark.own_loop, pytest.mark.root]

WAYS = {"workers": [], "asked": ["--metadata=workers"], "always": ["--cache=always"], "never": ["--cache=never"]}

_numbers = itertools.count(1)


@pytest.fixture(scope="module", params=WAYS, ids=str)
def watched(request: pytest.FixtureRequest, via: str, serve_options: list[str], watchdog: Watchdog) -> Iterator[Server]:
    options = [*serve_options, *WAYS[request.param], "--watch"]
    if "--io=kernel" in options or "--writeback" in options:
        pytest.skip("not everything is told with these options")
    with running(Server.prepare(via, watchdog, options)) as server:
        yield heard(server)


def filled(server: Server) -> Tree:
    """A new directory with a few files, which the kernel knows through the mount."""
    name = f"{next(_numbers)}"
    tree = Tree(server.source / name, server.mountpoint / name, server)
    tree.src.mkdir()
    fill(tree.src)
    for path in (tree.mnt, *tree.mnt.iterdir()):
        path.lstat()
    return tree


def fill(top: Path) -> None:
    for name in ("file", "other"):
        (top / name).write_bytes(b"content")
    for name in ("directory", "empty"):
        (top / name).mkdir()
    os.symlink("file", top / "link")


@pytest.fixture
def tree(watched: Server) -> Iterator[Tree]:
    own = filled(watched)
    wait_for_the_relay(own)
    yield own
    remove_tree(own.src)
    watched.check_log()


class Ears:
    """Watchers of the objects that `filled` makes, in one directory."""

    def __init__(self, top: Path, steps: ExitStack) -> None:
        self._inotify = steps.enter_context(Inotify())
        self._inotify.add(top, "top")
        for name in ("file", "directory", "other", "empty"):
            self._inotify.add(top / name, name)

    def heard(self, end: bytes) -> dict[str, list[Seen]]:
        """What each watch has heard until *end* was created. Equal successive events count once."""
        by_watch: dict[str, list[Seen]] = {}
        for one in self._inotify.read_until(end):
            told = by_watch.setdefault(one.watch, [])
            if not told or told[-1] != one:
                told.append(one)
        return by_watch


def end_in(directory: Path) -> bytes:
    """Makes a directory, by which a watcher knows that it has heard everything, and returns its name."""
    name = b"end-%d" % next(_numbers)
    (directory / os.fsdecode(name)).mkdir()
    return name


def wait_for_the_relay(tree: Tree) -> None:
    """Waits until the relay has told everything that happened before."""
    with Inotify() as inotify:
        inotify.add(tree.mnt, "top")
        inotify.read_until(end_in(tree.src))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A directory with the same content as `tree`, without a mount."""
    fill(tmp_path)
    return tmp_path


Listen = Callable[[Path], Ears]


@pytest.fixture
def listen() -> Iterator[Listen]:
    with ExitStack() as steps:
        yield lambda top: Ears(top, steps)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


CHANGES: dict[str, Callable[[Path], object]] = {
    "create": lambda top: (top / "new").touch(),
    "create-directory": lambda top: (top / "new").mkdir(),
    "create-symlink": lambda top: os.symlink("file", top / "new"),
    "create-fifo": lambda top: os.mkfifo(top / "new"),
    "create-below": lambda top: (top / "directory" / "new").touch(),
    "write": lambda top: append(top / "file"),
    "truncate": lambda top: os.truncate(top / "file", 3),
    "chmod": lambda top: (top / "file").chmod(0o600),
    "chown": lambda top: os.chown(top / "file", 1000, 1000),
    "chmod-directory": lambda top: (top / "directory").chmod(0o700),
    "chmod-itself": lambda top: top.chmod(0o700),
    "times": lambda top: os.utime(top / "file", (1, 1)),
    "times-of-symlink": lambda top: os.utime(top / "link", (1, 1), follow_symlinks=False),
    "xattr": lambda top: os.setxattr(top / "file", "user.some", b"value"),
    "unlink": lambda top: (top / "file").unlink(),
    "unlink-symlink": lambda top: (top / "link").unlink(),
    "rmdir": lambda top: (top / "directory").rmdir(),
    "rename": lambda top: (top / "file").rename(top / "new"),
    "rename-directory": lambda top: (top / "directory").rename(top / "new"),
    "rename-below": lambda top: (top / "file").rename(top / "directory" / "new"),
    "rename-directory-below": lambda top: (top / "directory").rename(top / "empty" / "new"),
    "replace": lambda top: (top / "file").rename(top / "other"),
    "long-name": lambda top: (top / ("x" * 255)).touch(),
    "bytes-of-any-kind": lambda top: (top / os.fsdecode(b"\xff\n\x01")).touch(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_mount_tells_what_the_source_tells(tree: Tree, listen: Listen, change: Callable[[Path], object]) -> None:
    in_source, in_mount = listen(tree.src), listen(tree.mnt)
    change(tree.src)
    end = end_in(tree.src)
    expected = in_source.heard(end)
    assert expected
    assert in_mount.heard(end) == expected


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_through_the_mount_has_no_echo(
    tree: Tree, plain: Path, listen: Listen, change: Callable[[Path], object]
) -> None:
    without_mount, in_mount = listen(plain), listen(tree.mnt)
    change(plain)
    change(tree.mnt)
    expected = without_mount.heard(end_in(plain))
    assert expected
    assert in_mount.heard(end_in(tree.src)) == expected  # an echo would come before


def test_what_programs_see_after_an_event_is_true(tree: Tree, listen: Listen) -> None:
    ears = listen(tree.mnt)
    (tree.src / "new").write_bytes(b"data")
    (tree.src / "file").rename(tree.src / "moved")
    (tree.src / "other").unlink()
    ears.heard(end_in(tree.src))
    assert (tree.mnt / "new").read_bytes() == b"data"
    assert (tree.mnt / "moved").read_bytes() == b"content"
    assert stat.S_ISREG((tree.mnt / "new").lstat().st_mode)
    names = {one for one in os.listdir(tree.mnt) if not one.startswith("end-")}
    assert names == {"new", "moved", "directory", "empty", "link"}
    assert not (tree.mnt / "other").exists()


def contents(top: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(top.rglob("*")):
        state = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(state.st_mode) else None
        found[str(path.relative_to(top))] = (state.st_ino, state.st_mode, state.st_nlink, state.st_mtime_ns, data)
    return found


@pytest.mark.parametrize("victim", ["front", "relay"])
def test_a_killed_process_never_makes_the_relay_change_the_source(serve: Serve, victim: str) -> None:
    server = heard(serve("--watch"))
    server.expect_log(f"llloop-{victim} was killed by signal 9", required=False)
    server.expect_log(f"llloop-{victim} was killed by signal 9 again and again", required=False)
    for number, change in enumerate(CHANGES.values()):
        tree = filled(server)
        change(tree.src)
        before = contents(tree.src)
        time.sleep(number % 5 / 1000)  # so that the process dies at different points
        for pid in process_ids(server, victim):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: len(process_ids(server, victim)) == 1)
        (tree.mnt / "unknown").exists()  # served by the new front, after the requests that are sent again
        assert contents(tree.src) == before
        assert contents(tree.mnt).keys() == before.keys()
    tree = filled(server)
    with Inotify() as inotify:  # the relay works again
        inotify.add(tree.mnt, "top")
        assert wait_until(lambda: _hears(tree, inotify))


def _hears(tree: Tree, inotify: Inotify) -> bool:
    name = end_in(tree.src)
    return wait_until(lambda: any(one.name == name for one in inotify.read()), 1)


def test_the_mount_is_never_busy(serve: Serve) -> None:
    server = heard(serve("--watch"))
    tree = filled(server)
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            (tree.src / "file").write_bytes(b"x")
            (tree.src / "new").touch()
            (tree.src / "new").unlink()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        with Inotify() as inotify:
            inotify.add(tree.mnt, "top")
            assert wait_until(lambda: bool(inotify.read()))
        subprocess.run(["umount", str(server.mountpoint)], check=True)
    finally:
        stop.set()
        thread.join()
    assert server.process is not None and server.process.wait(30) == 0


def test_nobody_can_pose_as_the_relay(serve: Serve) -> None:
    server = heard(serve("--watch"))
    tree = filled(server)
    tree.src.chmod(0o777)
    program = (
        "import ctypes, os, sys; os.chdir(sys.argv[1]); ctypes.CDLL(None).setfsuid(0xFFFFFFF0)\n"
        "for call in (lambda: os.mkdir('new'), lambda: os.unlink('file'), lambda: open('file', 'w'),\n"
        "             lambda: os.rename('file', 'new'), lambda: os.chmod('file', 0), lambda: os.link('file', 'new')):\n"
        "    try:\n        call()\n    except OSError as error:\n        print(error.errno)\n"
    )
    before = contents(tree.src)
    done = subprocess.run([sys.executable, "-c", program, str(tree.mnt)], check=True, stdout=subprocess.PIPE, text=True)
    assert set(done.stdout.split()) <= {str(errno.EPERM), str(errno.EACCES)}
    assert contents(tree.src) == before


def test_no_events(serve: Serve) -> None:
    server = heard(serve("--watch", "--no-events"))
    tree = filled(server)
    assert not process_ids(server, "relay")
    with Inotify() as inotify:
        inotify.add(tree.mnt, "top")
        (tree.src / "new").touch()
        assert wait_until(lambda: (tree.mnt / "new").exists())
        (tree.mnt / "last").touch()
        assert {one.name for one in inotify.read_until(b"last")} == set()
