"""Credentials: owners of new files, clearing of set-ID bits, dropped capabilities; each in its own process."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from llloop.linux import syscalls
from llloop.linux.credentials import (
    FILE_CAPABILITIES,
    FRONT_CAPABILITIES,
    WORKER_CAPABILITIES,
    Caller,
    SetidGuard,
    Writer,
    drop_capabilities_except,
)
from tests import as_user
from tests.expect import fails

T = TypeVar("T")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root has anything to give up")
OTHERS = as_user.Caller(uid=65534, gid=65534)


def in_child(action: Callable[[], T]) -> T:
    return as_user.Child(action).result()


def capabilities() -> int:
    return syscalls.get_capabilities()[0]


def ids() -> tuple[str, str]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return status["Uid"].split()[3], status["Gid"].split()[3]


@root_only
def test_set_id_bits_are_cleared_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")

    def modes() -> list[int]:
        guard = SetidGuard()
        found = []
        for clearing in (False, True, True, False, True):
            path.chmod(0o6777)
            guard.clear(clearing)
            with open(path, "r+b") as file:
                file.write(b"y")
            found.append(stat.S_IMODE(path.stat().st_mode))
        return found

    assert in_child(modes) == [0o6777, 0o777, 0o777, 0o6777, 0o777]


@root_only
def test_setid_guard_changes_only_cap_fsetid() -> None:
    def sets() -> list[int]:
        guard = SetidGuard()
        found = [capabilities()]
        for clearing in (True, False):
            guard.clear(clearing)
            found.append(capabilities())
        return found

    before, cleared, after = in_child(sets)
    assert before == after
    assert before ^ cleared == 1 << syscalls.CAP_FSETID


@root_only
def test_setid_guard_makes_no_needless_system_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(syscalls, "set_capabilities", lambda effective, *rest: calls.append(effective))
    guard = SetidGuard()
    for clearing in (False, False, True, True, True, False, False):
        guard.clear(clearing)
    assert len(calls) == 2


def test_setid_guard_of_an_ordinary_user_does_nothing() -> None:
    def clear() -> int:
        guard = SetidGuard()
        for clearing in (True, False, True):
            guard.clear(clearing)
        return capabilities()

    child = as_user.Child(clear, caller=OTHERS) if os.geteuid() == 0 else as_user.Child(clear)
    assert child.result() & 1 << syscalls.CAP_FSETID == 0


@root_only
def test_new_file_belongs_to_the_caller(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)

    def make() -> list[tuple[int, int, int]]:
        caller = Caller(SetidGuard())
        for name, uid, gid, umask in (
            ("a", 4711, 4712, 0o077),
            ("b", 0, 0, 0),
            ("c", 0, 4712, 0o022),
            ("d", 5, 6, 0o022),
        ):
            caller.set_umask(umask)
            with caller(uid, gid):
                os.mkdir(tmp_path / name)
        found = [(tmp_path / name).stat() for name in "abcd"]
        return [(status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) for status in found]

    assert in_child(make) == [(4711, 4712, 0o700), (0, 0, 0o777), (0, 4712, 0o755), (5, 6, 0o755)]


@root_only
def test_credentials_are_restored_after_an_error() -> None:
    def identities() -> list[tuple[tuple[str, str], bool]]:
        caller = Caller(SetidGuard())
        before = capabilities()
        found = [(ids(), capabilities() == before)]
        with pytest.raises(ZeroDivisionError), caller(4711, 4712, (), 0):
            found.append((ids(), capabilities() == before & ~FILE_CAPABILITIES))
            raise ZeroDivisionError
        found.append((ids(), capabilities() == before))
        return found

    assert in_child(identities) == [(("0", "0"), True), (("4711", "4712"), True), (("0", "0"), True)]


@root_only
def test_process_stays_dumpable() -> None:
    """Otherwise workers could no longer fetch descriptors from it (ptrace(2))."""

    def after() -> int:
        with Caller(SetidGuard())(4711, 4712, (), 0):
            pass
        return syscalls.prctl(3)  # PR_GET_DUMPABLE

    assert in_child(after) == 1


@root_only
@pytest.mark.parametrize("clearing", [False, True])
def test_caller_keeps_the_state_of_the_setid_guard(clearing: bool) -> None:
    def change() -> tuple[int, int]:
        guard = SetidGuard()
        guard.clear(clearing)
        before = capabilities()
        with Caller(guard)(4711, 4712, (), 0):
            pass
        return before, capabilities()

    before, after = in_child(change)
    assert before == after


@root_only
def test_source_checks_the_callers_permissions(tmp_path: Path) -> None:
    """Permissions by owner, by group and by capability."""
    own, team = tmp_path / "own", tmp_path / "team"
    for path, uid, gid, mode in ((own, 4711, 0, 0o600), (team, 0, 5000, 0o060)):
        path.touch()
        os.chown(path, uid, gid)
        path.chmod(mode)
    tmp_path.chmod(0o755)
    descriptors = [os.open(path, os.O_PATH) for path in (own, team)]

    def judge() -> list[tuple[tuple[bool, ...], bool]]:
        caller = Caller(SetidGuard())
        found = []
        for uid, groups, given in (
            (4711, (), 0),
            (4713, (5000,), 0),
            (4713, (), 0),
            (4713, (), 1 << syscalls.CAP_DAC_OVERRIDE),
            (4713, (), 1 << syscalls.CAP_FOWNER),
            (0, (), 0),
        ):
            with caller(uid, 4712, groups, given):
                accesses = [syscalls.may_access(fd, os.R_OK | os.W_OK) for fd in descriptors]
                try:
                    syscalls.chmod(descriptors[0], 0o600)
                except PermissionError:
                    found.append((tuple(accesses), False))
                else:
                    found.append((tuple(accesses), True))
        return found

    assert in_child(judge) == [
        ((True, False), True),
        ((False, True), False),
        ((False, False), False),
        ((True, True), False),
        ((False, False), True),
        ((False, False), False),
    ]
    for fd in descriptors:
        os.close(fd)


def test_caller_of_an_ordinary_user_changes_nothing(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)

    descriptor = os.open(tmp_path, os.O_RDONLY)

    def make() -> tuple[int, int]:
        caller = Caller(SetidGuard())
        caller.set_umask(0o027)
        with caller(0, 0, (), 0):
            os.mkdir("dir", dir_fd=descriptor)
        status = os.stat("dir", dir_fd=descriptor)
        return status.st_uid, stat.S_IMODE(status.st_mode)

    try:
        caller = OTHERS if os.geteuid() == 0 else as_user.MYSELF
        uid = OTHERS.uid if os.geteuid() == 0 else os.geteuid()
        assert as_user.run_as(caller, make) == (uid, 0o750)
    finally:
        os.close(descriptor)


@root_only
def test_writer_keeps_its_ids_until_the_next_one() -> None:
    def identities() -> list[tuple[str, str]]:
        found = []
        writer = Writer()
        for uid, gid in ((0, 0), (4711, 4712), (4711, 4712), (0, 4712), (0, 0)):
            writer.assume(uid, gid)
            found.append(ids())
        return [*found, ids()]

    assert in_child(identities) == [
        ("0", "0"),
        ("4711", "4712"),
        ("4711", "4712"),
        ("0", "4712"),
        ("0", "0"),
        ("0", "0"),
    ]


def status_of_this_process() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


def read_by_cat() -> str:
    return subprocess.check_output(["cat", "/proc/self/status"], text=True)


@root_only
@pytest.mark.parametrize("kept", [FRONT_CAPABILITIES, WORKER_CAPABILITIES])
def test_dropped_capabilities_cannot_be_regained(kept: int) -> None:
    def give_up() -> tuple[dict[str, str], str]:
        drop_capabilities_except(kept)
        again = as_user.Child(read_by_cat, caller=as_user.MYSELF).result()
        return status_of_this_process(), again

    before = capabilities()
    status, executed = in_child(give_up)
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(status[name], 16) == before & kept, name
    assert int(status["CapInh"], 16) & ~kept == 0
    assert status["NoNewPrivs"] == "1"
    (gained,) = (int(line.split()[1], 16) for line in executed.splitlines() if line.startswith("CapPrm"))
    assert gained & ~kept == 0, "a program that root executes has all capabilities by itself"


@root_only
def test_cap_sys_resource_is_dropped() -> None:
    """With CAP_SYS_RESOURCE, writes would ignore quotas and reserved blocks."""
    assert (FRONT_CAPABILITIES | WORKER_CAPABILITIES) & 1 << 24 == 0


@root_only
@pytest.mark.parametrize("kept", [FRONT_CAPABILITIES, WORKER_CAPABILITIES])
def test_kept_capabilities_suffice_to_switch_users(tmp_path: Path, kept: int) -> None:
    def act() -> list[int]:
        drop_capabilities_except(kept)
        guard, writer = SetidGuard(), Writer()
        with Caller(guard)(4711, 4712, (), 0):
            os.mkdir(str(kept), dir_fd=directory)
        writer.assume(4713, 4714)
        guard.clear(True)
        guard.clear(False)
        (tmp_path / f"{kept} written").touch()
        return [(tmp_path / name).stat().st_uid for name in (str(kept), f"{kept} written")]

    tmp_path.chmod(0o777)
    directory = os.open(tmp_path, os.O_PATH)
    assert in_child(act) == [4711, 4713]
    os.close(directory)


def test_ordinary_user_only_gets_no_new_privs() -> None:
    def give_up() -> dict[str, str]:
        drop_capabilities_except(FRONT_CAPABILITIES)
        return status_of_this_process()

    child = as_user.Child(give_up, caller=OTHERS) if os.geteuid() == 0 else as_user.Child(give_up)
    status = child.result()
    assert (int(status["CapPrm"], 16), status["NoNewPrivs"]) == (0, "1")


@root_only
def test_raising_a_forbidden_capability_fails() -> None:
    """capset(2) reports an error if a capability is not permitted."""

    def raise_all() -> None:
        syscalls.set_capabilities(0, 0, 0)
        syscalls.set_capabilities(1, 0, 0)

    with fails(1):
        in_child(raise_all)
