"""A booted systemd to deploy to: this machine's file system under an overlay, in namespaces of its own.

Nothing is downloaded and nothing of it outlives the test. What the machine writes goes to a tmpfs; its processes,
mounts and cgroups are its own and end with it. Only the network is shared, since pip may have to reach an index.
"""

from __future__ import annotations

import os
import select
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

SYSTEMD = "/lib/systemd/systemd"
BOOT_SECONDS = 60.0

# Runs as process 1 of the new namespaces. $1: an empty directory. Other arguments: directories to show read-only.
_INIT = r"""
set -euo pipefail
holder=$1; shift
mount --make-rprivate /
# Copies of mounts that tests beside this have made would keep their servers from ending.
umount --lazy --all --types fuse.llloop || true
mount -t tmpfs -o mode=755 llloop-machine "$holder"
mkdir "$holder/upper" "$holder/work" "$holder/root"
root=$holder/root
mount -t overlay -o "lowerdir=/,upperdir=$holder/upper,workdir=$holder/work" overlay "$root"
# Hide the real /tmp. systemd empties /tmp when it boots, and on the overlay this takes a call for each file.
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
# An overlay shows no mounts below /, and may not show later changes of its lower directory.
for shown; do
    mkdir -p "$root$shown"
    mount --bind "$shown" "$root$shown"
    mount -o remount,bind,ro "$root$shown"
done
mount -t proc proc "$root/proc"
# Writes there would change the kernel, which all machines share.
for shared in sys sysrq-trigger irq bus; do
    [[ ! -e $root/proc/$shared ]] || { mount --bind "$root/proc/$shared" "$root/proc/$shared"
                                       mount -o remount,bind,ro "$root/proc/$shared"; }
done
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
while read -r name major minor; do
    mknod -m 666 "$root/dev/$name" c "$major" "$minor"
done <<< $'null 1 3\nzero 1 5\nfull 1 7\nrandom 1 8\nurandom 1 9\ntty 5 0\nfuse 10 229'
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=666 devpts "$root/dev/pts"
mount -t tmpfs tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for number in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${number%:*}" "$root/dev/${number#*:}"; done
mount -t tmpfs -o mode=755 tmpfs "$root/run"
# Do not start services or file systems of the real machine a second time.
mount -t tmpfs -o mode=755 tmpfs "$root/etc/systemd/system"
rm -rf "$root"/etc/rc[0-6S].d
: >"$root/etc/fstab"; : >"$root/etc/crypttab"
cd "$root"
mkdir .old
pivot_root . .old
umount --lazy /.old
rmdir /.old
exec setpriv --bounding-set -sys_module,-sys_time,-syslog,-sys_rawio env -i container=llloop-tests \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$SYSTEMD" --system \
    --log-target=console --log-level=warning --show-status=0 --unit=multi-user.target
"""


class NoMachine(Exception):
    """systemd cannot boot here; the text says why."""


class Machine:
    """A running machine."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        # The path of its root directory on this machine, so that tests can write and read its files.
        self.root = Path(f"/proc/{pid}/root")

    def path(self, path: str | Path) -> Path:
        """Return the path outside of the machine that leads to a path in the machine."""
        return self.root / str(path).lstrip("/")

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        timeout: float = 120,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root in the machine.

        Args:
            check: fail with the command's output if its exit code is not 0.
            timeout: seconds.
            environment: all there is besides PATH, HOME and the locale.
        """
        variables = {"HOME": "/root", "LC_ALL": "C.UTF-8", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"}
        variables.update(environment or {})
        done = subprocess.run(
            ["nsenter", f"--target={self.pid}", "--all", "env", "--chdir=/", *(str(part) for part in command)],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if check:
            assert done.returncode == 0, f"{shlex.join(map(str, command))}: {done.returncode}\n{done.stdout}"
        return done


def cgroup_parent() -> Path:
    """The directory where the unified cgroup hierarchy is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        if fields[fields.index("-") + 1] == "cgroup2" and fields[3] == "/":
            return Path(fields[4])
    raise NoMachine("no cgroup2 file system is mounted")


def _remove_cgroup(cgroup: Path) -> None:
    deadline = time.monotonic() + 30
    while cgroup.exists():
        for directory, _, _ in os.walk(cgroup, topdown=False):
            try:
                os.rmdir(directory)
            except OSError:
                # A killed process leaves its cgroup only after a moment.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
                break


def _first_process(parent: int) -> int | None:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(children[0]) if children else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the machine and wait for its first process: all other processes and all mounts end with it."""
    first = _first_process(process.pid) if process.poll() is None else None
    with ExitStack() as stack:
        if first is not None:
            descriptor = os.pidfd_open(first)
            stack.callback(os.close, descriptor)
            stack.callback(select.select, [descriptor], [], [], 10)
        process.kill()
        process.wait()


def _await_boot(process: subprocess.Popen[bytes], log: Path) -> Machine:
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise NoMachine(f"systemd could not be started in namespaces: {log.read_text()[-2000:]}")
        pid = _first_process(process.pid)
        if pid and Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
            machine = Machine(pid)
            state = machine.run("systemctl", "is-system-running", "--wait", check=False).stdout.strip()
            # Until systemd listens, systemctl fails because it cannot connect.
            if state in ("running", "degraded"):
                return machine
        time.sleep(0.05)
    raise NoMachine(f"systemd was not up within {BOOT_SECONDS:.0f} s: {log.read_text()[-2000:]}")


@contextmanager
def booted(shown: Sequence[Path] = ()) -> Iterator[Machine]:
    """A machine for as long as the block lasts.

    Args:
        shown: directories of this machine that it sees, read-only, at the same paths.

    Raises:
        NoMachine: where that cannot be had.
    """
    if os.geteuid() != 0:
        raise NoMachine("making namespaces and cgroups for it needs root")
    if not os.path.exists(SYSTEMD):
        raise NoMachine(f"{SYSTEMD} is missing: install Debian's package systemd")
    parent = cgroup_parent()
    with tempfile.TemporaryDirectory(prefix="llloop-machine-") as holder:
        log = Path(holder, "log")
        Path(holder, "mount").mkdir()
        command = [
            # The machine ends with the tests, even if they are killed.
            *("setpriv", "--pdeathsig", "KILL"),
            *("unshare", "--mount", "--pid", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child=KILL"),
            *("bash", "-c", _INIT, "bash", f"{holder}/mount", *map(str, shown)),
        ]
        cgroup = Path(tempfile.mkdtemp(prefix="llloop-machine-", dir=parent))
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    # The process must be in its cgroup before it creates the cgroup namespace.
                    ["bash", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(cgroup), *command],
                    env={**os.environ, "SYSTEMD": SYSTEMD},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            try:
                yield _await_boot(process, log)
            finally:
                _end(process)
        finally:
            _remove_cgroup(cgroup)
