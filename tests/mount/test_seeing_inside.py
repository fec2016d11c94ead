"""`llloop status`, `llloop stats` and `llloop control`, with real mounts."""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from llloop.cli import prometheus, rates, tables
from llloop.cli.main import main
from llloop.control import client, discovery
from llloop.errors import LlloopError
from llloop.linux import mounts
from llloop.supervisor.process_info import process_state
from tests import filesystems
from tests.as_user import Caller, Child, run_as
from tests.conftest import Serve
from tests.mount.command_line import llloop, stopped
from tests.server import Server
from tests.server_processes import stop_process, wait_until, wait_until_quiet, workers
from tests.syscalls import opened
from tests.watchdog import kill_session, mount_entry, unmount_lazily

pytestmark = [pytest.mark.mounted, pytest.mark.user]

MIB = 1 << 20
# The front gives a write of this size to a worker.
LARGE = 200_000
STRANGER = Caller(4001, 4001)


def stats(server: Server) -> dict[str, Any]:
    ended = llloop("stats", server.mountpoint, "--json")
    assert ended.code == 0, ended.stderr
    return dict(json.loads(ended.stdout))


def status(server: Server) -> dict[str, Any]:
    return discovery.status_of(str(server.mountpoint))


def ask(server: Server, command: str, **arguments: Any) -> Any:
    return client.ask_mount(str(server.mountpoint), command, **arguments)


def socket_of(server: Server) -> str:
    entry = mounts.find_mount(str(server.mountpoint))
    assert entry
    ((path, _),) = client.socket_candidates(entry)
    return path


def counted(server: Server, operation: str, what: str = "requests") -> int:
    return int(ask(server, "stats")["operations"].get(operation, {}).get(what, 0))


# Counters


def test_each_request_is_counted_once(serve: Serve) -> None:
    server = serve("--workers", "2")
    before = ask(server, "stats")["operations"]
    for number in range(10):
        os.mkdir(server.mountpoint / f"{number}")
    with pytest.raises(FileExistsError):
        os.mkdir(server.mountpoint / "0")
    for number in range(5):
        os.rmdir(server.mountpoint / f"{number}")
    # The front counts after it has answered.
    assert wait_until(lambda: counted(server, "RMDIR") == 5)
    after = ask(server, "stats")["operations"]
    grown = {name: after[name]["requests"] - before.get(name, {}).get("requests", 0) for name in ("MKDIR", "RMDIR")}
    assert grown == {"MKDIR": 10, "RMDIR": 5}
    assert after["MKDIR"]["errors"] == 0, "the kernel knows that it exists"
    assert sum(after["MKDIR"]["histogram"]) == 10
    assert 0 < after["MKDIR"]["nanoseconds"] < 60e9


@pytest.mark.by_workers
def test_bytes_and_workers(serve: Serve) -> None:
    server = serve("--workers", "4")
    for number in range(16):
        with opened(server.mountpoint / f"file{number}", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as fd:
            os.write(fd, mmap.mmap(-1, MIB))
            os.preadv(fd, [mmap.mmap(-1, MIB)], 0)
    # A worker counts after it has answered.
    assert wait_until(lambda: counted(server, "READ", "bytes") == 16 * MIB)
    found = stats(server)
    assert found["operations"]["WRITE"]["bytes"] == found["operations"]["READ"]["bytes"] == 16 * MIB
    assert [worker["name"] for worker in found["workers"]] == [f"worker-{number}" for number in range(4)]
    assert sum(worker["bytes"] for worker in found["workers"]) == 32 * MIB
    assert all(worker["bytes"] % MIB == 0 and worker["errors"] == 0 for worker in found["workers"])
    requests = sum(one["requests"] for one in found["operations"].values())
    assert requests == found["front"]["requests"] + sum(worker["requests"] for worker in found["workers"])


def test_errors_are_counted(serve: Serve) -> None:
    # The kernel must not look up the file again.
    server = serve("--no-xattr" if os.geteuid() else "--xattr", "--negative-timeout", "1")
    with pytest.raises(OSError):
        os.readlink(server.mountpoint)
    (server.mountpoint / "file").touch()
    for _ in range(3):
        with pytest.raises(OSError):
            os.getxattr(server.mountpoint / "file", "user.missing")
    operations = ask(server, "stats")["operations"]
    assert sum(operations["GETXATTR"]["errnos"].values()) >= 1
    assert operations["GETXATTR"]["errors"] == operations["LOOKUP"]["errors"] == 0
    assert sum(operations["LOOKUP"]["errnos"].values()) <= 1


def test_inodes_and_handles_are_counted(serve: Serve) -> None:
    server = serve()
    before = ask(server, "stats")
    (server.source / "directory").mkdir()
    for number in range(20):
        (server.source / "directory" / f"{number}").touch()
    descriptors = [os.open(server.mountpoint / "directory" / f"{number}", os.O_RDONLY) for number in range(20)]
    during = ask(server, "stats")
    assert during["inodes"] == before["inodes"] + 21
    assert during["handles"] == before["handles"] + 20
    assert during["front"]["descriptors"] >= before["front"]["descriptors"] + 20
    for fd in descriptors:
        os.close(fd)
    assert wait_until(lambda: ask(server, "stats")["handles"] == before["handles"])


@pytest.mark.own_loop
@pytest.mark.by_workers
def test_cache_decisions_are_counted(serve: Serve) -> None:
    server = serve("--cache", "always")
    (server.source / "file").touch()
    os.utime(server.source / "file", (time.time(), time.time() - 10))  # so that no read updates the access time
    for _ in range(3):
        (server.mountpoint / "file").read_bytes()
    assert ask(server, "stats")["cache"]["kept"] == 3
    never = serve("--cache", "never")
    (never.source / "file").touch()
    (never.mountpoint / "file").read_bytes()
    cache = ask(never, "stats")["cache"]
    assert (cache["kept"], cache["bypassed"] + cache["dropped"]) == (0, 1)


@pytest.mark.by_workers
def test_counters_survive_a_worker(serve: Serve) -> None:
    server = serve("--workers", "1")
    server.expect_log("llloop-worker-0 was killed by signal 9")
    (server.mountpoint / "file").write_bytes(bytes(LARGE))
    assert wait_until(lambda: counted(server, "WRITE", "bytes") == LARGE)
    (pid,) = workers(server).values()
    os.kill(pid, signal.SIGKILL)
    (server.mountpoint / "file").write_bytes(bytes(LARGE))
    assert wait_until(lambda: counted(server, "WRITE", "bytes") == 2 * LARGE)
    (worker,) = ask(server, "stats")["workers"]
    assert worker["restarts"] == 1
    assert worker["pid"] != pid


@pytest.mark.own_loop
def test_counters_survive_the_front(serve: Serve) -> None:
    server = serve("--workers", "1")
    server.expect_log("llloop-front was killed by signal 9")
    for number in range(7):
        os.mkdir(server.mountpoint / f"{number}")
    # The front counts after it has answered.
    assert wait_until(lambda: counted(server, "MKDIR") == 7)
    front = ask(server, "stats")["front"]["pid"]
    os.kill(front, signal.SIGKILL)
    os.mkdir(server.mountpoint / "after")
    assert wait_until(lambda: counted(server, "MKDIR") == 8)
    assert ask(server, "stats")["front"]["restarts"] == 1


@pytest.mark.by_workers
@pytest.mark.own_loop
def test_queue_is_the_number_of_unanswered_requests(serve: Serve) -> None:
    server = serve("--workers", "1")
    (worker,) = workers(server).values()
    (server.source / "file").write_bytes(bytes(LARGE))
    with opened(server.mountpoint / "file", os.O_WRONLY) as fd:
        stop_process(worker)
        try:
            syncing = Child(os.fsync, fd)
            assert wait_until(lambda: ask(server, "stats")["workers"][0]["queue"] == 1)
            assert ask(server, "stats")["slots"]["used"] == 1
            time.sleep(0.05)
        finally:
            os.kill(worker, signal.SIGCONT)
        syncing.result()
    assert wait_until(lambda: counted(server, "FSYNC") == 1)
    count = ask(server, "stats")["operations"]["FSYNC"]
    assert count["nanoseconds"] >= 50_000_000, "the time in the queue counts"
    assert ask(server, "stats")["slots"]["used"] == 0


# status


def test_status_of_one_mount(serve: Serve, via: str) -> None:
    server = serve("--workers", "2", "--read-only", "--fsname", "photos")
    found = status(server)
    assert found["state"] == "serving"
    assert found["source"] == str(server.source)
    assert found["mountpoint"] == str(server.mountpoint)
    assert found["pid"] == server.pid
    assert found["loop"] == via
    assert ("has_resend" in found["capabilities"]) == ("has_resend" in server.output.read_text())
    assert found["options"]["workers"] == 2
    assert found["options"]["read_only"] is True
    assert found["options"]["fsname"] == "photos"
    assert 0 <= found["uptime"] < 60
    assert {process["pid"] for process in found["processes"]} == set(server.processes())
    roles = {process["role"] for process in found["processes"]}
    assert {"supervisor", "front", "worker-0", "worker-1"} <= roles
    text = llloop("status", server.mountpoint)
    assert text.code == 0
    assert re.search(rf"^{server.mountpoint}  mirrors\s+{server.source}\s+serving", text.stdout)
    assert "read-only" in text.stdout
    assert re.search(r"worker-1 +\d+", text.stdout)


def test_status_of_all_mounts(serve: Serve) -> None:
    servers = [serve(), serve()]
    ended = llloop("status", "--json")
    # There may be other mounts on this machine, and dead ones.
    assert ended.code in (0, 1), ended.stderr
    found = {one["mountpoint"]: one for one in json.loads(ended.stdout)}
    for server in servers:
        assert found[str(server.mountpoint)]["state"] == "serving"
        assert found[str(server.mountpoint)]["visible"] is True


def test_stopped_front_is_reported(serve: Serve) -> None:
    server = serve()
    front = ask(server, "stats")["front"]["pid"]
    stop_process(front)
    try:
        # If the command asks the mount, only the process of the command may hang.
        ended = llloop("status", server.mountpoint, "--json")
        assert ended.code == 1
        (found,) = json.loads(ended.stdout)
        assert found["state"] == "not answering"
        (state,) = {process["state"] for process in found["processes"] if process["role"] == "front"}
        assert state == "T"
    finally:
        os.kill(front, signal.SIGCONT)
    assert status(server)["state"] == "serving"


def test_stopped_worker_is_reported(serve: Serve) -> None:
    server = serve("--workers", "2")
    assert status(server)["problems"] == []
    pid = workers(server)["llloop-worker-1"]
    stop_process(pid)
    try:
        assert wait_until(lambda: status(server)["state"] == "degraded")
        ended = llloop("status", server.mountpoint)
        assert ended.code == 1
        assert f"worker-1 (process {pid}) is stopped (state T)" in " ".join(ended.stdout.split())
    finally:
        os.kill(pid, signal.SIGCONT)
    assert wait_until(lambda: status(server)["state"] == "serving")


def test_status_shows_what_auto_resolved_to(serve: Serve, via: str) -> None:
    server = serve("--cache", "auto", "--io", "auto", "--metadata", "auto", "--entry-timeout", "3")
    in_force = status(server)["in_force"]
    assert in_force["io"] == ("kernel" if "passthrough" in server.output.read_text() else "workers")
    assert in_force["metadata"] == ("workers" if "metadata through workers" in server.output.read_text() else "front")
    assert "names 3 s" in in_force["cache"]
    assert "kept until it changes" in in_force["cache"]
    assert f"io: {in_force['io']}; metadata: {in_force['metadata']}" in " ".join(
        llloop("status", server.mountpoint).stdout.split()
    )


def problems(server: Server) -> str:
    found = status(server)
    assert (found["state"] == "degraded") == bool(found["problems"])
    return "; ".join(found["problems"])


def test_removed_or_replaced_source_is_reported(serve: Serve) -> None:
    server = serve("--workers", "1")
    moved = server.source.with_name("moved")
    assert problems(server) == ""
    server.source.rename(moved)
    assert wait_until(lambda: "no longer at its path" in problems(server))
    server.source.mkdir()
    assert wait_until(lambda: "another directory" in problems(server))
    assert exported(server.mountpoint)["llloop_source_up", (("mountpoint", str(server.mountpoint)),)] == 0
    server.source.rmdir()
    moved.rename(server.source)
    assert wait_until(lambda: problems(server) == "")
    server.source.rmdir()
    assert wait_until(lambda: "has been deleted" in problems(server))


@pytest.mark.root
def test_unmounted_source_is_reported(serve: Serve, tmp_path: Path) -> None:
    with filesystems.tmpfs(tmp_path, "size=1m") as source:
        server = serve("--workers", "1", source=source)
        with filesystems.tmpfs(tmp_path, "size=2m"):
            assert wait_until(lambda: "another directory" in problems(server))
        assert wait_until(lambda: problems(server) == "")
        unmount_lazily(str(source))
        assert wait_until(lambda: "another directory" in problems(server))
        server.stop()
        subprocess.run(["mount", "-t", "tmpfs", "none", source], check=True)  # this test unmounts it


@pytest.mark.root
def test_frozen_source_is_reported_without_waiting(serve: Serve, tmp_path: Path) -> None:
    with filesystems.ext4(tmp_path) as source:
        server = serve("--workers", "1", source=source)
        assert problems(server) == ""
        subprocess.run(["fsfreeze", "--freeze", source], check=True)
        try:
            for _ in range(3):
                time.sleep(0.6)  # the server may repeat an answer for half a second
                begun = time.monotonic()
                assert "frozen" in problems(server)
                assert time.monotonic() - begun < 3
            looking = [pid for pid in server.processes() if process_state(pid) == "D"]
            assert len(looking) == 1, "who looks at the source pile up"
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", source], check=True)
        assert wait_until(lambda: problems(server) == "")
        assert os.listdir(source) == ["lost+found"], "looking has left something"
        server.stop()


def kill_all(server: Server) -> None:
    assert server.process
    for pid in server.processes():
        stop_process(pid)  # so that no process cleans up after another
    for pid in server.processes():
        os.kill(pid, signal.SIGKILL)
    server.process.wait(30)
    assert wait_until(lambda: server.processes() == [])


def test_dead_mount_is_shown_as_dead(serve: Serve) -> None:
    server = serve()
    kill_all(server)
    try:
        assert status(server)["state"] == "dead"
        text = llloop("status", server.mountpoint)
        assert text.code == 1
        assert f"llloop umount --lazy {server.mountpoint}" in " ".join(text.stdout.split())
        everything = {one["mountpoint"]: one["state"] for one in discovery.all_statuses()}
        assert everything[str(server.mountpoint)] == "dead"
        with pytest.raises(client.NotReachable, match="its server is gone"):
            ask(server, "stats")
    finally:
        unmount_lazily(str(server.mountpoint))
        server.clean_up()


@pytest.mark.parametrize("command", [("status",), ("stats",), ("control", "reload")])
def test_commands_refuse_other_file_systems(command: tuple[str, ...], tmp_path: Path) -> None:
    name, *more = command
    for place, reason in (
        (tmp_path, "nothing is mounted there"),
        ("/proc", "not llloop; use umount"),
        ("/a/b", "nothing"),
    ):
        ended = CliRunner().invoke(main, [name, str(place), *more])
        assert ended.exit_code == 4
        assert reason in ended.output


@pytest.mark.root
def test_another_user_only_sees_that_the_mount_exists(serve: Serve) -> None:
    server = serve()

    def look(command: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "llloop", command, str(server.mountpoint)],
            cwd="/",
            env={"PATH": "/usr/bin"},
            capture_output=True,
            text=True,
            timeout=30,
        )
        return done.returncode, done.stdout + done.stderr

    code, text = run_as(STRANGER, look, "status")
    assert code == 1
    assert "unknown" in text
    assert "belongs to another user" in " ".join(text.split())
    code, text = run_as(STRANGER, look, "stats")
    assert code == 1
    assert "belongs to another user" in text
    assert "Traceback" not in text


# stats


def test_table_of_statistics(serve: Serve) -> None:
    server = serve("--workers", "2")
    (server.mountpoint / "file").write_bytes(bytes(LARGE))
    (server.mountpoint / "file").read_bytes()
    ended = llloop("stats", server.mountpoint)
    assert ended.code == 0
    assert str(server.mountpoint) in ended.stdout
    assert re.search(r"^ *lookup +[\d.]+", ended.stdout, re.MULTILINE)
    assert re.search(r"^ *worker-1 +\d+", ended.stdout, re.MULTILINE)


def test_watch_shows_each_interval(serve: Serve) -> None:
    server = serve()
    watcher = subprocess.Popen(
        [sys.executable, "-m", "llloop", "stats", str(server.mountpoint), "--json", "--watch", "0.2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A script may have started these tests in the background, where SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert watcher.stdout
        first = json.loads(watcher.stdout.readline())
        assert 0.1 < first["seconds"] < 60
        for number in range(50):
            os.mkdir(server.mountpoint / f"{number}")
        seen = 0
        while seen < 50:
            seen += json.loads(watcher.stdout.readline())["operations"].get("MKDIR", {}).get("requests", 0)
        assert seen == 50
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(30) == 0
        assert watcher.stderr
        assert watcher.stderr.read() == ""
    finally:
        watcher.kill()
        watcher.communicate()


def test_tables_fit_a_terminal_of_80_columns(serve: Serve) -> None:
    server = serve("--workers", "2")
    for number in range(3):
        (server.mountpoint / f"{number}").write_bytes(bytes(LARGE))
        (server.mountpoint / f"{number}").read_bytes()
    console = Console(width=80, file=io.StringIO(), markup=False, highlight=False)
    now = {**ask(server, "stats"), "mountpoint": "/mnt", "source": "/src"}
    busy = {name: {**count, "requests": 12_345_678, "nanoseconds": 10**18} for name, count in now["operations"].items()}
    busy["COPY_FILE_RANGE"] = {**busy["LOOKUP"], "bytes": 10**14, "errors": 12_345, "errnos": {"EIO": 12_345}}
    for one in (now["front"], *now["workers"]):
        one.update(pid=4194304, requests=12_345_678, bytes=10**14, descriptors=1_000_000, restarts=999, cpu_seconds=900)
    console.print(tables.stats_view([rates.rates_since({**now, "operations": busy, "uptime": 1000}, None)]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\N{HORIZONTAL ELLIPSIS}" not in text, "something was left out"
    lines = text.splitlines()
    assert sum(line.lstrip().startswith("copy_file_range ") for line in lines) == 1
    # If the cells of a row do not fit, the row continues in lines that begin with an empty cell.
    rows = [line for line in lines if line.startswith(" ")]
    assert not [line for line in rows if line.strip() and line[1:8].isspace()], text


def samples_in(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def exported(*arguments: str | Path) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    ended = llloop("stats", *arguments, "--prometheus")
    assert ended.code == 0, ended.stderr
    return samples_in(ended.stdout)


def test_everyday_use_counts_no_errors(serve: Serve) -> None:
    """Alerts must not fire for a healthy mount."""
    server = serve("--workers", "1")
    place = server.mountpoint
    (place / "directory").mkdir()
    for number in range(10):
        (place / f"{number}").write_bytes(b"x")  # the kernel requests security.capability at the first write
        with contextlib.suppress(OSError):
            os.getxattr(place / f"{number}", "user.missing")
    for call in (
        lambda: os.open(place / "missing", os.O_RDONLY),
        lambda: os.mkdir(place / "directory"),
        lambda: os.rmdir(place / "missing"),
        lambda: os.link(place / "0", place / "1"),
        lambda: os.setxattr(place / "0", "strange.name", b""),
        lambda: os.open(place / ("x" * 300), os.O_RDONLY),
        lambda: os.rename(place / "directory", place / "directory" / "below"),
    ):
        with pytest.raises(OSError):
            call()
    with opened(place / "0", os.O_RDONLY) as fd, pytest.raises(OSError):
        os.lseek(fd, 100, os.SEEK_DATA)
    samples = exported(place)
    found = {labels: value for (name, labels), value in samples.items() if name == "llloop_errors_total"}
    assert found, "they are shown before there are any"
    assert not any(found.values()), {labels: value for labels, value in found.items() if value}
    assert sum(value for (name, _), value in samples.items() if name == "llloop_ordinary_errors_total") > 0


@pytest.mark.root
def test_errors_are_counted_by_errno(serve: Serve, tmp_path: Path) -> None:
    with filesystems.tmpfs(tmp_path, "size=1m") as source:
        server = serve("--workers", "1", "--io", "workers", source=source)
        with opened(server.mountpoint / "file", os.O_WRONLY | os.O_CREAT | os.O_DIRECT) as fd, pytest.raises(OSError):
            for _ in range(4):
                os.write(fd, mmap.mmap(-1, MIB))
        # A worker counts after it has answered.
        assert wait_until(lambda: counted(server, "WRITE", "errors") >= 1)
        write = (("errno", "ENOSPC"), ("mountpoint", str(server.mountpoint)), ("operation", "write"))
        assert exported(server.mountpoint)["llloop_errors_total", write] >= 1
        assert "errors" in llloop("stats", server.mountpoint).stdout.split("ENOSPC")[0]
        server.stop()


def test_export_contains_all_mounts_and_dead_ones_are_down(serve: Serve, tmp_path: Path) -> None:
    living, dead = serve("--workers", "1"), serve("--workers", "1")
    file = tmp_path / "all.prom"
    kill_all(dead)
    try:
        assert llloop("stats", "--textfile", file).code == 0
        for samples in (samples_in(file.read_text()), exported()):
            up = {dict(labels)["mountpoint"]: value for (name, labels), value in samples.items() if name == "llloop_up"}
            assert up[str(living.mountpoint)] == 1
            assert up[str(dead.mountpoint)] == 0
            assert samples["llloop_inodes", (("mountpoint", str(living.mountpoint)),)] >= 1
        # A file of one mount is replaced, too.
        for _ in range(2):
            ended = llloop("stats", dead.mountpoint, "--textfile", file)
            assert ended.code in (1, 4)
            assert samples_in(file.read_text()) == {("llloop_up", (("mountpoint", str(dead.mountpoint)),)): 0}
            unmount_lazily(str(dead.mountpoint))
        answer = {one["mountpoint"]: one for one in json.loads(llloop("stats", "--json").stdout)}
        assert "operations" in answer[str(living.mountpoint)]
        assert str(living.mountpoint) in llloop("stats").stdout
    finally:
        if mount_entry(str(dead.mountpoint)):
            unmount_lazily(str(dead.mountpoint))
        dead.clean_up()


def test_stopped_front_is_exported_as_down(serve: Serve) -> None:
    server = serve("--workers", "1")
    front = ask(server, "stats")["front"]["pid"]
    itself = (("mountpoint", str(server.mountpoint)),)
    stop_process(front)
    try:
        samples = exported(server.mountpoint)
        assert samples["llloop_up", itself] == 0
        assert samples["llloop_process_up", (*itself, ("process", "front"))] == 0
    finally:
        os.kill(front, signal.SIGCONT)


def test_export_is_valid_prometheus_format(serve: Serve, tmp_path: Path) -> None:
    server = serve("--workers", "2")
    for number in range(3):
        os.mkdir(server.mountpoint / f"{number}")
    ended = llloop("stats", server.mountpoint, "--prometheus")
    assert ended.code == 0
    samples = samples_in(ended.stdout)
    itself = (("mountpoint", str(server.mountpoint)),)
    mkdir = (*itself, ("operation", "mkdir"))
    assert samples["llloop_request_seconds_count", mkdir] == 3
    assert samples["llloop_request_seconds_bucket", (("le", "+Inf"), *mkdir)] == 3
    assert samples["llloop_errors_total", (("errno", "EIO"), *mkdir)] == 0
    assert samples["llloop_inodes", itself] >= 4
    assert samples["llloop_up", itself] == samples["llloop_source_up", itself] == 1
    assert samples["llloop_process_up", (*itself, ("process", "worker-1"))] == 1
    file = tmp_path / "llloop.prom"
    assert llloop("stats", server.mountpoint, "--textfile", file).code == 0
    assert {family.name for family in text_string_to_metric_families(file.read_text())} >= {"llloop_opens"}
    assert os.listdir(tmp_path) == ["llloop.prom"]


def test_invalid_options_of_stats(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    for arguments, code, reason in (
        (["--json", "--prometheus"], 2, "exclude each other"),
        (["--watch", "--prometheus"], 2, "exclude each other"),
        (["--watch", "nan"], 2, "--watch must be"),
        (["--watch", "0"], 2, "--watch must be"),
        (["--textfile", str(tmp_path / "no" / "such")], 5, "No such file or directory"),
    ):
        ended = CliRunner().invoke(main, ["stats", str(server.mountpoint), *arguments])
        assert ended.exit_code == code
        assert reason in ended.output
        assert len(ended.output.splitlines()) == 1


def test_untrusted_names_are_escaped(serve: Serve, tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"[red]caf\xe9\x1b[31m\n")
    source.mkdir()
    server = serve("--fsname", "x", source=source)
    answer = ask(server, "stats")
    for view in (tables.status_view([status(server)]), tables.stats_view([rates.rates_since(answer, None)])):
        console = tables.console()
        console.file = io.StringIO()
        console.print(view)
        text = console.file.getvalue()
        assert "\x1b" not in text
        assert "[red]caf\\udce9\\x1b[31m\\n" in "".join(text.split())
    assert status(server)["source"] == str(source)
    assert json.loads(json.dumps(answer))["source"] == str(source)
    assert prometheus.text([{**answer, "source_problem": None, "mountpoint": str(source)}]).isascii()


# control


def test_reload_replaces_the_workers_without_errors(serve: Serve) -> None:
    server = serve("--workers", "2")
    before = workers(server)
    with opened(server.mountpoint / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, bytes(LARGE))
        assert llloop("control", server.mountpoint, "reload").code == 0
        server.wait_for_log(r"reloaded")
        after = workers(server)
        assert set(after) == set(before)
        assert set(after.values()).isdisjoint(before.values())
        os.fsync(fd)
        assert os.pread(fd, LARGE, 0) == bytes(LARGE)
    assert status(server)["state"] == "serving"


def test_sighup_reloads_and_reopens_the_log(serve: Serve) -> None:
    server = serve("--workers", "1")
    old = server.log.with_name("log.1")
    server.log.rename(old)
    os.kill(server.pid, signal.SIGHUP)
    assert wait_until(server.log.exists)
    server.wait_for_log("reloaded")
    assert "reload" not in old.read_text()


def test_sighup_of_a_closed_terminal_ends_the_mount(tmp_path: Path) -> None:
    """It does not mean a reload."""
    (tmp_path / "src").mkdir()
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.chdir(tmp_path)
            os.execv(sys.executable, [sys.executable, "-m", "llloop", "serve", "src", "mnt", "--log-file", "log"])
        finally:
            os._exit(99)
    try:
        said = b""
        while b"llloop: serving" not in said:
            said += os.read(terminal, 1000)
        os.kill(pid, signal.SIGHUP)
        assert wait_until(lambda: "reloaded" in (tmp_path / "log").read_text())
        os.close(terminal)
        assert wait_until(lambda: mount_entry(str(mountpoint)) is None)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        kill_session(pid)
        if mount_entry(str(mountpoint)):
            unmount_lazily(str(mountpoint))


def test_stop(serve: Serve) -> None:
    server = serve()
    assert llloop("control", server.mountpoint, "stop").code == 0
    stopped(server)
    server.clean_up()


@pytest.mark.by_workers
def test_log_level_changes_in_each_process(serve: Serve) -> None:
    server = serve("--workers", "1", "--log-level", "error")
    server.expect_log("was killed by signal 9", required=False)
    ask(server, "log-level", level="info")
    server.wait_for_log("level info")
    os.kill(server.pid, signal.SIGUSR1)
    os.statvfs(server.mountpoint)
    if server.via == "own":
        server.wait_for_log("llloop-front: .*slots in use")
    assert llloop("control", server.mountpoint, "log-level", "error").code == 0
    (pid,) = workers(server).values()
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: set(workers(server).values()) not in (set(), {pid}))
    time.sleep(0.3)
    assert "was killed" not in server.log.read_text()


def test_invalid_control_commands(serve: Serve) -> None:
    server = serve()
    for arguments in (["log-level"], ["reload", "debug"], ["nonsense"], ["log-level", "loud"]):
        assert CliRunner().invoke(main, ["control", str(server.mountpoint), *arguments]).exit_code == 2
    with pytest.raises(LlloopError, match="must be one of debug, info"):
        ask(server, "log-level", level=["debug"])
    with pytest.raises(LlloopError, match="unknown command"):
        ask(server, "nonsense")


def test_invalid_messages_to_the_socket_are_harmless(serve: Serve) -> None:
    server = serve("--workers", "1")
    path = socket_of(server)
    assert os.stat(path).st_mode & 0o777 == 0o600
    held = []
    for garbage in (b"", b"\0", b"\xff" * 5000, struct.pack("!I", 9) + b"\xc1" * 9, struct.pack("!I", 4000) + b"half"):
        for _ in range(20):
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(0.2)
            try:
                connection.connect(path)
                connection.send(garbage)
            except OSError:
                connection.close()
                continue
            held.append(connection)
            (server.mountpoint / "file").write_bytes(bytes(LARGE))
    (pid,) = workers(server).values()
    server.expect_log("llloop-worker-0 was killed by signal 9")
    os.kill(pid, signal.SIGKILL)
    # Clients that hold their connections do not block the supervisor.
    assert wait_until(lambda: set(workers(server).values()) not in (set(), {pid}))
    for connection in held:
        connection.close()
    assert wait_until(lambda: status(server)["state"] == "serving")


def test_socket_is_removed_at_the_end(serve: Serve) -> None:
    server = serve()
    path = socket_of(server)
    server.stop()
    assert not os.path.exists(path)


def test_killed_supervisor_leaves_no_socket(serve: Serve) -> None:
    server = serve()
    server.expect_log("the supervisor has died")
    path = socket_of(server)
    assert server.process
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait(30)
    assert wait_until(lambda: server.processes() == [])
    assert not os.path.exists(path)
    server.clean_up()


def test_mount_serves_without_a_control_socket(serve: Serve, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root can always make one in /run/llloop")
    (tmp_path / "llloop").touch()
    server = serve(env={"XDG_RUNTIME_DIR": str(tmp_path)})
    assert status(server)["state"] == "serving", "another place is used"


# Logs


def test_each_process_dumps_its_stacks(serve: Serve) -> None:
    server = serve("--workers", "2", "--log-level", "error")
    os.kill(server.pid, signal.SIGUSR2)
    for role, module in (
        ("supervisor", "supervisor.py"),
        ("front", "front/process.py"),
        ("worker-0", "workers/loop.py"),
        ("worker-1", "workers/loop.py"),
    ):
        server.wait_for_log(rf"stacks of llloop-{role} \(process \d+\):\n[^\n]*Thread|thread.*{module}")
    text = server.log.read_text()
    for part in text.split("stacks of ")[1:]:
        assert 'File "' in part, part
    assert "llloop-front" in text
    (server.mountpoint / "file").write_bytes(bytes(LARGE))


def test_stopped_process_does_not_prevent_other_stack_dumps(serve: Serve) -> None:
    server = serve("--workers", "1")
    (pid,) = workers(server).values()
    stop_process(pid)
    try:
        os.kill(server.pid, signal.SIGUSR2)
        server.wait_for_log(r"stacks of llloop-worker-0 \(process \d+\):\n  no answer; its state is T")
        server.wait_for_log(r"stacks of llloop-front \(process \d+\):\n[^\n]*hread")
    finally:
        os.kill(pid, signal.SIGCONT)


# The service manager


class Manager:
    """Replaces systemd: receives the server's notifications."""

    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(self.address)
        self.heard: list[str] = []

    def has_heard(self, text: str) -> bool:
        while True:
            try:
                self.heard.append(self.socket.recv(65536).decode())
            except BlockingIOError:
                return any(text in message for message in self.heard)

    def hears(self, text: str) -> bool:
        return wait_until(lambda: self.has_heard(text))

    def forget(self) -> None:
        self.has_heard("")
        self.heard.clear()


def test_service_manager_is_notified(serve: Serve, tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    server = serve("--workers", "1", env={"NOTIFY_SOCKET": manager.address})
    assert manager.hears("READY=1")
    assert f"MAINPID={server.pid}" in manager.heard[0]
    assert f"STATUS=serving {server.source} at {server.mountpoint}" in manager.heard[0]
    manager.forget()
    os.kill(server.pid, signal.SIGHUP)
    assert manager.hears("RELOADING=1\nMONOTONIC_USEC=")
    assert manager.hears("READY=1")
    assert not manager.has_heard("WATCHDOG"), "nobody asked for it"
    manager.forget()
    server.stop()
    assert manager.hears("STOPPING=1")
    manager.socket.close()


def test_watchdog_is_notified_only_while_the_front_answers(serve: Serve, tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    server = serve(
        "--workers", "1", "--cache", "never", env={"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "400000"}
    )
    front = ask(server, "stats")["front"]["pid"]
    assert manager.hears("WATCHDOG=1")
    manager.forget()
    assert manager.hears("WATCHDOG=1"), "an idle mount is a healthy one"
    stop_process(front)
    try:
        assert wait_until(lambda: ask(server, "status")["state"] == "not answering")
        manager.forget()
        time.sleep(0.8)  # twice as long as the service manager waits
        assert not manager.has_heard("WATCHDOG=1")
        # The supervisor itself works during this time.
        assert ask(server, "status")["state"] == "not answering"
    finally:
        os.kill(front, signal.SIGCONT)
    manager.forget()
    assert manager.hears("WATCHDOG=1")
    server.stop()
    manager.socket.close()


def test_library_mount_does_not_notify_the_service_manager(tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "mnt").mkdir()
    code = "import llloop, os\nwith llloop.mount('src', 'mnt'):\n    print(os.listdir('mnt'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "NOTIFY_SOCKET": manager.address},
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert not manager.has_heard("")
    manager.socket.close()


@pytest.mark.mounted
def test_idle_server_does_not_wake_up(serve: Serve) -> None:
    server = serve("--workers", "2")
    (server.mountpoint / "file").write_bytes(bytes(LARGE))
    wait_until_quiet(server, 40)


@pytest.mark.mounted
def test_processes_and_log_name_the_mount(serve: Serve) -> None:
    server = serve("--workers", "1")
    titles = {Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0 ") for pid in server.processes()}
    assert {title.partition(" ")[0] for title in titles} >= {"llloop-supervisor", "llloop-worker-0", "llloop-front"}
    assert {title.partition(" ")[2] for title in titles} == {str(server.mountpoint)}
    server.stop()
    lines = server.log.read_text().splitlines()
    served = [line for line in lines if f": serving {server.source} at {server.mountpoint} with 1 worker" in line]
    stopped = [line for line in lines if line.endswith(f": stopped serving {server.source} at {server.mountpoint}")]
    assert len(served) == len(stopped) == 1, lines
    for line in (*served, *stopped):
        assert re.match(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d\S*[+-]\d\d:?\d\d ", line), line
