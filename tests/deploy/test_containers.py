"""Podman on a test machine: mounting in a container, and using the host's mount in a container."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.deploy.machine import Machine

LLLOOP = str(Path(sys.executable).parent / "llloop")
CHECKOUT = str(Path(__file__).parents[2])
Run = Callable[..., "CompletedProcess[str]"]
SERVE = f"mkdir /run/src /run/mnt; echo inside >/run/src/file; {LLLOOP} serve --workers 1 --daemon /run/src /run/mnt"
# Switch off features that the machine cannot provide: controllers of cgroups, and settings of the shared kernel.
HERE = ("--cgroups=disabled", "--pids-limit=-1", "--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096")


@pytest.fixture(scope="module")
def store(machine: Machine) -> Iterator[str]:
    machine.run("mkdir", "/srv/podman")
    machine.run("mount", "-t", "tmpfs", "tmpfs", "/srv/podman")
    machine.path("/srv/podman/containers.conf").write_text("[containers]\ndefault_sysctls = []\n")
    yield "/srv/podman"
    machine.run("umount", "--lazy", "/srv/podman")


@pytest.fixture
def podman(machine: Machine, store: str) -> Run:
    """Runs a shell command in a container. Its root directory is that of the machine, without the mounts below it."""

    def run(script: str, *options: str) -> CompletedProcess[str]:
        places = (f"--root={store}/images", f"--runroot={store}/run", "--storage-driver=vfs")
        command = ("podman", *places, "--cgroup-manager=cgroupfs", "run", "--rm", "--network=none", *HERE, *options)
        volume = f"--volume={CHECKOUT}:{CHECKOUT}:ro"
        return machine.run(
            *(*command, volume, "--rootfs", "/:O", "sh", "-c", script),
            check=False,
            environment={"CONTAINERS_CONF": f"{store}/containers.conf"},
        )

    return run


@pytest.fixture
def server(machine: Machine) -> Iterator[str]:
    """A server whose mount is in a shared mount of the host, so that it appears in containers with propagation."""
    machine.run("mkdir", "-p", "/srv/source", "/srv/mirrors")
    machine.path("/srv/source/file").write_text("from the host\n")
    machine.run("mount", "--bind", "/srv/mirrors", "/srv/mirrors")
    machine.run("mount", "--make-shared", "/srv/mirrors")
    machine.run("mkdir", "-p", "/srv/mirrors/photos")
    machine.run(LLLOOP, "serve", "--daemon", "--workers", "1", "/srv/source", "/srv/mirrors/photos")
    yield "/srv/mirrors/photos"
    machine.run(LLLOOP, "umount", "--lazy", "/srv/mirrors/photos", check=False)
    machine.run("umount", "/srv/mirrors")


def test_container_with_device_and_capability_can_mount(podman: Run) -> None:
    script = f"{SERVE} && cat /run/mnt/file && {LLLOOP} umount /run/mnt"
    done = podman(script, "--device=/dev/fuse", "--cap-add=SYS_ADMIN")
    assert (done.returncode, done.stdout) == (0, "inside\n")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "/dev/fuse is missing"),
        (("--cap-add=SYS_ADMIN",), "/dev/fuse is missing"),
        (("--device=/dev/fuse",), "it lacks CAP_SYS_ADMIN"),
    ],
)
def test_container_without_either_reports_what_is_missing(
    podman: Run, options: tuple[str, ...], complaint: str
) -> None:
    done = podman(SERVE, *options)
    assert done.returncode == 5
    assert complaint in done.stdout


def test_container_reads_and_writes_the_hosts_mount(machine: Machine, podman: Run, server: str) -> None:
    done = podman("cat /data/file; echo changed >/data/file; ls /data", f"--volume={server}:/data")
    assert done.stdout == "from the host\nfile\n"
    assert machine.path("/srv/source/file").read_text() == "changed\n"


def test_container_cannot_write_a_read_only_volume(machine: Machine, podman: Run, server: str) -> None:
    done = podman("cat /data/file; echo changed >/data/file", f"--volume={server}:/data:ro")
    assert done.stdout.startswith("from the host\n")
    assert "Read-only file system" in done.stdout
    assert machine.path("/srv/source/file").read_text() == "from the host\n"


def test_container_with_propagation_sees_later_mounts(machine: Machine, podman: Run, server: str) -> None:
    machine.run(LLLOOP, "umount", server)
    machine.run("mkdir", "-p", "/srv/signals")
    script = "touch /signals/up; until [ -e /data/photos/file ]; do sleep 0.1; done; cat /data/photos/file"
    serve = f"until [ -e /srv/signals/up ]; do sleep 0.1; done; {LLLOOP} serve --daemon /srv/source {server}"
    machine.run("systemd-run", "--quiet", "--collect", "-p", "Type=forking", "--no-block", "sh", "-c", serve)
    volumes = ("--volume=/srv/signals:/signals", f"--volume={os.path.dirname(server)}:/data:rslave")
    done = podman(f"timeout 20 sh -c '{script}'", *volumes)
    assert (done.returncode, done.stdout) == (0, "from the host\n")
