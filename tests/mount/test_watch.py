"""`--watch`: the mount shows changes in the source at once, although the kernel caches without a time limit."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llloop.control import client, discovery
from tests import filesystems
from tests.conftest import Serve, running, skip_contradiction
from tests.expect import outcome, start_python
from tests.server import Server, Tree, reachable_directory, remove_tree
from tests.server_processes import is_replaced, process_ids, stop_process, wait_until
from tests.syscalls import opened
from tests.watchdog import Watchdog

pytestmark = [pytest.mark.mounted, pytest.mark.own_loop, pytest.mark.user]

WAYS = {
    "workers": [],
    "kernel": ["--io=kernel"],
    "collected": ["--writeback"],
    "asked": ["--metadata=workers"],
    "always": ["--cache=always"],
    "never": ["--cache=never"],
}
# Requests that a program causes when it opens and closes something.
OPENING = {"OPEN", "RELEASE", "OPENDIR", "RELEASEDIR", "FLUSH", "FORGET", "BATCH_FORGET"}

_numbers = itertools.count(1)


def stats(server: Server) -> dict[str, Any]:
    return dict(client.ask_mount(str(server.mountpoint), "stats"))


def drops(server: Server) -> int:
    """Returns how often everything was dropped."""
    return int(stats(server)["watch"]["dropped"])


def method(server: Server) -> str:
    return str(discovery.status_of(str(server.mountpoint))["in_force"]["watch"])


def heard(server: Server) -> Server:
    """Waits until the watcher hears."""
    way = "fanotify" if os.geteuid() == 0 else "inotify"
    assert wait_until(lambda: method(server).startswith(way)), method(server)
    return server


def requests(server: Server) -> dict[str, int]:
    return {name: count["requests"] for name, count in stats(server)["operations"].items()}


@pytest.fixture(scope="module", params=WAYS, ids=str)
def watched(request: pytest.FixtureRequest, via: str, serve_options: list[str], watchdog: Watchdog) -> Iterator[Server]:
    """One mount with a source in RAM for all tests with the same options."""
    options = [*serve_options, *WAYS[request.param], "--watch"]
    skip_contradiction(options)
    if "--io=kernel" in options and os.geteuid() != 0:
        pytest.skip("--io kernel needs root")
    with running(Server.prepare(via, watchdog, options)) as server:
        yield heard(server)


@pytest.fixture
def tree(watched: Server) -> Iterator[Tree]:
    name = f"{next(_numbers)}"
    (watched.source / name).mkdir()
    yield Tree(watched.source / name, watched.mountpoint / name, watched)
    assert watched.alive(), f"the server ended during the test\n{watched.all_output()}"
    watched.check_log()


def look(path: Path) -> Any:
    """Returns all that a program can see of a file or directory, and so fills the caches."""

    def seen(one: Path) -> Any:
        status = os.lstat(one)
        told: list[Any] = [status.st_ino, status.st_mode, status.st_uid, status.st_gid, status.st_nlink]
        if one.is_symlink():
            return [*told, os.readlink(one)]
        if one.is_dir():
            return [*told, {name: look(one / name) for name in sorted(os.listdir(one))}]
        if not one.is_file():
            return told
        with opened(one, os.O_RDONLY) as fd:
            return [*told, status.st_size, status.st_mtime_ns, os.read(fd, 100_000), sorted(os.listxattr(one))]

    return outcome(seen, path)


def is_seen(tree: Tree) -> bool:
    return wait_until(lambda: bool(look(tree.mnt) == look(tree.behind)))


def made(tree: Tree) -> None:
    (tree.behind / "file").write_bytes(b"content")
    (tree.behind / "other").write_bytes(b"another")
    (tree.behind / "sub" / "deep").mkdir(parents=True)
    (tree.behind / "sub" / "deep" / "file").write_bytes(b"deep")
    (tree.behind / "empty").mkdir()
    os.symlink("file", tree.behind / "symlink")
    os.link(tree.behind / "other", tree.behind / "link")


def write(path: Path, content: bytes, offset: int = 0) -> None:
    with opened(path, os.O_WRONLY) as fd:
        os.pwrite(fd, content, offset)


def replace(path: Path) -> None:
    """As editors save."""
    temporary = path.parent / "tmp"
    temporary.write_bytes(b"replaced")
    temporary.rename(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "create": lambda src: (src / "new").write_bytes(b"new"),
    "create below": lambda src: (src / "sub" / "deep" / "new").write_bytes(b"new"),
    "mkdir": lambda src: (src / "newdir" / "below").mkdir(parents=True),
    "symlink": lambda src: os.symlink("sub", src / "newlink"),
    "mkfifo": lambda src: os.mkfifo(src / "sub" / "fifo"),
    "remove": lambda src: os.unlink(src / "file"),
    "remove directory": lambda src: os.rmdir(src / "empty"),
    "remove tree": lambda src: shutil.rmtree(src / "sub"),
    "rename": lambda src: os.rename(src / "file", src / "renamed"),
    "rename over": lambda src: os.rename(src / "file", src / "other"),
    "rename below": lambda src: os.rename(src / "file", src / "sub" / "deep" / "file"),
    "rename directory": lambda src: os.rename(src / "sub", src / "empty"),
    "move out": lambda src: os.rename(src / "sub", src.parent / f"{src.name}-out"),
    "chmod": lambda src: os.chmod(src / "file", 0o640),
    "chmod directory": lambda src: os.chmod(src / "sub", 0o700),
    "chmod below": lambda src: os.chmod(src / "sub" / "deep" / "file", 0o604),
    "chown": lambda src: os.chown(src / "file", 4001, 4002),
    "link": lambda src: os.link(src / "file", src / "sub" / "link"),
    "remove link": lambda src: os.unlink(src / "link"),
    "xattr": lambda src: os.setxattr(src / "file", b"user.name", b"value"),
    "replace": lambda src: replace(src / "file"),
}
# What --writeback does not promise: the kernel has its own size and times of files.
DATA: dict[str, Callable[[Path], object]] = {
    "write": lambda src: write(src / "file", b"CONTENT"),
    "write through another link": lambda src: write(src / "link", b"ANOTHER"),
    "append": lambda src: write(src / "file", b" and more", 7),
    "truncate": lambda src: os.truncate(src / "file", 3),
    "grow": lambda src: os.truncate(src / "sub" / "deep" / "file", 9000),
    "utime": lambda src: os.utime(src / "file", (1, 2)),
}


@pytest.mark.parametrize("name", [*CHANGES, *DATA])
def test_each_kind_of_change_is_seen(tree: Tree, name: str) -> None:
    if name in DATA and "--writeback" in tree.server.arguments:
        pytest.skip("the kernel keeps size and times of files itself")
    if name == "chown" and os.geteuid() != 0:
        pytest.skip("needs root")
    check_change_is_seen(tree, name)


def check_change_is_seen(tree: Tree, name: str) -> None:
    made(tree)
    assert is_seen(tree)
    assert look(tree.mnt / "new") == "ENOENT"
    before = look(tree.mnt)
    {**CHANGES, **DATA}[name](tree.behind)
    assert is_seen(tree), (look(tree.mnt), look(tree.behind))
    assert look(tree.mnt) != before
    remove_tree(tree.behind.parent / f"{tree.behind.name}-out")


def test_missing_name_that_appears_is_seen(tree: Tree) -> None:
    for number in range(20):
        name = f"name{number}"
        assert not (tree.mnt / name).exists()
        (tree.behind / name).touch()
        assert wait_until((tree.mnt / name).exists), name


def test_acl_is_seen(tree: Tree) -> None:
    (tree.behind / "file").write_bytes(b"secret")
    os.chmod(tree.behind / "file", 0o600)
    assert (
        "user:4001"
        not in subprocess.run(["getfacl", "-n", tree.mnt / "file"], capture_output=True, text=True, check=True).stdout
    )
    subprocess.run(["setfacl", "-m", "u:4001:r", tree.behind / "file"], check=True)

    def is_there() -> bool:
        shown = subprocess.run(["getfacl", "-n", tree.mnt / "file"], capture_output=True, text=True, check=True)
        return "user:4001:r--" in shown.stdout

    assert wait_until(is_there)


def test_open_file_shows_new_data(tree: Tree) -> None:
    if "--writeback" in tree.server.arguments:
        pytest.skip("the kernel keeps size and times of files itself")
    (tree.behind / "file").write_bytes(b"first")
    with opened(tree.mnt / "file", os.O_RDONLY) as fd:
        assert os.pread(fd, 100, 0) == b"first"
        write(tree.behind / "file", b"second")
        assert wait_until(lambda: os.pread(fd, 100, 0) == b"second")
        assert wait_until(lambda: os.fstat(fd).st_size == 6)


def test_many_changes_at_once_are_seen(tree: Tree) -> None:
    """A program reads all the time, so that requests and notifications overtake each other."""
    if "--writeback" in tree.server.arguments:
        pytest.skip("the kernel keeps size and times of files itself")
    reading = threading.Event()

    def read() -> None:
        while not reading.is_set():
            look(tree.mnt)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    generator = random.Random(7)
    try:
        for _ in range(30):
            for _ in range(20):
                one, another = (tree.behind / str(generator.randrange(6)) for _ in range(2))
                action = generator.choice((one.write_bytes, one.unlink, one.rename, os.link, one.chmod))
                if action == os.link:
                    outcome(os.link, one, another)
                elif action == one.write_bytes:
                    outcome(one.write_bytes, generator.randbytes(generator.randrange(9000)))
                elif action == one.unlink:
                    outcome(one.unlink)
                elif action == one.rename:
                    outcome(one.rename, another)
                else:
                    outcome(one.chmod, generator.choice((0o600, 0o644, 0o640)))
            assert is_seen(tree), (look(tree.mnt), look(tree.behind))
    finally:
        reading.set()
        for thread in threads:
            thread.join()


def test_what_is_changed_through_the_mount_is_right_at_once(tree: Tree) -> None:
    for number in range(50):
        path = tree.mnt / f"file{number}"
        path.write_bytes(b"x" * number)
        assert path.stat().st_size == number
        path.chmod(0o600)
        assert path.stat().st_mode & 0o777 == 0o600
        path.rename(tree.mnt / f"moved{number}")
        assert not path.exists()
        assert (tree.mnt / f"moved{number}").read_bytes() == b"x" * number
    assert len(os.listdir(tree.mnt)) == 50


# Caching


def walk(path: Path) -> list[Any]:
    return [
        (
            directory,
            sorted(names),
            sorted(files),
            [os.lstat(os.path.join(directory, name)).st_mtime_ns for name in files],
        )
        for directory, names, files in os.walk(path)
    ]


def test_second_walk_asks_nothing(serve: Serve) -> None:
    server = heard(serve("--watch"))
    for number in range(5):
        (server.source / f"d{number}").mkdir()
        for name in range(20):
            (server.source / f"d{number}" / f"f{name}").write_bytes(b"data")
    first = walk(server.mountpoint)

    def nothing_is_asked() -> bool:
        before = requests(server)
        assert walk(server.mountpoint) == first
        assert not (server.mountpoint / "missing").exists()
        return all(count == before.get(name, 0) for name, count in requests(server).items() if name not in OPENING)

    # The watcher still hears of new files, and the kernel has attributes of a listing's first entries only.
    assert wait_until(nothing_is_asked)


def test_data_is_read_once(serve: Serve) -> None:
    server = heard(serve("--watch"))
    (server.source / "file").write_bytes(b"data" * 10_000)

    def nothing_is_read() -> bool:
        before = requests(server).get("READ", 0)
        for _ in range(5):
            assert (server.mountpoint / "file").read_bytes() == b"data" * 10_000
        return requests(server).get("READ", 0) == before

    assert wait_until(nothing_is_read)  # the watcher still hears of the file that was written


# Sources


@pytest.mark.root
@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_source_on_disk_and_file_systems_below(serve: Serve, kind: str, tmp_path: Path) -> None:
    holder = reachable_directory("llloop-source-", "/var/tmp")
    try:
        server = heard(serve("--watch", source=holder))
        tree = Tree(holder, server.mountpoint, server)
        made(tree)
        assert is_seen(tree)
        (holder / "sub" / "deep" / "file").write_bytes(b"changed")
        assert is_seen(tree)
        below = holder / "below"
        below.mkdir()
        assert os.listdir(server.mountpoint / "below") == []
        image = filesystems.make_image(tmp_path / "image", 32 << 20, "ext4", "-F") if kind == "ext4" else "none"
        arguments = ["-o", "loop"] if kind == "ext4" else ["-t", "tmpfs"]
        with filesystems.mounted(image, below, *arguments):
            (below / "file").write_bytes(b"one")
            assert wait_until((server.mountpoint / "below" / "file").exists), "the mount itself was seen"
            for number in range(10):
                (below / "file").write_bytes(b"x" * number)
                assert wait_until(lambda: (server.mountpoint / "below" / "file").stat().st_size == number)  # noqa: B023
            server.stop()  # the front has directories of it open
    finally:
        remove_tree(holder)


def test_source_without_file_handles_is_watched_by_timeouts(serve: Serve) -> None:
    server = serve("--watch", source=Path("/proc/sys/kernel"))
    server.expect_log("cannot be heard")
    assert wait_until(lambda: method(server).startswith("by timeouts"))
    assert (server.mountpoint / "ostype").read_text() == "Linux\n"


# inotify


@pytest.fixture
def source_for_inotify() -> Iterator[Path]:
    """A source that fanotify does not hear, so that root uses inotify, too: overlayfs. A user's may be anywhere."""
    if os.geteuid() != 0:
        yield from _removed(reachable_directory("llloop-source-", "/dev/shm"))
        return
    holder = reachable_directory("llloop-overlay-", "/dev/shm")
    try:
        for name in ("lower", "upper", "work", "merged"):
            (holder / name).mkdir()
        layers = ",".join(f"{key}dir={holder / key}" for key in ("lower", "upper", "work"))
        with filesystems.mounted("overlay", holder / "merged", "-t", "overlay", "-o", layers):
            (holder / "merged" / "source").mkdir()
            yield holder / "merged" / "source"
    finally:
        remove_tree(holder)


def _removed(directory: Path) -> Iterator[Path]:
    try:
        yield directory
    finally:
        remove_tree(directory)


def with_inotify(serve: Serve, source: Path, command: list[str] | None = None) -> tuple[Server, Tree]:
    server = serve("--watch", source=source, command=command)
    assert wait_until(lambda: method(server).startswith("inotify")), method(server)
    return server, Tree(source, server.mountpoint, server)


@pytest.mark.parametrize("name", [*CHANGES, *DATA])
def test_inotify_shows_each_kind_of_change(source_for_inotify: Path, serve: Serve, name: str) -> None:
    if name == "chown" and os.geteuid() != 0:
        pytest.skip("needs root")
    server, tree = with_inotify(serve, source_for_inotify)
    check_change_is_seen(tree, name)
    assert "directories" in method(server)


def test_watches_follow_what_the_kernel_knows(source_for_inotify: Path, serve: Serve) -> None:
    server, tree = with_inotify(serve, source_for_inotify)
    assert method(server) == "inotify, 1 directory"
    for number in range(10):
        (tree.behind / f"{number}" / "below").mkdir(parents=True)
    walk(tree.mnt)
    assert wait_until(lambda: method(server) == "inotify, 21 directories"), method(server)
    for number in range(10):
        shutil.rmtree(tree.behind / f"{number}")
    assert wait_until(lambda: not any((tree.mnt / f"{number}").exists() for number in range(10)))
    assert wait_until(lambda: method(server) == "inotify, 1 directory"), method(server)


def test_directory_that_moves_keeps_its_watch(source_for_inotify: Path, serve: Serve) -> None:
    _, tree = with_inotify(serve, source_for_inotify)
    made(tree)
    assert is_seen(tree)
    os.rename(tree.behind / "sub", tree.behind / "empty" / "moved")
    assert is_seen(tree)
    write(tree.behind / "empty" / "moved" / "deep" / "file", b"DEEP")
    (tree.behind / "empty" / "moved" / "new").touch()
    assert is_seen(tree)


def test_changes_while_looking_up_are_seen(source_for_inotify: Path, serve: Serve) -> None:
    """A directory changes while the mount gets to know it, so that the watch may be too late."""
    _, tree = with_inotify(serve, source_for_inotify)
    for number in range(150):
        holder = f"{number}"
        (tree.behind / holder / "sub").mkdir(parents=True)
        changing = threading.Thread(target=_change, args=(tree.behind / holder, number))
        changing.start()
        look(tree.mnt / holder)
        changing.join()
        own = Tree(tree.behind / holder, tree.mnt / holder, tree.server)
        assert is_seen(own), (look(own.mnt), look(own.behind))


def _change(directory: Path, number: int) -> None:
    time.sleep(number % 15 / 10_000)  # so that the changes happen at different points
    (directory / "file").write_bytes(b"one")
    (directory / "sub" / "file").write_bytes(b"two")
    (directory / "sub").chmod(0o700)
    (directory / "file").write_bytes(b"three")
    (directory / "sub" / "file").chmod(0o600)


# Beyond the limit

LIMITED = """
from llloop.cli.main import main
from llloop.linux import inotify
inotify.max_user_watches = lambda: 8
main()
"""


def test_directories_beyond_the_limit_keep_timeouts(source_for_inotify: Path, serve: Serve) -> None:
    server, tree = with_inotify(serve, source_for_inotify, [sys.executable, "-c", LIMITED, "serve"])
    for number in range(10):
        (tree.behind / f"{number}").mkdir()
        (tree.behind / f"{number}" / "file").write_bytes(b"one")
    walk(tree.mnt)
    assert wait_until(lambda: method(server) == "inotify, 4 directories, 7 by timeouts"), method(server)
    for number in range(10):
        (tree.behind / f"{number}" / "file").write_bytes(b"changed")
        (tree.behind / f"{number}" / "new").touch()
    assert is_seen(tree)


# Loss


def test_killed_watcher_is_replaced_and_everything_dropped(serve: Serve) -> None:
    server = heard(serve("--watch"))
    server.expect_log("llloop-watcher was killed", required=False)
    tree = Tree(server.source, server.mountpoint, server)
    made(tree)
    assert is_seen(tree)
    # A new watcher says how it hears before it drops everything. If it dies in between, its drop is not counted.
    assert wait_until(lambda: drops(server) >= 1)
    with opened(server.mountpoint / "file", os.O_RDONLY) as fd:
        for number in range(5):
            before = drops(server)
            (watcher,) = process_ids(server, "watcher")
            stop_process(watcher)
            write(server.source / "file", f"{number}".encode())
            os.chmod(server.source / "sub", 0o700 + number)
            (server.source / f"new{number}").touch()
            os.kill(watcher, signal.SIGKILL)
            assert is_seen(tree)
            assert wait_until(lambda: os.pread(fd, 1, 0) == f"{number}".encode())  # noqa: B023
            assert is_replaced(server, "watcher", watcher)
            heard(server)
            assert wait_until(lambda: drops(server) > before)  # noqa: B023
    assert drops(server) >= 5


def test_overflow_drops_everything(serve: Serve) -> None:
    server = heard(serve("--watch"))
    server.expect_log("too much happened in the source")
    tree = Tree(server.source, server.mountpoint, server)
    (server.source / "many").mkdir()
    made(tree)
    assert is_seen(tree)
    dropped = drops(server)
    (watcher,) = process_ids(server, "watcher")
    stop_process(watcher)
    interface = "fanotify" if os.geteuid() == 0 else "inotify"
    most = int(Path(f"/proc/sys/fs/{interface}/max_queued_events").read_text())
    for number in range(most + 100):
        (server.source / "many" / f"{number}").touch()
    write(server.source / "file", b"CHANGED")
    (server.source / "last").touch()
    os.kill(watcher, signal.SIGCONT)
    assert wait_until(lambda: (server.mountpoint / "last").exists())
    assert wait_until(lambda: (server.mountpoint / "file").read_bytes() == b"CHANGED")
    shutil.rmtree(server.source / "many")
    assert is_seen(tree)
    assert wait_until(lambda: drops(server) > dropped)


# Changes 100,000 times a second, or as often as it can, the times of files in argv[1].
_STORM = """
import os, sys, time
os.chdir(sys.argv[1])
names = os.listdir()
began, done = time.monotonic(), 0
while (passed := time.monotonic() - began) < 10:
    for _ in range(min(int(passed * 100_000) - done, 10_000)):
        os.utime(names[done % len(names)])
        done += 1
    time.sleep(0.001)
"""


@pytest.mark.slow
def test_storm_of_changes_leaves_memory_bounded_and_all_right(serve: Serve) -> None:
    server = heard(serve("--watch"))
    (server.source / "storm").mkdir()
    for number in range(2000):
        (server.source / "storm" / f"{number}").touch()
    calm = server.source / "calm"
    calm.mkdir()
    tree = Tree(calm, server.mountpoint / "calm", server)
    made(tree)
    names = [path.name for path in (server.mountpoint / "storm").iterdir() if path.stat()]
    (watcher,) = process_ids(server, "watcher")
    before = resident(watcher)
    with subprocess.Popen([sys.executable, "-c", _STORM, str(server.source / "storm")]) as storm:
        number = 0
        while storm.poll() is None:  # reading and writing through the mount goes on
            number += 1
            (server.mountpoint / "written").write_bytes(b"%d" % number)
            assert (server.mountpoint / "written").read_bytes() == b"%d" % number
            (calm / "file").write_bytes(b"%d" % number)
    assert storm.returncode == 0
    assert resident(watcher) - before < 64 << 20
    assert process_ids(server, "watcher") == [watcher]
    assert wait_until(
        lambda: all(
            (server.mountpoint / "storm" / name).stat().st_mtime_ns
            == (server.source / "storm" / name).stat().st_mtime_ns
            for name in names
        )
    )
    assert is_seen(tree)


def resident(pid: int) -> int:
    """The resident memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_killed_front_loses_no_change(serve: Serve) -> None:
    server = heard(serve("--watch"))
    server.expect_log("llloop-front was killed", required=False)
    tree = Tree(server.source, server.mountpoint, server)
    made(tree)
    assert is_seen(tree)
    for number in range(5):
        (front,) = process_ids(server, "front")
        os.kill(front, signal.SIGKILL)
        write(server.source / "file", f"{number}".encode())
        (server.source / "sub" / f"new{number}").touch()
        assert is_seen(tree)
        assert is_replaced(server, "front", front)


def test_request_that_hangs_holds_nothing_up(serve: Serve) -> None:
    """The notification for a directory waits for a request there. All others go on."""
    server = heard(serve("--watch", "--workers", "2"))
    (server.source / "stuck").mkdir()
    (server.source / "free").mkdir()
    (server.source / "free" / "file").write_bytes(b"one")
    assert (server.mountpoint / "free" / "file").read_bytes() == b"one"
    assert os.listdir(server.mountpoint / "stuck") == []
    (front,) = process_ids(server, "front")
    stop_process(front)
    looking = start_python("import os, sys; os.path.exists(sys.argv[1])", server.mountpoint / "stuck" / "name")
    time.sleep(0.5)  # until the request is there; if it is not yet, the test shows less
    (server.source / "stuck" / "name").touch()
    (server.source / "free" / "file").write_bytes(b"two")
    assert wait_until(lambda: stats(server)["watch"]["heard"] >= 2)
    os.kill(front, signal.SIGCONT)
    assert looking.wait(30) == 0
    looking.communicate()
    assert wait_until(lambda: (server.mountpoint / "free" / "file").read_bytes() == b"two")
    assert wait_until(lambda: (server.mountpoint / "stuck" / "name").exists())


# Figures


def test_events_are_counted(serve: Serve) -> None:
    server = heard(serve("--watch"))
    (server.source / "file").write_bytes(b"one")
    assert (server.mountpoint / "file").read_bytes() == b"one"
    before = stats(server)["watch"]
    if os.geteuid() == 0:  # inotify does not tell who did something
        (server.mountpoint / "own").write_bytes(b"own")
        assert wait_until(lambda: stats(server)["watch"]["own"] > before["own"])
    os.chmod(server.source / "file", 0o600)
    assert wait_until(lambda: stats(server)["watch"]["heard"] > before["heard"])
    after = stats(server)["watch"]
    assert after["notified"] > before["notified"]
    assert sum(after["histogram"]) == after["heard"]


def test_without_watch_nothing_is_heard(serve: Serve) -> None:
    server = serve()
    assert method(server) == "off"
    assert process_ids(server, "watcher") == []
