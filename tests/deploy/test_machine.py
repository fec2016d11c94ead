"""The test machine works, and does not affect the real one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.deploy.machine import Machine, booted, cgroup_parent


def test_systemd_is_up_without_failed_units(machine: Machine) -> None:
    assert machine.run("systemctl", "is-system-running").stdout == "running\n"


def test_writes_stay_in_the_machine(machine: Machine) -> None:
    machine.run("sh", "-c", "echo written >/etc/llloop-was-here && mkdir /root/llloop-was-here")
    assert machine.path("/etc/llloop-was-here").read_text() == "written\n"
    assert not os.path.exists("/etc/llloop-was-here")
    assert not os.path.exists("/root/llloop-was-here")


def test_kernel_settings_are_read_only(machine: Machine) -> None:
    assert machine.run("sh", "-c", "echo 1 >/proc/sys/vm/drop_caches", check=False).returncode != 0


def test_machine_leaves_nothing() -> None:
    with booted() as another:
        pid = another.pid
        assert living(pid)
        mounts = Path(f"/proc/{pid}/mountinfo").read_text()
        holder = re.search(r"upperdir=(/[^ ,]*/llloop-machine-[^/]+)", mounts)
        assert holder
        assert os.path.exists(holder[1])
        cgroup = cgroup_of(pid)
        another.run("systemd-run", "--quiet", "--unit=sleeper", "sleep", "1000")
        assert os.path.exists(f"{cgroup}/system.slice/sleeper.service")
    assert not living(pid)
    assert not os.path.exists(holder[1])
    assert holder[1] not in Path("/proc/self/mountinfo").read_text()
    assert not os.path.exists(cgroup)


def living(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def cgroup_of(pid: int) -> str:
    """The machine's cgroup: the parent of the one that systemd created for its process 1."""
    (path,) = re.findall(r"^0::(/\S*)/init.scope$", Path(f"/proc/{pid}/cgroup").read_text(), re.MULTILINE)
    return f"{cgroup_parent()}{path}"
