"""Start and end of a server in unusual environments."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.mount.command_line import Ground, check_complaint, environment, ground, in_other_mounts, llloop, wait_until
from tests.server import Server
from tests.server_processes import kill_all_at_once, stop_process
from tests.watchdog import Watchdog, kill_session, mount_entry, unmount_lazily

pytestmark = [pytest.mark.mounted]

USAGE, SOURCE, MOUNTPOINT, HOST = 2, 3, 4, 5


@pytest.fixture
def place(via: str, watchdog: Watchdog) -> Iterator[Ground]:
    if via == "llfuse":
        pytest.skip("the same again")
    with ground(Server.prepare(via, watchdog), via) as prepared:
        try:
            yield prepared
        finally:
            with suppress(OSError, ValueError):
                os.kill(int((prepared.state / "pid").read_text()), signal.SIGTERM)
                wait_until(lambda: mount_entry(str(prepared.mountpoint)) is None, "unmounted")
            unmount_lazily(str(prepared.mountpoint))


def in_background(place: Ground, *prefix: str) -> subprocess.CompletedProcess[str]:
    pid_file = str(place.state / "pid")
    command = [sys.executable, "-m", "llloop", "serve", "--daemon", "--workers=1", "--pid-file", pid_file]
    return subprocess.run(
        [*prefix, *command, place.source, place.mountpoint],
        env=environment(),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_descriptors(place: Ground, closed: str) -> None:
    (place.source / "file").write_text("content")
    done = in_background(place, "sh", "-c", f'"$@" {closed}', "sh")
    assert done.returncode == 0, done.stderr
    assert (place.mountpoint / "file").read_text() == "content"


def test_exit_codes_without_standard_descriptors(place: Ground) -> None:
    place.source.rmdir()
    assert in_background(place, "sh", "-c", '"$@" <&- >&- 2>&-', "sh").returncode == SOURCE


@pytest.mark.root
def test_dev_shm_is_not_needed(place: Ground) -> None:
    hidden = in_other_mounts("mount --bind /mnt /dev/shm && mount -o remount,bind,ro /dev/shm")
    source = place.state / "source"
    source.mkdir()
    ended = llloop("serve", "--check", source, place.mountpoint, prefix=hidden)
    assert ended.code == 0, ended.stderr
    script = (
        f"{sys.executable} -m llloop serve --daemon --workers=1 {source} {place.mountpoint}; "
        f"echo content > {place.mountpoint}/file; {sys.executable} -m llloop umount {place.mountpoint}"
    )
    shell = ["sh", "-ec", script]
    done = subprocess.run([*hidden, *shell], env=environment(), cwd="/", capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert (source / "file").read_text() == "content\n"


def test_removed_working_directory(place: Ground) -> None:
    gone = place.state / "gone"
    for arguments, code in (
        (("serve", "src", "mnt"), SOURCE),
        (("serve", place.source, "mnt"), MOUNTPOINT),
        (("serve", place.source, place.mountpoint, "--pid-file=pid"), HOST),
        (("serve", place.source, place.mountpoint, "--log-file=log"), HOST),
        (("umount", "mnt"), MOUNTPOINT),
        (("status", "mnt"), MOUNTPOINT),
    ):
        gone.mkdir()
        prefix = ["sh", "-c", f'cd {gone} && rmdir {gone} && exec "$@"', "sh"]
        place.check_refused(llloop(*arguments, prefix=prefix), code, "")


@pytest.mark.parametrize("limit", [64, 120])
def test_too_few_open_files(place: Ground, limit: int) -> None:
    prefix = ["prlimit", f"--nofile={limit}", "setpriv", "--bounding-set=-sys_resource"]
    complaint = place.refused(HOST, rf"workers need \d+ open files.*may have {limit}", "--workers=8", prefix=prefix)
    assert "ulimit -n" in complaint


def test_thread_limit_reached(place: Ground) -> None:
    if resource.getrlimit(resource.RLIMIT_STACK)[1] != resource.RLIM_INFINITY:
        pytest.skip("the stack's hard limit is too low")
    # 8 TB for each worker, which is more than the limited address space.
    prefix = ["sh", "-c", 'ulimit -s 8000000000 && ulimit -v 100000000 && exec "$@"', "sh"]
    place.refused(HOST, "can't start new thread|serving failed", prefix=prefix)


@pytest.mark.root
@pytest.mark.parametrize("workers", [1, 16])
def test_documented_open_file_limit_suffices(place: Ground, workers: int) -> None:
    from llloop.linux.limits import needed_descriptors

    command = [sys.executable, "-m", "llloop", "serve", f"--workers={workers}"]
    needed = needed_descriptors(workers)
    prefix = ["prlimit", f"--nofile={needed}", "setpriv", "--bounding-set=-sys_resource"]
    arguments = [*prefix, *command, str(place.source), str(place.mountpoint)]
    process = subprocess.Popen(arguments, cwd="/", env=environment(), start_new_session=True)
    files = []
    try:
        wait_until(lambda: mount_entry(str(place.mountpoint)) is not None, "mounted")
        for number in range(40):
            files.append(open(place.mountpoint / f"file-{number}", "wb"))  # noqa: SIM115
            files[-1].write(b"content")
            files[-1].flush()
    finally:
        for file in files:
            file.close()
        process.terminate()
        assert process.wait(30) == 0
        kill_session(process.pid)


# A source that is not as it should be


def test_dead_mount_as_source(place: Ground, serve: Serve) -> None:
    lower = serve("--workers=1")
    os.listdir(lower.mountpoint)
    kill_all_at_once(lower)
    try:
        begun = time.monotonic()
        ended = llloop("serve", lower.mountpoint, place.mountpoint)
        place.check_refused(ended, SOURCE, "not connected|abort")
        assert time.monotonic() - begun < 20
    finally:
        unmount_lazily(str(lower.mountpoint))
        lower.process = None


# One mount after the other


def test_ending_server_does_not_unmount_its_successor(place: Ground) -> None:
    """It ends slowly, and the kernel has given its device number and mount ID to the next mount meanwhile."""
    assert in_background(place).returncode == 0
    old = int((place.state / "pid").read_text())
    stop_process(old)
    try:
        assert llloop("umount", place.mountpoint).code == 0
        assert in_background(place).returncode == 0
        new = int((place.state / "pid").read_text())
        assert new != old
    finally:
        os.kill(old, signal.SIGTERM)
        os.kill(old, signal.SIGCONT)
    wait_until(lambda: not Path(f"/proc/{old}").exists(), "the old server has ended")
    (place.mountpoint / "file").write_text("content")
    assert (place.source / "file").read_text() == "content"
    assert int((place.state / "pid").read_text()) == new


LOOKER = """
import os, sys
print(flush=True)
while True:
    try:
        os.statvfs(sys.argv[1])
    except OSError:
        pass
"""


@pytest.mark.parametrize("how", ["umount", "SIGTERM"])
def test_statfs_in_a_loop_does_not_prevent_unmount(place: Ground, how: str) -> None:
    """Monitoring programs do this; each call makes the mount busy for some microseconds."""
    assert in_background(place).returncode == 0
    pid = int((place.state / "pid").read_text())
    looker = subprocess.Popen([sys.executable, "-c", LOOKER, place.mountpoint], stdout=subprocess.PIPE)
    try:
        assert looker.stdout and looker.stdout.readline()
        if how == "umount":
            assert llloop("umount", place.mountpoint).code == 0
        else:
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the server has ended")
        assert mount_entry(str(place.mountpoint)) is None
    finally:
        looker.kill()
        looker.communicate()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_unmount_after_rename_of_a_parent_directory(place: Ground, end: signal.Signals) -> None:
    above = place.state / "above"
    mountpoint = above / "mnt"
    mountpoint.mkdir(parents=True)
    pid_file = place.state / "pid"
    assert llloop("serve", "--daemon", "--workers=1", "--pid-file", pid_file, place.source, mountpoint).code == 0
    pid = int((place.state / "pid").read_text())
    moved = above.rename(place.state / "renamed") / "mnt"
    try:
        (moved / "file").write_text("it still serves")
        assert "serving" in llloop("status", moved).stdout, "the server answers by the new name, too"
        os.kill(pid, end)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the server has ended")
        wait_until(lambda: mount_entry(str(moved)) is None, "unmounted")
        assert os.listdir(moved) == []
    finally:
        unmount_lazily(str(moved))


# Signals that the starting process ignores

IGNORING = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"


def test_ignored_sigchld(place: Ground) -> None:
    prefix = [sys.executable, "-c", IGNORING]
    assert llloop("serve", "--check", place.source, place.mountpoint, prefix=prefix).code == 0
    done = in_background(place, *prefix)
    assert done.returncode == 0, done.stderr
    os.kill(int((place.state / "pid").read_text()), signal.SIGTERM)
    wait_until(lambda: mount_entry(str(place.mountpoint)) is None, "unmounted")
    place.source.rmdir()
    place.check_refused(llloop("serve", place.source, place.mountpoint, prefix=prefix), SOURCE, "no such")


# serve --check


def test_check_refuses_what_serve_refuses(place: Ground) -> None:
    log, pid_file = place.state / "a log", place.state / "a pid file"
    files = ("--log-file", log, "--pid-file", pid_file)
    ended = place.serve("--check", *files)
    assert (ended.code, ended.stderr) == (0, "")
    assert str(place.source) in ended.stdout and mount_entry(str(place.mountpoint)) is None
    assert not log.exists() and not pid_file.exists()
    place.refused(USAGE, "workers", "--check", "--workers=500")
    place.refused(USAGE, "exclude each other", "--check", "-o", "ro,rw")
    place.refused(HOST, "missing", "--check", "--log-file", place.state / "missing" / "file")
    place.refused(HOST, "missing", "--check", "--pid-file", place.state / "missing" / "file")
    for refused in (("-o", f"max_read={2**32}"), ("-o", "max_read=4096,max_read=8192"), ("--fsname", 4095 * "n")):
        assert place.refused(USAGE, "", *refused) == place.refused(USAGE, "", "--check", *refused)
    (place.mountpoint / "file").touch()
    place.refused(MOUNTPOINT, "not empty", "--check")
    (place.mountpoint / "file").unlink()
    place.source.rmdir()
    place.refused(SOURCE, "no such", "--check")


@pytest.mark.parametrize("option", ["--log-file", "--pid-file"])
def test_check_follows_symlinks(place: Ground, option: str) -> None:
    link, unwritable = place.state / "link", place.state / "unwritable"
    unwritable.mkdir(mode=0o555)
    prefix = in_other_mounts(f"mount -t tmpfs -o ro none '{unwritable}'")
    how = {"prefix": prefix} if os.geteuid() == 0 else {}  # the mode of a directory does not restrict root
    for target in ("missing/file", unwritable / "file"):
        link.symlink_to(target)
        refused = place.refused(HOST, "link: ", "--check", option, link, **how)
        assert refused == place.refused(HOST, "link: ", option, link, **how)
        link.unlink()


def test_check_restart(place: Ground) -> None:
    assert in_background(place).returncode == 0
    check_complaint(place.serve("--check"), MOUNTPOINT, "already mounted there")
    assert place.serve("--check-restart").code == 0
    check_complaint(place.serve("--check-restart", "--workers=500"), USAGE, "workers")
    (place.mountpoint / "file").write_text("it still serves")
