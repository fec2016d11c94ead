"""The systemd unit: systemd accepts it, and nothing in it hides the mount."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.mount.command_line import environment, llloop
from tests.watchdog import kill_session

CHECKOUT = Path(__file__).parents[2]
UNIT = CHECKOUT / "scripts" / "systemd" / "llloop@.service"
# systemd.exec(5): each of these runs the service in a mount namespace of its own.
NAMESPACING = re.compile(
    r"Private(Tmp|Devices|Mounts|Users|IPC)|Protect(System|Home|Proc|Clock|Kernel\w+|ControlGroups|Hostname)"
    r"|ProcSubset|(ReadWrite|ReadOnly|Inaccessible|Exec|NoExec)Paths|Bind(ReadOnly)?Paths|TemporaryFileSystem|MountFlags"
    r"|Root(Directory|Image|Hash|Verity)|DynamicUser|LogNamespace|(Mount|Extension)(Images|Directories)|MountAPIVFS"
    r"|(Network|IPC)NamespacePath|PrivateNetwork"
)


def directives(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line and line[0] not in "#["]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


def values(text: str, wanted: str) -> list[str]:
    return [value for name, value in directives(text) if name == wanted]


@pytest.fixture
def analyze(tmp_path: Path) -> str:
    command = shutil.which("systemd-analyze")
    assert command, "systemd-analyze is missing; scripts/setup --test installs it"
    return command


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit that `llloop systemd-unit` prints, in a file with its name."""
    command = Path(sys.executable).parent / "llloop"
    text = subprocess.run([command, "systemd-unit"], check=True, capture_output=True, text=True, env=environment())
    place = tmp_path / UNIT.name
    place.write_text(text.stdout)
    return place


def test_unit_runs_the_command_that_printed_it(installed: Path) -> None:
    command = str(Path(sys.executable).parent / "llloop")
    text = installed.read_text()
    assert values(text, "ExecStart") == [f"{command} serve --replace-dead"]
    assert values(text, "ExecStopPost") == [f"{command} umount --lazy --if-dead"]
    assert text.replace(command, "/usr/local/bin/llloop") == UNIT.read_text()


def test_systemd_accepts_the_unit(analyze: str, installed: Path) -> None:
    # --man=no: systemd looks for the manual page on this machine, not in the virtual environment.
    command = [analyze, "--man=no", "verify", f"{installed.parent}/llloop@photos.service"]
    done = subprocess.run(command, capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "llloop" in line]
    assert (done.returncode, complaints) == (0, [])


def test_systemd_reports_an_invalid_unit(analyze: str, installed: Path) -> None:
    """The test above relies on this."""
    installed.write_text(installed.read_text().replace("KillMode=mixed", "KillMode=gently"))
    command = [analyze, "--man=no", "verify", f"{installed.parent}/llloop@photos.service"]
    assert "gently" in subprocess.run(command, capture_output=True, text=True).stderr


def test_systemd_accepts_the_drop_in(analyze: str, installed: Path, tmp_path: Path) -> None:
    source, mountpoint = """/srv/a b/50%/it's "so" \\n""", "/mnt/here/there"
    drop_in = llloop("systemd-unit", source, mountpoint).stdout
    directory = tmp_path / "llloop@photos.service.d"
    directory.mkdir()
    (directory / "mounts.conf").write_text(drop_in)
    command = [analyze, "--man=no", "verify", f"{installed.parent}/llloop@photos.service"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "SYSTEMD_LOG_LEVEL": "debug"})
    assert done.returncode == 0, done.stderr
    assert not re.search(r"mounts\.conf:\d+:", done.stderr), done.stderr
    # A shell interprets the quotes as systemd does. Only systemd interprets the percent sign.
    found = [shlex.split(value) for value in values(drop_in, "RequiresMountsFor")]
    assert found == [[source.replace("%", "%%")], ["/mnt/here"]]


def test_single_path_is_refused() -> None:
    ended = llloop("systemd-unit", "/srv")
    assert ended.code == 2
    assert "SOURCE and MOUNTPOINT" in ended.complaint()


def test_nothing_in_the_unit_hides_the_mount() -> None:
    names = [name for name, _ in directives(UNIT.read_text())]
    assert "NoNewPrivileges" in names
    assert [name for name in names if NAMESPACING.fullmatch(name)] == []


def test_exposure_level(analyze: str, installed: Path) -> None:
    """Without hardening the level is 9.6. Root's capabilities to mount and to switch users remain."""
    command = [analyze, "security", "--offline=yes", "--no-pager", "--threshold=52", str(installed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


# Features of the command that the unit needs


@pytest.mark.mounted
def test_source_and_mountpoint_come_from_the_environment(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    server.stop()
    place = {"LLLOOP_SOURCE": str(server.source), "LLLOOP_MOUNTPOINT": str(server.mountpoint)}
    pid_file = tmp_path / "pid"
    try:
        assert llloop_daemon("serve", "--daemon", "--pid-file", str(pid_file), env=place) == 0
        (server.source / "file").write_text("through the environment")
        assert (server.mountpoint / "file").read_text() == "through the environment"
        assert llloop("umount", env=place).code == 0
        assert not server.mounted()
    finally:
        if server.mounted():
            kill_session(int(pid_file.read_text()))


def llloop_daemon(*arguments: str, env: dict[str, str]) -> int:
    """Return the exit code of a command that leaves processes running."""
    command = [sys.executable, "-m", "llloop", *arguments]
    return subprocess.run(command, env=environment(env), cwd="/", timeout=30, check=False).returncode


def test_environment_must_contain_both_paths(tmp_path: Path) -> None:
    ended = llloop("serve", env={"LLLOOP_SOURCE": str(tmp_path)})
    assert ended.code == 2
    assert "MOUNTPOINT" in ended.complaint()


@pytest.mark.mounted
def test_umount_if_dead_removes_a_dead_mount(serve: Serve) -> None:
    # With --cache always, the kernel still returns the attributes of a dead mount's root.
    server = serve("--cache", "always")
    os.stat(server.mountpoint)
    kill_session(server.pid)
    assert server.process
    server.process.wait(30)
    assert server.mounted()
    assert llloop("umount", "--lazy", "--if-dead", server.mountpoint).code == 0
    assert not server.mounted()
    server.clean_up()


@pytest.mark.mounted
def test_umount_if_dead_leaves_a_living_mount(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    for place in (server.mountpoint, tmp_path, Path("/proc"), tmp_path / "missing"):
        ended = llloop("umount", "--lazy", "--if-dead", place)
        assert (ended.code, ended.stdout, ended.stderr) == (0, "", "")
    assert server.alive()


@pytest.mark.mounted
def test_replace_dead_with_cached_attributes(serve: Serve) -> None:
    server = serve("--cache", "always")
    os.stat(server.mountpoint)
    kill_session(server.pid)
    assert server.process
    server.process.wait(30)
    place = {"LLLOOP_SOURCE": str(server.source), "LLLOOP_MOUNTPOINT": str(server.mountpoint)}
    try:
        assert llloop_daemon("serve", "--replace-dead", "--daemon", env=place) == 0
        assert os.listdir(server.mountpoint) == os.listdir(server.source)
        assert llloop("umount", server.mountpoint).code == 0
    finally:
        server.clean_up()
