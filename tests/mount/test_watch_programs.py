"""`--watch` with programs that people use: they watch the mount, and files are changed in the source or through it."""

from __future__ import annotations

import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.mount.test_watch import heard
from tests.mount.test_watch_events import filled, wait_for_the_relay
from tests.server import Tree
from tests.server_processes import wait_until

pytestmark = [pytest.mark.mounted, pytest.mark.own_loop, pytest.mark.root]


@pytest.fixture
def tree(serve: Serve, serve_options: list[str]) -> Tree:
    if "--io=kernel" in serve_options:
        pytest.skip("writes are not told with this option")
    own = filled(heard(serve("--watch")))
    wait_for_the_relay(own)
    return own


@pytest.fixture(params=["source", "mount"])
def place(request: pytest.FixtureRequest, tree: Tree) -> Path:
    """Where files are changed."""
    return tree.src if request.param == "source" else tree.mnt


@contextmanager
def lines_of(*command: str) -> Iterator[queue.Queue[str]]:
    """The lines that a program writes, as they come."""
    lines: queue.Queue[str] = queue.Queue()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    stream = process.stdout

    def read() -> None:
        for line in stream:
            lines.put(line.rstrip("\n"))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        stream.close()


def comes(lines: queue.Queue[str], wanted: str) -> bool:
    """Whether a line with a text comes."""
    while wanted not in (line := lines.get(timeout=30)):
        pass
    return wanted in line


@pytest.mark.skipif(shutil.which("inotifywait") is None, reason="needs inotify-tools")
def test_inotifywait(tree: Tree, place: Path) -> None:
    with lines_of("inotifywait", "-m", "-r", "--format", "%e %f", str(tree.mnt)) as lines:
        assert comes(lines, "Watches established")
        (place / "new").write_bytes(b"data")
        assert comes(lines, "CREATE new")
        assert comes(lines, "MODIFY new")
        assert comes(lines, "CLOSE_WRITE,CLOSE new")
        (place / "new").rename(place / "moved")
        assert comes(lines, "MOVED_FROM new")
        assert comes(lines, "MOVED_TO moved")
        (place / "moved").unlink()
        assert comes(lines, "DELETE moved")


_WATCHDOG = """
import sys, time
from watchdog.events import FileSystemEventHandler
from watchdog.observers.inotify import InotifyObserver
class Handler(FileSystemEventHandler):
    def on_any_event(self, event):
        print(event.event_type, event.src_path, event.dest_path, flush=True)
observer = InotifyObserver()
observer.schedule(Handler(), sys.argv[1], recursive=True)
observer.start()
print("ready", flush=True)
time.sleep(600)
"""


def test_watchdog(tree: Tree, place: Path) -> None:
    pytest.importorskip("watchdog")
    with lines_of(sys.executable, "-c", _WATCHDOG, str(tree.mnt)) as lines:
        assert comes(lines, "ready")
        (place / "below").mkdir()
        assert comes(lines, f"created {tree.mnt / 'below'}")
        (place / "file").write_bytes(b"more")
        assert comes(lines, f"modified {tree.mnt / 'file'}")
        (place / "file").rename(place / "moved")
        assert comes(lines, f"moved {tree.mnt / 'file'} {tree.mnt / 'moved'}")
        (place / "moved").unlink()
        assert comes(lines, f"deleted {tree.mnt / 'moved'}")


_WATCHFILES = """
import sys
from watchfiles import watch
print("ready", flush=True)
for changes in watch(sys.argv[1], force_polling=False, yield_on_timeout=True, rust_timeout=200):
    print(sorted((change.name, path) for change, path in changes) or "ready", flush=True)
"""


def test_watchfiles(tree: Tree, place: Path) -> None:
    pytest.importorskip("watchfiles")
    with lines_of(sys.executable, "-c", _WATCHFILES, str(tree.mnt)) as lines:
        assert comes(lines, "ready")
        assert comes(lines, "ready")  # after the first timeout it watches
        (place / "new").write_bytes(b"data")
        assert comes(lines, f"('added', '{tree.mnt / 'new'}')")
        (place / "file").write_bytes(b"more")
        assert comes(lines, f"('modified', '{tree.mnt / 'file'}')")
        (place / "new").unlink()
        assert comes(lines, f"('deleted', '{tree.mnt / 'new'}')")


_APPLICATION = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"%s"})
"""


def test_uvicorn_reloads(tree: Tree, place: Path) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("watchfiles")
    (tree.src / "application.py").write_text(_APPLICATION % "old")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def answers(text: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                return bool(answer.read() == text.encode())
        except OSError:
            return False

    def change_and_ask(text: str) -> bool:
        (place / "application.py").write_text(_APPLICATION % text)
        return wait_until(lambda: answers(text), 10)

    command = [sys.executable, "-m", "uvicorn", "application:app", "--reload", "--port", str(port)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "WATCHFILES_FORCE_POLLING": "false"}
    with subprocess.Popen(
        command, cwd=tree.mnt, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            assert wait_until(lambda: answers("old"))
            # It answers before it watches, so the first change may be too early for it.
            assert any(change_and_ask(f"new {number}") for number in range(6))
        finally:
            server.terminate()


def test_tail_follows(tree: Tree, place: Path) -> None:
    (tree.mnt / "file").write_bytes(b"content\n")
    with lines_of("tail", "-n", "+1", "-F", str(tree.mnt / "file")) as lines:
        assert comes(lines, "content")
        with open(place / "file", "ab") as file:
            file.write(b"appended\n")
        assert comes(lines, "appended")
        (place / "new").write_bytes(b"replaced\n")
        (place / "new").rename(place / "file")
        assert comes(lines, "replaced")


_CHOKIDAR = """
const watcher = require("chokidar").watch(process.argv[1], {usePolling: false});
watcher.on("ready", () => console.log("ready"));
watcher.on("all", (event, path) => console.log(event, path));
"""


def _has_chokidar() -> bool:
    node = shutil.which("node")
    return node is not None and not subprocess.call([node, "-e", "require('chokidar')"], stderr=subprocess.DEVNULL)


@pytest.mark.skipif(not _has_chokidar(), reason="needs Node with chokidar in NODE_PATH")
def test_chokidar(tree: Tree, place: Path) -> None:
    with lines_of("node", "-e", _CHOKIDAR, str(tree.mnt)) as lines:
        assert comes(lines, "ready")
        (place / "new").write_bytes(b"data")
        assert comes(lines, f"add {tree.mnt / 'new'}")
        (place / "file").write_bytes(b"more")
        assert comes(lines, f"change {tree.mnt / 'file'}")
        (place / "directory" / "deep").mkdir()
        assert comes(lines, f"addDir {tree.mnt / 'directory' / 'deep'}")
        (place / "new").unlink()
        assert comes(lines, f"unlink {tree.mnt / 'new'}")


# Waits for IN_CLOSE_WRITE (8) in /data and shows the file.
_IN_SANDBOX = """
import ctypes, os, struct
libc = ctypes.CDLL(None)
inotify = libc.inotify_init()
assert libc.inotify_add_watch(inotify, b"/data", 8) > 0
print("ready", flush=True)
event = os.read(inotify, 4096)
name = event[16:16 + struct.unpack_from("I", event, 12)[0]].rstrip(b"\\0").decode()
print(name, open("/data/" + name, "rb").read(), flush=True)
"""


@pytest.mark.parametrize("how", ["--bind", "--ro-bind"])
def test_sandbox_that_has_the_mount_bound(tree: Tree, how: str) -> None:
    bwrap, python = shutil.which("bwrap"), "/usr/bin/python3"
    if bwrap is None or not os.path.exists(python):
        pytest.skip("needs bubblewrap and Python in /usr")
    links = [part for name in ("bin", "lib", "lib64") for part in ("--symlink", f"usr/{name}", f"/{name}")]
    places = ["--ro-bind", "/usr", "/usr", *links, "--dev", "/dev", how, str(tree.mnt), "/data"]
    with lines_of(bwrap, "--unshare-all", "--die-with-parent", *places, python, "-c", _IN_SANDBOX) as lines:
        assert comes(lines, "ready")
        (tree.src / "new").write_bytes(b"data")
        assert comes(lines, "new b'data'")
