"""The systemd unit on a booted machine: all processes see the mount, and no dead mount remains."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.deploy.machine import Machine

LLLOOP = Path(sys.executable).parent / "llloop"
SECONDS = 20.0
# capabilities(7): the bounding set of the unit.
BOUND = (
    "chown dac_override dac_read_search fowner fsetid linux_immutable setgid setuid setpcap sys_admin sys_resource "
    "mknod setfcap"
)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {SECONDS} s"
        time.sleep(0.05)


@dataclass
class Service:
    """One instance of llloop@.service."""

    machine: Machine
    name: str
    source: str
    mountpoint: str
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        return f"llloop@{self.name}.service"

    def configure(self, **settings: str) -> None:
        """Writes the environment file; quotes each value according to systemd.exec(5)."""
        self.settings |= {"LLLOOP_SOURCE": self.source, "LLLOOP_MOUNTPOINT": self.mountpoint, **settings}
        quoted = {name: re.sub(r'(["\\$`])', r"\\\1", value) for name, value in self.settings.items()}
        text = "".join(f'{name}="{value}"\n' for name, value in quoted.items())
        self.machine.path(f"/etc/llloop/{self.name}.env").write_text(text)

    def systemctl(self, verb: str, *arguments: str) -> None:
        done = self.machine.run("systemctl", verb, *arguments, self.unit, check=False)
        assert done.returncode == 0, f"systemctl {verb}: {done.stdout}{self.journal()}"

    def journal(self) -> str:
        return self.machine.run("journalctl", "--no-pager", "--output=cat", "--unit", self.unit).stdout

    def show(self, name: str) -> str:
        return self.machine.run("systemctl", "show", "--value", "--property", name, self.unit).stdout.strip()

    @property
    def pid(self) -> int:
        return int(self.show("MainPID"))

    def mounted(self) -> bool:
        return self.machine.run("findmnt", "-n", self.mountpoint, check=False).stdout != ""

    def read(self, name: str) -> str:
        return self.machine.path(f"{self.mountpoint}/{name}").read_text()

    def processes(self) -> list[str]:
        group = f"/sys/fs/cgroup/system.slice/system-llloop.slice/{self.unit}/cgroup.procs"
        # Read it in the machine, because a process has another id outside.
        done = self.machine.run("cat", group, check=False)
        return done.stdout.split() if done.returncode == 0 else []


@pytest.fixture
def service(machine: Machine, request: pytest.FixtureRequest) -> Iterator[Service]:
    name = re.sub(r"\W", "-", request.node.name)
    made = Service(machine, name, f"/srv/{name}/the source", f'/mnt/{name}/50% of it\'s "mirrors"')
    machine.run("mkdir", "-p", made.source, made.mountpoint, "/etc/llloop")
    machine.path(f"{made.source}/file").write_text("mirrored\n")
    unit = machine.run(LLLOOP, "systemd-unit").stdout
    machine.path("/etc/systemd/system/llloop@.service").write_text(unit)
    made.configure()
    machine.run("systemctl", "daemon-reload")
    yield made
    machine.run("systemctl", "stop", made.unit, check=False)
    machine.run("systemctl", "reset-failed", made.unit, check=False)


def test_service_is_active_when_the_mount_is_visible(service: Service) -> None:
    service.systemctl("start")
    assert service.read("file") == "mirrored\n"
    assert service.show("ActiveState") == "active"
    machine, pid = service.machine, service.pid
    for process in service.processes():
        assert namespace(machine, process) == namespace(machine, "1")
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    assert machine.run(*as_nobody, "cat", f"{service.mountpoint}/file").stdout == "mirrored\n"
    assert "llloop-supervisor" in machine.run("ps", "-o", "args=", "-p", str(pid)).stdout


def namespace(machine: Machine, pid: str) -> str:
    return machine.run("readlink", f"/proc/{pid}/ns/mnt").stdout


def test_service_notifies_readiness_and_watchdog(service: Service) -> None:
    service.systemctl("start")
    assert (service.show("Type"), service.show("NotifyAccess")) == ("notify", "main")
    assert "mirrors" in service.show("StatusText")
    first = service.show("WatchdogTimestampMonotonic")
    assert int(first) > 0


def test_reload_keeps_the_mount_and_open_files(service: Service) -> None:
    service.systemctl("start")
    before = service.pid
    with service.machine.path(f"{service.mountpoint}/file").open() as file:
        service.systemctl("reload")
        wait_until(lambda: service.show("SubState") == "running", "reloaded")
        assert file.read() == "mirrored\n"
    assert (service.pid, service.show("NRestarts")) == (before, "0")
    assert service.read("file") == "mirrored\n"


def test_options_come_from_the_environment_file(service: Service) -> None:
    service.configure(LLLOOP_SERVE_WORKERS="3", LLLOOP_SERVE_FSNAME="our photos", LLLOOP_SERVE_READ_ONLY="1")
    service.systemctl("start")
    shown = service.machine.run("findmnt", "-n", "-o", "SOURCE,OPTIONS", service.mountpoint).stdout
    assert re.match(r"our photos +ro,", shown)
    titles = service.machine.run("ps", "-o", "args=", "-p", ",".join(service.processes())).stdout
    assert titles.count("llloop-worker-") == 3


def test_hardening_is_effective(service: Service) -> None:
    service.systemctl("start")
    status = service.machine.path(f"/proc/{service.pid}/status").read_text()
    found = dict(re.findall(r"^(\w+):\s+(.*)$", status, re.MULTILINE))
    assert found["NoNewPrivs"] == "1"
    assert found["Seccomp"] == "2"
    names = service.machine.run("capsh", f"--decode={found['CapBnd']}").stdout
    bound = set(re.findall(r"cap_(\w+)", names))
    # This machine itself may lack some.
    mine = service.machine.path("/proc/1/status").read_text()
    (possible,) = re.findall(r"^CapBnd:\s+(\w+)$", mine, re.MULTILINE)
    allowed = set(re.findall(r"cap_(\w+)", service.machine.run("capsh", f"--decode={possible}").stdout))
    assert bound == set(BOUND.split()) & allowed


# Calls that the hardening must allow: each gives the same result in a plain directory and in the mount.
DEEDS = r"""
set -e
cd "$1"; mkdir place; chgrp 4000 place; chmod 2775 place; cd place
echo x >suid; chmod 4755 suid
mknod null c 1 3; mknod disk b 8 0; mkfifo pipe
setpriv --reuid=4001 --regid=4002 --groups=4000 bash -c 'umask 027; echo y >of-member; mkdir below; ln -s suid link'
chown 4001:4002 suid; chmod 6755 suid
setfattr -n user.note -v hello suid; setfattr -n trusted.note -v hello suid
setcap cap_net_raw+ep of-member
setfacl -m u:4005:rw of-member
setpriv --reuid=4001 --regid=4002 --groups=4000 bash -c 'echo more >>of-member'
truncate -s 1M sparse; fallocate -l 64K full
: >fixed; chattr +i fixed; lsattr fixed | cut -d' ' -f1; chattr -i fixed
stat -c '%n %A %u %g %s %t %T' *
getfattr -d -m - suid of-member; getcap of-member; getfacl -n of-member; cat of-member
"""


def test_hardening_does_not_restrict_the_mount(service: Service) -> None:
    service.systemctl("start")
    machine, native = service.machine, f"/srv/{service.name}/native"
    machine.run("mkdir", native)
    expected = machine.run("bash", "-c", DEEDS, "bash", native, check=False)
    found = machine.run("bash", "-c", DEEDS, "bash", service.mountpoint, check=False)
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert expected.returncode == 0, expected.stdout


def test_stop_leaves_no_mount_and_loses_no_data(service: Service) -> None:
    service.configure(LLLOOP_SERVE_WRITEBACK="1")
    service.systemctl("start")
    # The kernel holds data when the stop begins. Workers can write it only if they run until the unmount is complete.
    script = f"dd if=/dev/urandom of='{service.source}/../sent' bs=1M count=32 status=none"
    service.machine.run("sh", "-c", script)
    with service.machine.path(f"{service.mountpoint}/data").open("wb") as file:
        file.write(service.machine.path(f"{service.source}/../sent").read_bytes())
    service.systemctl("stop")
    assert not service.mounted()
    assert service.processes() == []
    assert (service.show("Result"), service.show("ActiveState")) == ("success", "inactive")
    service.machine.run("cmp", f"{service.source}/../sent", f"{service.source}/data")


def test_killed_supervisor_is_restarted_without_dead_mount(service: Service) -> None:
    service.configure(LLLOOP_SERVE_CACHE="always")
    service.systemctl("start")
    before = service.pid
    service.machine.run("kill", "-KILL", str(before))
    wait_until(lambda: service.show("NRestarts") == "1" and service.show("ActiveState") == "active", "restarted")
    assert service.pid != before
    wait_until(service.mounted, "mounted")
    assert service.read("file") == "mirrored\n"
    assert service.machine.run("findmnt", "-n", service.mountpoint).stdout.count("fuse.llloop") == 1


def test_killing_all_processes_leaves_no_dead_mount(service: Service) -> None:
    service.systemctl("start")
    service.systemctl("kill", "--signal=KILL", "--kill-whom=all")
    wait_until(lambda: service.show("NRestarts") == "1" and service.show("ActiveState") == "active", "restarted")
    wait_until(service.mounted, "mounted")
    assert service.read("file") == "mirrored\n"


def test_killed_worker_is_replaced_by_the_supervisor(service: Service) -> None:
    service.systemctl("start")
    before = service.pid
    worker = service.machine.run("pgrep", "-P", str(before), "llloop-worker").stdout.split()[0]
    service.machine.run("kill", "-KILL", worker)
    wait_until(lambda: "a new process takes over" in service.journal(), "the worker is replaced")
    assert (service.pid, service.show("NRestarts")) == (before, "0")


def test_manual_unmount_ends_the_service(service: Service) -> None:
    service.systemctl("start")
    service.machine.run("umount", service.mountpoint)
    wait_until(lambda: service.show("ActiveState") == "inactive", "the service has ended")
    assert (service.show("Result"), service.show("NRestarts")) == ("success", "0")


def test_invalid_option_is_not_restarted(service: Service) -> None:
    service.configure(LLLOOP_SERVE_WORKERS="none")
    done = service.machine.run("systemctl", "start", service.unit, check=False)
    wait_until(lambda: service.show("ActiveState") == "failed", f"failed ({done.stdout})")
    assert service.show("NRestarts") == "0"
    assert "'none' is not a valid integer range" in service.journal()


def test_other_mount_is_not_unmounted(service: Service) -> None:
    machine = service.machine
    machine.run(LLLOOP, "serve", "--daemon", "--workers", "1", service.source, service.mountpoint)
    try:
        machine.run("systemctl", "start", service.unit, check=False)
        wait_until(lambda: "is already mounted there" in service.journal(), "refused")
        machine.run("systemctl", "stop", service.unit)
        assert service.read("file") == "mirrored\n"
    finally:
        machine.run(LLLOOP, "umount", service.mountpoint)


def test_drop_in_requires_the_file_system_of_the_source(service: Service) -> None:
    machine, where = service.machine, service.source
    machine.run("mkdir", "/srv/disk")
    machine.path("/srv/disk/file").write_text("on the disk\n")
    disk = machine.run("systemd-escape", "--path", "--suffix=mount", where).stdout.strip()
    unit = f"[Mount]\nWhat=/srv/disk\nWhere={where}\nType=none\nOptions=bind\n"
    machine.path(f"/etc/systemd/system/{disk}").write_text(unit)
    directory = f"/etc/systemd/system/{service.unit}.d"
    machine.run("mkdir", directory)
    drop_in = machine.run(LLLOOP, "systemd-unit", where, service.mountpoint).stdout
    machine.path(f"{directory}/mounts.conf").write_text(drop_in)
    machine.run("systemctl", "daemon-reload")
    service.systemctl("start")
    assert service.read("file") == "on the disk\n"
    # systemd also creates a mount unit for the mirror. The service must not depend on it.
    machine.run("systemctl", "daemon-reload")
    service.systemctl("restart")
    assert service.read("file") == "on the disk\n"
    machine.run("systemctl", "stop", disk)
    assert not service.mounted()
    assert service.show("Result") == "success"
