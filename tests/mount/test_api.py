"""llloop as a library: a mount for the length of a with block, and serve() as a program's own main loop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import llloop
from llloop import errors
from tests.mount.command_line import Ground, environment, ground, process_titles, wait_until
from tests.server import Server
from tests.watchdog import Watchdog, kill_session, mount_entry, processes_of_session, unmount_lazily

pytestmark = [pytest.mark.mounted, pytest.mark.user]


@pytest.fixture
def place(via: str, watchdog: Watchdog) -> Iterator[Ground]:
    with ground(Server.prepare(via, watchdog), via) as prepared:
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


def test_mount_lasts_as_long_as_the_with_block(place: Ground) -> None:
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


def test_paths_may_be_strings(place: Ground) -> None:
    with llloop.mount(str(place.source), str(place.mountpoint)):
        assert is_mounted(place)
    assert not is_mounted(place)


def test_exception_in_the_block_unmounts_and_propagates(place: Ground) -> None:
    with pytest.raises(ZeroDivisionError), llloop.mount(place.source, place.mountpoint) as mounted:
        pid = mounted.pid
        raise ZeroDivisionError
    assert not is_mounted(place)
    assert gone(pid)


def test_open_file_does_not_prevent_the_unmount(place: Ground) -> None:
    with llloop.mount(place.source, place.mountpoint) as mounted:
        pid = mounted.pid
        held = open(place.mountpoint / "file", "w")  # noqa: SIM115
    try:
        assert not is_mounted(place)
        assert gone(pid)
    finally:
        with suppress(OSError):  # without the mount, the data cannot be written
            held.close()


def test_options_are_keyword_arguments(place: Ground) -> None:
    with llloop.mount(place.source, place.mountpoint, workers=1, read_only=True, fsname="a name", options=("noatime",)):
        entry = mount_entry(str(place.mountpoint))
        assert entry and {"ro", "noatime"} <= set(entry[5].split(","))
        assert entry[entry.index("-") + 2] == "a\\040name"
        with pytest.raises(OSError, match="Read-only file system"):
            (place.mountpoint / "file").touch()


def test_library_ignores_environment_variables(place: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable in the user's shell must not change how a program mounts."""
    monkeypatch.setenv("LLLOOP_SERVE_READ_ONLY", "1")
    monkeypatch.setenv("LLLOOP_SERVE_WORKERS", "3")
    with llloop.mount(place.source, place.mountpoint, workers=1) as mounted:
        (place.mountpoint / "file").write_text("content")
        assert "llloop-worker-1" not in process_titles(os.getsid(mounted.pid))
    assert (place.source / "file").read_text() == "content"


def test_unknown_keyword_is_refused(place: Ground) -> None:
    with pytest.raises(errors.UsageError, match="wrokers"), llloop.mount(place.source, place.mountpoint, wrokers=2):
        raise AssertionError("mounted")
    assert not is_mounted(place)


def test_invalid_input_raises_its_exception_class(place: Ground) -> None:
    cases: list[tuple[type[errors.LlloopError], Path, Path, dict[str, Any]]] = [
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


def test_successive_mounts_leak_no_descriptors(place: Ground) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with llloop.mount(place.source, place.mountpoint):
        pass
    before = descriptors()
    for _ in range(3):
        with llloop.mount(place.source, place.mountpoint):
            pass
    assert descriptors() == before


def test_program_with_threads_and_signal_handlers(place: Ground) -> None:
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


def test_mount_unmounted_by_another_process(place: Ground) -> None:
    with llloop.mount(place.source, place.mountpoint) as mounted:
        subprocess.run(["fusermount", "-u", place.mountpoint], check=True, timeout=30)
    assert gone(mounted.pid)


def test_forked_child_does_not_keep_the_mount(place: Ground) -> None:
    """The child has all descriptors of the program, and outlives the block."""
    with llloop.mount(place.source, place.mountpoint, workers=1) as mounted:
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        begun = time.monotonic()
    try:
        assert not is_mounted(place) and gone(mounted.pid)
        assert time.monotonic() - begun < 10
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_forked_child_that_leaves_the_block_does_not_unmount(place: Ground) -> None:
    child = -1
    try:
        with llloop.mount(place.source, place.mountpoint, workers=1) as mounted:
            child = os.fork()
            if child == 0:
                raise KeyboardInterrupt
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 7
            (place.mountpoint / "file").write_text("content")
            assert not gone(mounted.pid)
    except KeyboardInterrupt:
        os._exit(7)


def test_killed_server_leaves_no_mount(place: Ground) -> None:
    with (
        pytest.raises(errors.LlloopError, match="ended with exit code"),
        llloop.mount(place.source, place.mountpoint, workers=1) as mounted,
    ):
        os.kill(mounted.pid, signal.SIGKILL)
    assert not is_mounted(place)


def test_stopped_server_ends_with_the_block(place: Ground) -> None:
    begun = time.monotonic()
    with llloop.mount(place.source, place.mountpoint, workers=1) as mounted:
        os.kill(mounted.pid, signal.SIGSTOP)
    assert not is_mounted(place) and gone(mounted.pid)
    assert time.monotonic() - begun < 20


def test_program_without_free_descriptors(place: Ground) -> None:
    body = """
import gc, os, resource
from llloop import errors
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    pass
refused = 0
while True:
    try:
        with llloop.mount(sys.argv[1], sys.argv[2], workers=1):
            break
    except errors.HostError as error:
        assert "Too many open files" in str(error), error
    refused += 1
    os.close(taken.pop())
gc.collect()
for one in taken:
    os.close(one)
print(refused, len(os.listdir("/proc/self/fd")))
"""
    process = program(body, place.source, place.mountpoint)
    try:
        stdout, stderr = process.communicate(timeout=60)
        refused, descriptors = map(int, stdout.split())
        assert refused > 3 and descriptors < 10, stderr
        assert not is_mounted(place) and "Traceback" not in stderr
    finally:
        kill_session(process.pid)


@pytest.mark.parametrize("handling", ["signal.SIG_IGN", "lambda number, frame: reap()"])
def test_program_that_reaps_all_children(place: Ground, handling: str) -> None:
    """llloop gets the status of its children, and restores the program's own signal handling."""
    body = f"""
import os, signal, subprocess, threading
def reap():
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
handling = {handling}
signal.signal(signal.SIGCHLD, handling)
with llloop.mount(sys.argv[1], sys.argv[2], workers=1):
    os.listdir(sys.argv[2])
own = os.getpid()
if os.fork() == 0:
    while not os.path.ismount(sys.argv[2]):
        pass
    os.statvfs(sys.argv[2])  # waits until the server answers
    os.kill(own, signal.SIGTERM)
    os._exit(0)
assert llloop.serve(sys.argv[1], sys.argv[2], workers=1) == 0
assert signal.getsignal(signal.SIGCHLD) is handling or signal.getsignal(signal.SIGCHLD) == handling
print("served")
"""
    process = program(body, place.source, place.mountpoint)
    try:
        stdout, stderr = process.communicate(timeout=50)
        assert stdout == "served\n", stderr
        assert not is_mounted(place)
    finally:
        kill_session(process.pid)


def test_serve_restores_the_state_of_the_program(place: Ground) -> None:
    """Twice in succession, and after a start that fails just before the mount."""
    body = """
import gc, logging, multiprocessing, os, resource, signal, threading
from pathlib import Path

def state():
    return {
        "threads": threading.active_count(),
        "descriptors": {one: os.readlink(one) for one in sorted(Path("/proc/self/fd").iterdir()) if one.is_symlink()},
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        "title": Path("/proc/self/cmdline").read_bytes().rstrip(bytes(1)), "comm": Path("/proc/self/comm").read_text(),
        "name": multiprocessing.current_process().name, "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "handlers": [signal.getsignal(one) for one in range(1, 32)], "mask": signal.pthread_sigmask(0, ()),
        "logging": (list(logging.getLogger().handlers), logging.getLogger().level), "directory": os.getcwd(),
        "umask": (os.umask(0o022), os.umask(0o022))[1],
    }

logging.basicConfig()
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

def serve(**options):
    thread = threading.Timer(0.2, lambda: None)
    thread.start()
    thread.join()
    child = os.fork()
    if child == 0:
        while not os.path.ismount(sys.argv[2]):
            pass
        os.statvfs(sys.argv[2])  # waits until the server answers
        os.execvp("fusermount", ["fusermount", "-u", "-z", sys.argv[2]])
    code = llloop.serve(sys.argv[1], sys.argv[2], workers=1, **options)
    os.waitpid(child, 0)
    return code

gc.disable()  # objects that only the garbage collector would close stay open
comm = state()["comm"]
assert serve() == 0
assert state()["comm"] == comm, "a program that has never set a title keeps its name"
from setproctitle import setproctitle
setproctitle("a program of its own")
before = state()
assert serve() == 0
after = state()
assert after == before, [(key, before[key], after[key]) for key in before if before[key] != after[key]]
assert before["title"] == b"a program of its own", before
from llloop.supervisor import connection
real, connection.initialise = connection.initialise, None
try:
    llloop.serve(sys.argv[1], sys.argv[2], workers=1)
except TypeError:
    pass
assert not os.path.ismount(sys.argv[2])
after = state()
assert after == before, [(key, before[key], after[key]) for key in before if before[key] != after[key]]
print("as it was")
"""
    process = program(body, place.source, place.mountpoint)
    try:
        stdout, stderr = process.communicate(timeout=50)
        assert stdout.endswith("as it was\n"), stderr
    finally:
        kill_session(process.pid)


def test_modules_in_the_working_directory_are_not_imported(place: Ground) -> None:
    """Nor modules of another directory: as root, they would be another user's code."""
    trap = place.state / "trap"
    (trap / "llloop").mkdir(parents=True)
    told = place.state / "told"
    harmful = f"open({str(told)!r}, 'a').write(__file__)\n"
    for name in ("msgpack", "llfuse", "signal", "json", "sitecustomize", "usercustomize", "llloop/__init__"):
        (trap / f"{name}.py").write_text(harmful)
    body = """
import os
os.chdir(sys.argv[3])
os.environ.update(PYTHONPATH=sys.argv[3], PYTHONSTARTUP="msgpack.py", PYTHONHOME="/nowhere", PATH=":.")
print("llloop: serving", flush=True)
with llloop.mount(sys.argv[1], sys.argv[2], workers=1) as mounted:
    print(open(sys.argv[2] + "/file").read(), flush=True)
"""
    (place.source / "file").write_text("content")
    process = program(body, place.source, place.mountpoint, trap)
    try:
        stdout, stderr = process.communicate(timeout=50)
        assert (process.returncode, stdout.splitlines()[-1:]) == (0, ["content"]), stderr
        assert not told.exists(), told.read_text()
    finally:
        kill_session(process.pid)


def test_server_uses_the_module_path_of_the_program(place: Ground) -> None:
    """Wherever the program has found them, and without what its interpreter would find by itself (python -S)."""
    (place.source / "file").write_text("content")
    body = """
import subprocess
from llloop import server_process
server_process._BOOTSTRAP = server_process._BOOTSTRAP.replace(
    "serve(channel, told)", "open(told['config']['source'] + '/path', 'w').write(repr(sys.path)); serve(channel, told)"
)
with llloop.mount(sys.argv[1], sys.argv[2], workers=1) as mounted:
    path = eval(open(sys.argv[2] + "/path").read())
assert not [one for one in path if "site-packages" in one or not one.startswith("/")], path
print("isolated")
"""
    process = program(body, place.source, place.mountpoint)
    try:
        stdout, stderr = process.communicate(timeout=50)
        assert stdout.endswith("isolated\n"), stderr
    finally:
        kill_session(process.pid)


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


def test_signal_right_after_the_first_answer_is_a_clean_stop(place: Ground) -> None:
    """The mount has served a program, but the supervisor has not read yet that the front is ready."""
    (place.source / "file").write_text("content")
    process = program(
        "import os, signal, subprocess\n"
        "from llloop.supervisor.event_loop import EventLoop\n"
        "run = EventLoop.run\n"
        "def run_late(loop):\n"
        "    subprocess.run(['cat', sys.argv[2] + '/file'], check=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    run(loop)\n"
        "EventLoop.run = run_late\n"
        "llloop.serve(sys.argv[1], sys.argv[2], workers=1)\nprint('returned')",
        place.source,
        place.mountpoint,
    )
    try:
        stdout, stderr = process.communicate(timeout=30)
        assert (process.returncode, stdout) == (0, "contentreturned\n"), stderr
        assert not is_mounted(place)
    finally:
        kill_session(process.pid)
        process.communicate()


def test_serve_raises_exceptions(place: Ground) -> None:
    with pytest.raises(errors.SourceError):
        llloop.serve(place.source / "missing", place.mountpoint)


def test_program_that_exits_in_the_block_leaves_no_mount(place: Ground) -> None:
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


def test_documented_names_exist() -> None:
    assert {"mount", "serve", "__version__"} <= set(llloop.__all__)
    for function in (llloop.mount, llloop.serve):
        assert function.__doc__ and "source" in function.__annotations__
