"""mount(8), /etc/fstab and systemd's fstab generator, on a machine with mount.llloop in /sbin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deploy.machine import Machine

HELPER = Path(sys.executable).parent / "mount.llloop"
CHECKOUT = Path(__file__).parents[2]
USER = 65534


@dataclass(frozen=True)
class Place:
    """A source with a file in it and a mount point, on the machine."""

    machine: Machine
    source: str
    mountpoint: str

    def mount(self, *arguments: str, code: int = 0) -> str:
        """Return the output of mount(8), which must end with this exit code."""
        done = self.machine.run("mount", *arguments, check=False)
        assert done.returncode == code, f"mount {' '.join(arguments)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def umount(self) -> None:
        self.machine.run("umount", self.mountpoint)
        wait_for_end(self)

    def fstab(self, kind: str, options: str) -> None:
        fields = [self.source, self.mountpoint, kind, options, "0", "0"]
        escaped = [re.sub(r"[ \t\\]", lambda found: f"\\{ord(found[0]):03o}", field) for field in fields]
        self.machine.path("/etc/fstab").write_text(" ".join(escaped) + "\n")

    def options(self) -> set[str]:
        found = self.machine.run("findmnt", "-n", "-o", "FSTYPE,SOURCE,OPTIONS", self.mountpoint, check=False).stdout
        return set(re.split(r"[ ,\n]+", found)) - {""}

    def read(self) -> str:
        return self.machine.path(f"{self.mountpoint}/file").read_text()


def servers(place: Place) -> list[str]:
    found = place.machine.run("ps", "-eo", "args=").stdout.splitlines()
    return [line for line in found if line.startswith("llloop-")]


def wait_for_end(place: Place) -> None:
    deadline = time.monotonic() + 20
    while servers(place):
        assert time.monotonic() < deadline, servers(place)
        time.sleep(0.05)


@pytest.fixture(params=["plain", "with space, comma and %"])
def place(machine: Machine, request: pytest.FixtureRequest) -> Iterator[Place]:
    for kind in ("llloop", "fuse.llloop"):
        machine.run("ln", "-sfn", HELPER, f"/usr/sbin/mount.{kind}")
    made = Place(machine, f"/srv/{request.param}/source", f"/mnt/{request.param}/mirror")
    machine.run("mkdir", "-p", made.source, made.mountpoint)
    machine.path(f"{made.source}/file").write_text("mirrored\n")
    yield made
    machine.run("umount", "--lazy", made.mountpoint, check=False)
    machine.path("/etc/fstab").write_text("")
    wait_for_end(made)


only_plain = pytest.mark.parametrize("place", ["plain"], indirect=True)


@pytest.mark.parametrize("kind", ["llloop", "fuse.llloop"])
def test_mount_and_umount(place: Place, kind: str) -> None:
    place.mount("-t", kind, "-o", "workers=3,ro,noexec", place.source, place.mountpoint)
    assert place.read() == "mirrored\n"
    assert {"ro", "noexec", "nosuid", "fuse.llloop"} <= place.options()
    assert sum(line.startswith("llloop-worker") for line in servers(place)) == 3
    with pytest.raises(OSError, match="Read-only"):
        place.machine.path(f"{place.mountpoint}/new").touch()
    place.umount()
    assert place.options() == set()


def test_fstab_entry(place: Place) -> None:
    place.fstab("llloop", "defaults,_netdev,nofail,x-systemd.automount,cache=never,workers=1,nodev")
    place.mount("-a")
    assert place.read() == "mirrored\n"
    assert "ro" not in place.options()
    place.mount("-a")  # an existing mount does not change
    assert sum(line.startswith("llloop-supervisor") for line in servers(place)) == 1
    place.umount()


@only_plain
def test_alternative_fstab(place: Place) -> None:
    table = "/run/table"
    place.machine.path(table).write_text(f"{place.source} {place.mountpoint} fuse.llloop ro,noauto 0 0\n")
    place.mount("-a", "-T", table)
    assert place.options() == set()
    place.mount("-T", table, place.mountpoint)
    assert place.read() == "mirrored\n"
    place.umount()


def test_systemd_mounts_from_fstab(place: Place) -> None:
    machine = place.machine
    place.fstab("fuse.llloop", "defaults,ro,workers=1")
    machine.run("systemctl", "daemon-reload")
    unit = machine.run("systemd-escape", "--path", "--suffix=mount", place.mountpoint).stdout.strip()
    machine.run("systemctl", "start", unit)
    assert place.read() == "mirrored\n"
    machine.run("systemctl", "stop", unit)
    wait_for_end(place)
    assert place.options() == set()


@only_plain
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("workers=0", 1, "mount option workers: 0 is not in the range"),
        ("workers", 1, "needs a value"),
        ("cache=sometimes", 1, "'sometimes' is not one of"),
        ("nonsense", 1, "mount option nonsense: there is no such option"),
    ],
)
def test_invalid_options(place: Place, options: str, code: int, message: str) -> None:
    said = place.mount("-t", "llloop", "-o", options, place.source, place.mountpoint, code=code)
    assert message in said
    assert "Traceback" not in said
    assert place.options() == set()


@only_plain
def test_suid_and_dev_can_be_allowed(place: Place) -> None:
    place.fstab("llloop", "options=suid,options=dev,workers=1")
    place.mount("-a")
    assert not {"nosuid", "nodev"} & place.options()
    place.umount()
    place.mount("-t", "llloop", "-o", 'options="suid,dev",workers=1', place.source, place.mountpoint)
    assert not {"nosuid", "nodev"} & place.options()
    place.umount()


@only_plain
@pytest.mark.parametrize("options", ["rw,read_only", "read_only", "ro", "rw,ro"])
def test_spellings_of_read_only(place: Place, options: str) -> None:
    place.mount("-t", "llloop", "-o", f"{options},workers=1", place.source, place.mountpoint)
    assert "ro" in place.options() and "rw" not in place.options()
    place.umount()


@only_plain
def test_sloppy_ignores_unknown_options(place: Place) -> None:
    place.mount("-s", "-t", "llloop", "-o", "nonsense,ro", place.source, place.mountpoint)
    assert place.read() == "mirrored\n"
    place.umount()


@only_plain
def test_failed_mount_has_exit_code_of_mount(place: Place) -> None:
    assert "there is no such directory" in place.mount("-t", "llloop", "/nowhere", place.mountpoint, code=32)
    assert "would contain itself" in place.mount("-t", "llloop", place.source, place.source, code=32)
    place.mount("-t", "llloop", place.source, place.mountpoint)
    assert "already mounted there" in place.mount("-t", "llloop", "/usr", place.mountpoint, code=32)
    assert "cannot change the options" in place.mount("-o", "remount,ro", place.mountpoint, code=1)
    place.umount()


@only_plain
def test_missing_fuse_device(place: Place) -> None:
    machine = place.machine
    machine.run("mv", "/dev/fuse", "/dev/fuse.away")
    try:
        assert "/dev/fuse is missing" in place.mount("-t", "llloop", place.source, place.mountpoint, code=2)
    finally:
        machine.run("mv", "/dev/fuse.away", "/dev/fuse")


def test_fake_and_verbose_mount_nothing(place: Place) -> None:
    said = place.mount("-f", "-v", "-t", "llloop", "-o", "workers=2,ro", place.source, place.mountpoint)
    assert "llloop serve --daemon --ro --workers=2" in said.replace("--workers=2 --ro", "--ro --workers=2")
    assert place.options() == set()
    assert servers(place) == []


@only_plain
def test_environment_of_the_caller_is_ignored(place: Place) -> None:
    machine, environment = place.machine, {"LLLOOP_SERVE_READ_ONLY": "1", "LLLOOP_SOURCE": "/nowhere"}
    machine.run("mount", "-t", "llloop", place.source, place.mountpoint, environment=environment)
    assert "ro" not in place.options()
    place.umount()


@only_plain
def test_ordinary_user_mounts_and_unmounts_by_fstab(place: Place) -> None:
    machine = place.machine
    if os.stat(CHECKOUT).st_mode & 5 != 5:
        pytest.skip("the checkout is closed to other users")
    for directory in CHECKOUT.parents:  # as the machine sees them
        machine.run("chmod", "o+x", directory)
    place.fstab("llloop", "user,noauto,workers=1")
    machine.run("chown", "-R", str(USER), place.source, place.mountpoint)
    as_user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    machine.run(*as_user, "mount", place.mountpoint)
    assert "user_id=65534" in place.options()
    assert machine.run(*as_user, "cat", f"{place.mountpoint}/file").stdout == "mirrored\n"
    assert machine.run("cat", f"{place.mountpoint}/file", check=False).returncode != 0
    machine.run(*as_user, "fusermount", "-u", place.mountpoint)
    wait_for_end(place)


def test_help_lists_the_mount_options() -> None:
    text = subprocess.run([HELPER, "--help"], capture_output=True, text=True, check=True).stdout
    for option in ("workers=N", "read_only, ro", "xattr, no_xattr", "log_file=PATH", "cache="):
        assert f"\n  {option}" in text
    assert "slots=" not in text
