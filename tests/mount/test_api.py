"""llloop as a library: a mount for the length of a with block, and serve() as a program's own main loop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import llloop
from llloop import errors
from tests.mirror import Mirror
from tests.mount.command_line import Ground, environment, ground, process_titles, wait_until
from tests.watchdog import Watchdog, kill_session, mount_entry, processes_of_session, unmount_lazily

pytestmark = [pytest.mark.mounted, pytest.mark.user]


@pytest.fixture
def place(via: str, watchdog: Watchdog) -> Iterator[Ground]:
    with ground(Mirror.prepare(via, watchdog), via) as prepared:
        try:
            yield prepared
        finally:
            unmount_lazily(str(prepared.mountpoint))


@pytest.fixture(autouse=True)
def not_by_the_fallback(via: str) -> None:
    if via == "llfuse":
        pytest.skip("the library starts the default loop: this would be the same again")


def is_mounted(place: Ground) -> bool:
    return mount_entry(str(place.mountpoint)) is not None


def gone(pid: int) -> bool:
    """Ended and collected: a zombie would be left to the caller for ever."""
    return not Path(f"/proc/{pid}").exists()


def test_a_mount_for_a_with_block(place: Ground) -> None:
    (place.source / "file").write_text("content")
    with llloop.mount(place.source, place.mountpoint, workers=2) as mounted:
        assert is_mounted(place)
        assert Path(mounted.source) == place.source and Path(mounted.mountpoint) == place.mountpoint
        assert (place.mountpoint / "file").read_text() == "content"
        (place.mountpoint / "new").write_bytes(bytes(1_000_000))
        pid = mounted.pid
        titles = process_titles(os.getsid(pid))
        assert "llloop-supervisor" in titles and "llloop-worker-1" in titles
    assert not is_mounted(place)
    assert gone(pid)
    assert (place.source / "new").stat().st_size == 1_000_000


def test_strings_are_paths_too(place: Ground) -> None:
    with llloop.mount(str(place.source), str(place.mountpoint)):
        assert is_mounted(place)
    assert not is_mounted(place)


def test_an_exception_in_the_block_unmounts_and_goes_on(place: Ground) -> None:
    with pytest.raises(ZeroDivisionError), llloop.mount(place.source, place.mountpoint) as mounted:
        pid = mounted.pid
        raise ZeroDivisionError
    assert not is_mounted(place)
    assert gone(pid)


def test_a_file_left_open_in_the_block_does_not_keep_it_mounted(place: Ground) -> None:
    with llloop.mount(place.source, place.mountpoint) as mounted:
        pid = mounted.pid
        held = open(place.mountpoint / "file", "w")  # noqa: SIM115
    try:
        assert not is_mounted(place)
        assert gone(pid)
    finally:
        # What it could not flush is its own loss.
        os.close(os.dup2(os.open("/dev/null", os.O_RDWR), held.fileno()))


def test_options_are_keywords(place: Ground) -> None:
    with llloop.mount(place.source, place.mountpoint, workers=1, read_only=True, fsname="a name", options=("noatime",)):
        entry = mount_entry(str(place.mountpoint))
        assert entry and {"ro", "noatime"} <= set(entry[5].split(","))
        assert entry[entry.index("-") + 2] == "a\\040name"
        with pytest.raises(OSError, match="Read-only file system"):
            (place.mountpoint / "file").touch()


def test_the_command_s_environment_is_not_the_library_s(place: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody expects of a program that says how it mounts to mount otherwise for a variable in its user's shell."""
    monkeypatch.setenv("LLLOOP_SERVE_READ_ONLY", "1")
    monkeypatch.setenv("LLLOOP_SERVE_WORKERS", "3")
    with llloop.mount(place.source, place.mountpoint, workers=1) as mounted:
        (place.mountpoint / "file").write_text("content")
        assert "llloop-worker-1" not in process_titles(os.getsid(mounted.pid))
    assert (place.source / "file").read_text() == "content"


def test_an_unknown_keyword(place: Ground) -> None:
    with pytest.raises(errors.UsageError, match="wrokers"), llloop.mount(place.source, place.mountpoint, wrokers=2):
        raise AssertionError("mounted")
    assert not is_mounted(place)


def test_bad_input_is_an_exception_of_its_kind(place: Ground) -> None:
    cases: list[tuple[type[errors.LlloopError], Path, Path, dict[str, int]]] = [
        (errors.SourceError, place.source / "missing", place.mountpoint, {}),
        (errors.MountpointError, place.source, place.mountpoint / "missing", {}),
        (errors.MountpointError, place.source, place.source, {}),
        (errors.UsageError, place.source, place.mountpoint, {"workers": -1}),
    ]
    for kind, source, mountpoint, options in cases:
        with pytest.raises(kind) as raised, llloop.mount(source, mountpoint, **options):
            raise AssertionError("mounted")
        assert "\n" not in str(raised.value)
        assert not is_mounted(place)


def test_two_mounts_at_once(place: Ground) -> None:
    second = place.state / "second"
    second.mkdir()
    try:
        with llloop.mount(place.source, place.mountpoint) as one, llloop.mount(place.source, second) as other:
            assert one.pid != other.pid
            (place.mountpoint / "file").write_text("content")
            assert (second / "file").read_text() == "content"
        assert gone(one.pid) and gone(other.pid)
        assert mount_entry(str(second)) is None
    finally:
        unmount_lazily(str(second))


def test_one_after_the_other_leaves_no_descriptors(place: Ground) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with llloop.mount(place.source, place.mountpoint):
        pass
    before = descriptors()
    for _ in range(3):
        with llloop.mount(place.source, place.mountpoint):
            pass
    assert descriptors() == before


def test_a_program_with_threads_and_handlers_of_its_own(place: Ground) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    done = threading.Event()
    lock = threading.Lock()

    def hold_locks() -> None:
        while not done.wait(0.001):
            with lock:
                pass

    threads = [threading.Thread(target=hold_locks) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with llloop.mount(place.source, place.mountpoint):
            assert {number: signal.getsignal(number) for number in handlers} == handlers
            (place.mountpoint / "file").write_text("content")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_mount_unmounted_by_somebody_else(place: Ground) -> None:
    with llloop.mount(place.source, place.mountpoint) as mounted:
        subprocess.run(["fusermount", "-u", place.mountpoint], check=True, timeout=30)
    assert gone(mounted.pid)


PROGRAM = """
import sys, llloop
{body}
"""


def program(body: str, *arguments: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd="/",
        start_new_session=True,
    )


@pytest.mark.parametrize("how", ["fusermount -u", "SIGTERM", "SIGINT"])
def test_serve_blocks_until_unmounted(place: Ground, how: str) -> None:
    (place.source / "file").write_text("content")
    process = program(
        "llloop.serve(sys.argv[1], sys.argv[2], workers=1)\nprint('returned')", place.source, place.mountpoint
    )
    try:
        wait_until(lambda: is_mounted(place), "mounted")
        assert (place.mountpoint / "file").read_text() == "content"
        assert process.poll() is None
        if how == "fusermount -u":
            subprocess.run(["fusermount", "-u", place.mountpoint], check=True, timeout=30)
        else:
            process.send_signal(getattr(signal, how))
        stdout, stderr = process.communicate(timeout=30)
        assert (process.returncode, stdout.splitlines()[-1]) == (0, "returned"), stderr
        assert "Traceback" not in stderr
        assert not is_mounted(place)
        assert processes_of_session(process.pid) == []
    finally:
        kill_session(process.pid)
        process.communicate()


def test_serve_raises_what_is_wrong(place: Ground) -> None:
    with pytest.raises(errors.SourceError):
        llloop.serve(place.source / "missing", place.mountpoint)


def test_a_program_that_ends_in_the_block_leaves_nothing(place: Ground) -> None:
    body = (
        "with llloop.mount(sys.argv[1], sys.argv[2]) as mounted:\n    print(mounted.pid, flush=True)\n    sys.exit(7)"
    )
    process = program(body, place.source, place.mountpoint)
    try:
        stdout, stderr = process.communicate(timeout=30)
        assert process.returncode == 7, stderr
        assert gone(int(stdout))
        assert not is_mounted(place)
    finally:
        kill_session(process.pid)


def test_the_documented_names_are_there() -> None:
    assert {"mount", "serve", "__version__"} <= set(llloop.__all__)
    for function in (llloop.mount, llloop.serve):
        assert function.__doc__ and "source" in function.__annotations__
