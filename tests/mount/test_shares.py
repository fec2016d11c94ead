"""Descriptors of the server are shared among users: one user cannot take all."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.as_user import Caller, Child, run_as
from tests.conftest import Serve
from tests.expect import outcome
from tests.mount.test_scale import with_descriptor_limit
from tests.server import Server
from tests.server_processes import is_replaced, process_ids, wait_until
from tests.syscalls import opened

pytestmark = [pytest.mark.root, pytest.mark.mounted]

GREEDY, OTHER = Caller(4001, 4001), Caller(4002, 4002)
LIMIT = 400


@pytest.fixture
def server(serve: Serve) -> Server:
    """A server that may open few files, with a directory of each user's."""
    server = serve("--workers", "1", command=with_descriptor_limit(LIMIT))
    for user in (GREEDY, OTHER):
        directory = server.source / str(user.uid)
        (directory / "below" / "deeper").mkdir(parents=True)
        for number in range(6):
            (directory / f"file{number}").write_bytes(b"content")
        for path in (directory, *directory.rglob("*")):
            os.chown(path, user.uid, user.uid)
    return server


def everything(directory: Path) -> dict[str, Any]:
    """What anybody may want to do in his directory, and what comes of it."""

    def write_and_read() -> bytes:
        with opened(directory / "new", os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
            os.pwrite(fd, bytes(4096), 0)
            return os.pread(fd, 10, 0)

    actions: dict[str, Callable[[], Any]] = {
        "stat": lambda: os.stat(directory / "file0").st_size,
        "read": lambda: (directory / "file0").read_bytes(),
        "create": write_and_read,
        "mkdir": lambda: os.mkdir(directory / "made"),
        "list": lambda: len(os.listdir(directory / "below")),
        "truncate": lambda: os.truncate(directory / "file1", 0),
        "unlink": lambda: os.unlink(directory / "file2"),
        "rename": lambda: os.rename(directory / "file3", directory / "below" / "deeper" / "file3"),
        "xattr": lambda: os.listxattr(directory / "file4"),
        "utime": lambda: os.utime(directory / "file4"),
    }
    return {name: _error(action) for name, action in actions.items()}


def _error(action: Callable[..., Any], *arguments: Any) -> Any:
    """The name of the error that a call fails with, or None."""
    found = outcome(action, *arguments)
    return found if isinstance(found, str) else None


ALL_WELL = dict.fromkeys(("stat", "read", "create", "mkdir", "list", "truncate", "unlink", "rename", "xattr", "utime"))


def open_all(directory: Path) -> tuple[int, str | None, Any, Any]:
    """Open what one may, then say how many that was, why no more, and what still can be done."""
    descriptors: list[int] = []
    why = None
    while why is None and len(descriptors) < LIMIT:
        why = outcome(lambda: descriptors.append(os.open(directory / "file0", os.O_RDONLY)))
    listed = _error(os.listdir, directory)
    return len(descriptors), why, listed, _while_others_try(directory, lambda: None)


def hold_removed_files(directory: Path) -> Any:
    """Hold as many removed files as one pleases by descriptors that open nothing, and return what is left of them."""
    held = []
    for number in range(LIMIT):
        path = directory / f"removed{number}"
        path.write_bytes(bytes(number))
        held.append(os.open(path, os.O_PATH))
        path.unlink()

    def look() -> list[int | None]:
        return [number if _error(os.fstat, fd) is None else None for number, fd in enumerate(held)]

    return _while_others_try(directory, look)


def _while_others_try(directory: Path, look: Callable[[], Any]) -> Any:
    """Wait until the others have tried what they want to try, and return what there is to be seen then."""
    os.mkdir(directory / "holding")  # which opens no file
    assert wait_until(lambda: (directory / "tried").exists(), 30)
    return look()


def try_while(child: Child[Any], server: Server, *more: Callable[[], None]) -> Any:
    """What another user can do while the greedy one holds what he has taken; then the latter's own result."""
    own = server.source / str(GREEDY.uid)
    try:
        assert wait_until(lambda: (own / "holding").exists() or child.is_done(), 30)
        for action in more:
            action()
        found = run_as(OTHER, everything, server.mountpoint / str(OTHER.uid))
    finally:
        (own / "tried").touch()
        result = child.result()
    assert found == ALL_WELL
    return result


def test_only_the_user_with_too_many_open_files_is_refused(server: Server) -> None:
    own = server.mountpoint / str(GREEDY.uid)
    count, why, listed, _ = try_while(Child(open_all, own, caller=GREEDY), server)
    assert why == "EMFILE"
    assert LIMIT / 8 < count < LIMIT / 2
    assert listed is None, "directories can still be listed"
    assert wait_until(lambda: run_as(GREEDY, _error, (own / "file0").read_bytes) is None)


def test_oldest_removed_files_of_a_user_are_closed(server: Server) -> None:
    own = server.mountpoint / str(GREEDY.uid)
    seen = try_while(Child(hold_removed_files, own, caller=GREEDY), server)
    kept = [number for number in seen if number is not None]
    assert kept == list(range(LIMIT - len(kept), LIMIT))
    assert LIMIT / 8 < len(kept) < LIMIT / 2


@pytest.mark.own_loop
def test_shares_survive_the_front(server: Server) -> None:
    server.expect_log("llloop-front was killed by signal 9")

    def kill_front() -> None:
        (front,) = process_ids(server, "front")
        os.kill(front, signal.SIGKILL)
        assert is_replaced(server, "front", front)
        more = run_as(GREEDY, _error, os.open, server.mountpoint / str(GREEDY.uid) / "file1", os.O_RDONLY)
        assert more == "EMFILE"

    child = Child(open_all, server.mountpoint / str(GREEDY.uid), caller=GREEDY)
    assert try_while(child, server, kill_front)[1] == "EMFILE"
