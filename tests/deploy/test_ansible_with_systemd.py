"""The role on a host with systemd, which is a machine of the test."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.machine import Machine
from tests.deploy.playbook import (
    PLAY_SECONDS,
    Controller,
    Mount,
    make_wheels,
)
from tests.server_processes import wait_until

# A play takes some 50 processes, most of them Pythons that start.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llloop's wheel, with those of its dependencies beside it."""
    return make_wheels(tmp_path_factory.mktemp("wheels"))


AWKWARD = """awk ward's 50% "x" `y` \\ z"""


@pytest.mark.root
def test_host_with_systemd(machine: Machine, wheel: Path) -> None:
    scratch = "/var/tmp/llloop-ansible"
    wheels = machine.path(scratch) / "wheels"
    wheels.mkdir(parents=True)
    for file in wheel.parent.iterdir():
        (wheels / file.name).write_bytes(file.read_bytes())
    controller = Controller(
        scratch,
        machine.path(scratch),
        lambda command, environment: (
            machine.run(*command, check=False, timeout=PLAY_SECONDS, environment=environment).stdout
        ),
        {
            "llloop_install_from": "wheel",
            "llloop_wheel": f"{scratch}/wheels/{wheel.name}",
            "llloop_pip_extra_args": f"--no-index --find-links {scratch}/wheels",
        },
    )
    for name in ("listed", AWKWARD):
        machine.path(f"/srv/{name}").mkdir()
        machine.path(f"/srv/{name}/file").write_text(f"{name}\n")
    machine.run("chown", "-R", "games:games", f"/srv/{AWKWARD}")
    listed: Mount = {"name": "listed", "source": "/srv/listed", "mountpoint": "/mnt/deploy/listed", "workers": 1}
    awkward: Mount = {
        "name": "awkward",
        "source": f"/srv/{AWKWARD}",
        "mountpoint": f"/mnt/deploy/{AWKWARD}",
        "fsname": """$HOME's "files" """,
        "user": "games",
        "allow_other": True,
    }
    mounts = [listed, awkward]
    defaults: dict[str, Any] = {"llloop_mount_defaults": {"workers": 2, "options": ["noexec"]}}

    def read(name: str) -> str:
        return machine.run("cat", f"/mnt/deploy/{name}/file").stdout

    def servers() -> tuple[int, int]:
        units = ("llloop@listed", "llloop@awkward")
        listed, awkward = machine.run("systemctl", "show", "--value", "--property=MainPID", *units).stdout.split()
        return int(listed), int(awkward)

    # A fresh host in check mode: all that would be is shown, nothing is done.
    outcome = controller.play(mounts, "--check", "--diff", **defaults)
    assert "+WatchdogSec=" in outcome.text
    assert '+LLLOOP_SOURCE="/srv/listed"\n' in outcome.text
    assert "llloop@listed.service would be enabled and started" in outcome.text
    for path in ("/etc/llloop", "/opt/llloop", "/var/lib/llloop", "/mnt/deploy", "/etc/systemd/system/llloop@.service"):
        assert not machine.path(path).exists()

    controller.play(mounts, **defaults)
    assert (read("listed"), read(AWKWARD)) == ("listed\n", f"{AWKWARD}\n")
    table = machine.run("findmnt", "--raw", "--noheadings", "--types=fuse.llloop", "--output=TARGET,OPTIONS").stdout
    assert table.count("noexec") == 2
    named = machine.run("findmnt", "--noheadings", "--output=SOURCE", f"/mnt/deploy/{AWKWARD}").stdout
    assert named == """$HOME's "files" \n"""
    assert machine.run("systemctl", "is-enabled", "llloop@listed", "llloop@awkward").stdout == "enabled\n" * 2
    printed = machine.run("/opt/llloop/bin/llloop", "systemd-unit").stdout
    assert machine.path("/etc/systemd/system/llloop@.service").read_text() == printed
    # An ordinary user's mount: what root makes there is the user's.
    machine.run("touch", f"/mnt/deploy/{AWKWARD}/made")
    assert machine.run("stat", "--format=%U", f"/srv/{AWKWARD}/made").stdout == "games\n"
    assert "\nuser_allow_other\n" in machine.path("/etc/fuse.conf").read_text()
    first = servers()
    workers = workers_of_service(machine, first[1])
    assert len(workers) == 2

    assert controller.play(mounts, "--diff", **defaults).changed == 0
    assert servers() == first
    assert workers_of_service(machine, first[1]) == workers

    # One option of one mount; and a wheel of the same version with other bytes, an upgrade, for which no mount is to
    # be unmounted.
    listed["workers"] = 3
    with zipfile.ZipFile(wheels / wheel.name, "a") as archive:
        archive.comment = b"built again"
    controller.play(mounts, llloop_on_upgrade="reload", **defaults)
    assert servers()[0] not in (0, first[0])
    assert servers()[1] == first[1]
    assert wait_until(lambda: not workers & workers_of_service(machine, first[1]))
    assert (read("listed"), read(AWKWARD)) == ("listed\n", f"{AWKWARD}\n")

    # A mount that cannot be: the run says why, in the server's own words, and configures nothing.
    hidden = {**listed, "name": "hidden", "mountpoint": "/etc/systemd"}
    outcome = controller.play([hidden], "--tags=configure,run", fails=True)
    assert "llloop: mount point /etc/systemd" in outcome.text
    assert not machine.path("/etc/llloop/hidden.env").exists()

    # Gone are all that are to be absent, and nothing of them is left. The other is older than what is installed, which
    # is seen although this run installs nothing.
    machine.run("touch", "--date=1 minute", "/opt/llloop/installed-by-ansible")
    absent = [{"name": name, "state": "absent"} for name in ("listed", "hidden")]
    controller.play([awkward, *absent], "--tags=run", **defaults)
    assert servers()[0] == 0
    assert servers()[1] not in (0, first[1])
    assert read(AWKWARD) == f"{AWKWARD}\n"
    assert machine.run("findmnt", "--noheadings", "--types", "fuse.llloop").stdout.count("\n") == 1
    units = machine.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "llloop@*").stdout
    assert [line.split()[0] for line in units.splitlines()] == ["llloop@awkward.service"]
    assert os.listdir(machine.path("/etc/llloop")) == ["awkward.env"]
    assert os.listdir(machine.path("/mnt/deploy")) == [AWKWARD]
    kept = {path.name for path in machine.path("/etc/systemd/system").rglob("llloop@*")}
    assert kept == {"llloop@.service", "llloop@awkward.service", "llloop@awkward.service.d"}
    assert machine.path("/srv/listed/file").read_text() == "listed\n"


def workers_of_service(machine: Machine, server: int) -> set[str]:
    return set(machine.run("pgrep", "--parent", str(server), "--full", "^llloop-worker").stdout.split())
