"""Invalid input gives one clear line on stderr and the documented exit code; no mount and no process remain."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.mount.command_line import Ground, check_complaint, ground, in_other_mounts, llloop, wait_until
from tests.server import Server
from tests.server_processes import kill_all_at_once
from tests.watchdog import Watchdog, kill_session, mount_entry, unmount_lazily

pytestmark = [pytest.mark.mounted, pytest.mark.user]

USAGE, SOURCE, MOUNTPOINT, HOST, DEAD = 2, 3, 4, 5, 6


@pytest.fixture(autouse=True)
def not_by_the_fallback(via: str) -> None:
    if via == "llfuse":
        pytest.skip("nothing is served here: the loop does not matter")


@pytest.fixture
def place(via: str, watchdog: Watchdog) -> Iterator[Ground]:
    prepared = Server.prepare(via, watchdog)
    with ground(prepared, via) as empty:
        yield empty
        if mount_entry(str(empty.mountpoint)):
            unmount_lazily(str(empty.mountpoint))


# Options


@pytest.mark.parametrize("workers", ["0", "-1", "10000", "two", "1.5", ""])
def test_invalid_workers(place: Ground, workers: str) -> None:
    assert "workers" in place.refused(USAGE, "workers", f"--workers={workers}")


@pytest.mark.parametrize("option", ["--attr-timeout", "--entry-timeout", "--negative-timeout"])
@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "1e300", "soon"])
def test_invalid_timeouts(place: Ground, option: str, seconds: str) -> None:
    place.refused(USAGE, option, f"{option}={seconds}")


@pytest.mark.parametrize(
    "arguments", [["--bogus"], ["--cache=sometimes"], ["--log-level=shout"], ["one too many"], ["--workers"]]
)
def test_unknown_arguments(place: Ground, arguments: list[str]) -> None:
    place.refused(USAGE, arguments[0].partition("=")[0], *arguments)


def test_missing_arguments(place: Ground) -> None:
    check_complaint(llloop("serve"), USAGE, "missing argument")
    check_complaint(llloop("serve", place.source), USAGE, "missing argument")
    check_complaint(llloop("umount"), USAGE, "missing argument")
    check_complaint(llloop("surf"), USAGE, "surf")


def test_invalid_environment_variable(place: Ground) -> None:
    place.refused(USAGE, "workers", env={"LLLOOP_SERVE_WORKERS": "0"})


@pytest.mark.parametrize("option", ["nonsense", "nonsense=1"])
def test_unknown_mount_options(place: Ground, option: str) -> None:
    place.refused(USAGE, option, "-o", option)


@pytest.mark.parametrize("options", ["ro,rw", "rw,ro", "noexec,exec", "suid,nosuid"])
def test_contradicting_mount_options(place: Ground, options: str) -> None:
    place.refused(USAGE, "exclude each other", "-o", options)
    one, other = options.split(",")
    place.refused(USAGE, "exclude each other", "-o", one, "-o", other)


def test_unwritable_log_and_pid_files(place: Ground) -> None:
    for option in ("--log-file", "--pid-file"):
        place.refused(HOST, "missing/file", option, place.state / "missing" / "file")


# The source


def test_missing_source(place: Ground) -> None:
    place.source.rmdir()
    assert str(place.source) in place.refused(SOURCE, "no such|not exist")


def test_source_that_is_not_a_directory(place: Ground) -> None:
    place.source.rmdir()
    place.source.touch()
    place.refused(SOURCE, "not a directory")


def test_source_that_is_a_dangling_symlink(place: Ground) -> None:
    place.source.rmdir()
    place.source.symlink_to("nowhere")
    place.refused(SOURCE, "no such|not exist")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything; the ordinary user's run shows it")
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_unreadable_source(place: Ground, mode: int) -> None:
    place.source.chmod(mode)
    try:
        place.refused(SOURCE, "permission")
    finally:
        place.source.chmod(0o755)


# The mount point


def test_missing_mount_point(place: Ground) -> None:
    place.mountpoint.rmdir()
    assert str(place.mountpoint) in place.refused(MOUNTPOINT, "no such|not exist")


def test_mount_point_that_is_not_a_directory(place: Ground) -> None:
    place.mountpoint.rmdir()
    place.mountpoint.touch()
    place.refused(MOUNTPOINT, "not a directory")


def test_non_empty_mount_point(place: Ground) -> None:
    (place.mountpoint / ".hidden").touch()
    assert "--nonempty" in place.refused(MOUNTPOINT, "not empty")
    assert os.listdir(place.mountpoint) == [".hidden"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may mount anywhere; the ordinary user's run shows it")
def test_mount_point_of_another_user(place: Ground) -> None:
    elsewhere = Ground(place.source, Path("/srv"), place.state, place.loop)
    if os.listdir(elsewhere.mountpoint) or os.access(elsewhere.mountpoint, os.W_OK):
        pytest.skip("/srv is not empty")
    elsewhere.refused(MOUNTPOINT, "permission|write|owner")


def test_mount_point_with_an_llloop_mount(serve: Serve) -> None:
    server = serve()
    again = llloop("serve", server.source, server.mountpoint)
    check_complaint(again, MOUNTPOINT, "already")
    # Not even with nonempty: the second mount would cover the first.
    check_complaint(llloop("serve", server.source, server.mountpoint, "--nonempty"), MOUNTPOINT, "already")
    assert server.alive()


@pytest.mark.root
def test_mount_point_with_another_file_system(place: Ground) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "llloop-test", place.mountpoint], check=True)
    try:
        check_complaint(place.serve(), MOUNTPOINT, "already")
    finally:
        subprocess.run(["umount", place.mountpoint], check=True)
    assert mount_entry(str(place.mountpoint)) is None


# A dead mount


@pytest.fixture
def dead(serve: Serve) -> Iterator[Server]:
    server = serve()
    kill_all_at_once(server)
    wait_until(lambda: not server.processes(), "the server's processes are gone")

    def is_dead() -> bool:
        """A process is shown as dead while threads of it still are dying, and what they had in hand fails otherwise."""
        try:
            os.listdir(server.mountpoint)
        except OSError as error:
            return error.errno == errno.ENOTCONN
        return False

    wait_until(is_dead, "the mount is dead")
    yield server
    server.clean_up()


def test_dead_mount_is_reported_with_a_remedy(dead: Server) -> None:
    complaint = check_complaint(llloop("serve", dead.source, dead.mountpoint), DEAD, "dead")
    assert "--replace-dead" in complaint or "umount" in complaint
    assert dead.mounted(), "nothing is unmounted unasked"


def test_replace_dead_replaces_a_dead_mount(dead: Server, serve: Serve) -> None:
    (dead.source / "file").write_text("content")
    process = subprocess.Popen(
        [sys.executable, "-m", "llloop", "serve", dead.source, dead.mountpoint, "--replace-dead"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout
        assert process.stdout.readline().startswith("llloop: serving ")
        assert (dead.mountpoint / "file").read_text() == "content"
        process.terminate()
        assert process.wait(30) == 0
    finally:
        kill_session(process.pid)
        process.communicate()
    assert not dead.mounted()


def test_dead_mount_as_source(dead: Server, place: Ground) -> None:
    ended = llloop("serve", dead.mountpoint, place.mountpoint)
    place.check_refused(ended, SOURCE, "not connected|dead")


# One inside the other


def elsewhere(place: Ground, source: Path, mountpoint: Path) -> Ground:
    return Ground(source, mountpoint, place.state, place.loop)


def test_source_and_mount_point_are_the_same(place: Ground) -> None:
    elsewhere(place, place.source, place.source).refused(MOUNTPOINT, "same|itself|inside")


def test_source_and_mount_point_are_the_same_by_symlink(place: Ground) -> None:
    (place.state / "link").symlink_to(place.source)
    elsewhere(place, place.source, place.state / "link").refused(MOUNTPOINT, "same|itself|inside")
    elsewhere(place, place.state / "link", place.source).refused(MOUNTPOINT, "same|itself|inside")


def test_mount_point_inside_the_source(place: Ground) -> None:
    inside = place.source / "a" / "b"
    inside.mkdir(parents=True)
    elsewhere(place, place.source, inside).refused(MOUNTPOINT, "inside")
    (place.state / "link").symlink_to(place.source / "a")
    elsewhere(place, place.source, place.state / "link" / "b").refused(MOUNTPOINT, "inside")
    elsewhere(place, Path("/"), place.mountpoint).refused(MOUNTPOINT, "inside")


def test_source_inside_the_mount_point(place: Ground) -> None:
    inside = place.mountpoint / "a"
    inside.mkdir()
    elsewhere(place, inside, place.mountpoint).refused(MOUNTPOINT, "inside|not empty")
    elsewhere(place, inside, place.mountpoint).refused(MOUNTPOINT, "inside", "--nonempty")


def test_common_prefix_of_names_is_not_nesting(place: Ground, serve: Serve) -> None:
    longer = place.source.parent / f"{place.source.name}-longer"
    longer.mkdir()
    server = serve(source=longer)
    assert server.alive()


@pytest.mark.root
def test_mount_point_inside_the_source_by_a_bind_mount(place: Ground) -> None:
    """The paths do not show it, because a bind mount makes the same directory visible at two paths."""
    (place.source / "inner").mkdir()
    seen = place.state / "seen"
    seen.mkdir()
    subprocess.run(["mount", "--bind", place.source, seen], check=True)
    try:
        elsewhere(place, place.source, seen / "inner").refused(MOUNTPOINT, "inside")
        check_complaint(elsewhere(place, place.source, seen).serve(), MOUNTPOINT, "same|itself|inside|already")
    finally:
        subprocess.run(["umount", seen], check=True)


# The machine


# A user who cannot read this Python could not even start the program.
NOBODY = 65534
OPEN_FUSE = """
mount -t tmpfs -o mode=755 llloop-test /mnt
mknod -m 666 /mnt/fuse c 10 229
mount --bind /mnt/fuse /dev/fuse
"""
NO_FUSE_CONF = """
: >/mnt/fuse.conf
mount --bind /mnt/fuse.conf /etc/fuse.conf
"""
NO_FUSERMOUNT = """
for program in fusermount fusermount3; do
    path=$(command -v $program) && mount --bind /dev/null "$(readlink -f "$path")" || true
done
"""


@pytest.fixture
def reachable() -> None:
    probe = [
        "setpriv",
        f"--reuid={NOBODY}",
        f"--regid={NOBODY}",
        "--clear-groups",
        sys.executable,
        "-c",
        "import llloop",
    ]
    if os.geteuid() == 0 and subprocess.run(probe, cwd="/", capture_output=True).returncode != 0:
        pytest.skip("other users cannot reach this Python or checkout")


@pytest.mark.root
def test_missing_fuse_device(place: Ground) -> None:
    hidden = """
mount -t tmpfs -o mode=755 llloop-test /mnt
for device in null zero random urandom; do cp -a /dev/$device /mnt/; done
mkdir /mnt/shm
mount --bind /dev/shm /mnt/shm
mount --move /mnt /dev
"""
    place.refused(HOST, "/dev/fuse", prefix=in_other_mounts(hidden))


@pytest.mark.root
def test_forbidden_fuse_device(place: Ground, reachable: None) -> None:
    closed = OPEN_FUSE + "chmod 600 /mnt/fuse\n"
    os.chown(place.mountpoint, NOBODY, NOBODY)
    complaint = place.refused(HOST, "/dev/fuse", prefix=in_other_mounts(closed, NOBODY))
    assert "ermission" in complaint


@pytest.mark.root
def test_missing_fusermount(place: Ground, reachable: None) -> None:
    os.chown(place.mountpoint, NOBODY, NOBODY)
    place.refused(HOST, "fusermount", prefix=in_other_mounts(OPEN_FUSE + NO_FUSERMOUNT, NOBODY))


@pytest.mark.root
def test_allow_other_without_user_allow_other(place: Ground, reachable: None) -> None:
    os.chown(place.mountpoint, NOBODY, NOBODY)
    prefix = in_other_mounts(OPEN_FUSE + NO_FUSE_CONF, NOBODY)
    assert "/etc/fuse.conf" in place.refused(HOST, "user_allow_other", "--allow-other", prefix=prefix)


@pytest.mark.root
def test_ordinary_user_can_serve_in_the_test_namespace(place: Ground, reachable: None) -> None:
    """So the tests above fail for the reason that they name."""
    os.chown(place.mountpoint, NOBODY, NOBODY)
    (place.source / "file").write_text("content")
    command = [*in_other_mounts(OPEN_FUSE + NO_FUSE_CONF, NOBODY), sys.executable, "-m", "llloop", "serve"]
    process = subprocess.Popen(
        [*command, *place.loop, place.source, place.mountpoint],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith("llloop: serving "), line + process.stdout.read()
        process.terminate()
        assert process.wait(30) == 0
    finally:
        kill_session(process.pid)
        process.communicate()
