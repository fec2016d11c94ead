"""The role on a host without systemd, which is this machine: all that the role makes is below one directory."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.deploy.playbook import CHECKOUT, Controller, Mount, run_here
from tests.server_processes import wait_until
from tests.watchdog import mount_entry, unmount_lazily

# A play takes some 50 processes, most of them Pythons that start.
pytestmark = pytest.mark.timeout(1800)


def everything_below(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if "ansible" not in path.relative_to(place).parts}


def workers_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"llloop-worker") for child in children)


def is_unmounted(place: str) -> bool:
    return mount_entry(place) is None


class Places:
    """Directories of a host below one directory, so that the machine that runs the tests is not changed."""

    def __init__(self, scratch: Path) -> None:
        self.top = scratch / "host"
        self.top.mkdir()
        for name in ("one", "two"):
            (self.top / f"source-{name}").mkdir()
            (self.top / f"source-{name}" / "file").write_text(f"{name}\n")
        (self.top / "mounted-two").mkdir()

    def variables(self) -> dict[str, str]:
        return {
            "llloop_service_manager": "none",
            "llloop_venv": f"{self.top}/venv",
            "llloop_command_link": f"{self.top}/llloop",
            "llloop_config_dir": f"{self.top}/etc",
            "llloop_state_dir": f"{self.top}/state",
            "llloop_unit_dir": f"{self.top}/units",
            "llloop_run_dir": f"{self.top}/run",
            "llloop_log_dir": f"{self.top}/log",
            "llloop_fuse_conf": f"{self.top}/fuse.conf",
        }

    def mount(self, name: str, **more: object) -> Mount:
        return {"name": name, "source": f"{self.top}/source-{name}", "mountpoint": f"{self.top}/mounted-{name}"} | more

    def pid(self, name: str) -> int:
        return int((self.top / "run" / name / "pid").read_text())

    def read(self, name: str) -> str:
        assert mount_entry(f"{self.top}/mounted-{name}")
        return (self.top / f"mounted-{name}" / "file").read_text()

    def clean_up(self) -> None:
        for file in self.top.glob("run/*/pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)
        for name in ("one", "two"):
            place = f"{self.top}/mounted-{name}"
            if not wait_until(partial(is_unmounted, place)):
                unmount_lazily(place)


@pytest.fixture
def places(scratch: Path) -> Iterator[Places]:
    made = Places(scratch)
    try:
        yield made
    finally:
        made.clean_up()


@pytest.mark.root
def test_host_without_systemd(scratch: Path, places: Places) -> None:
    installation = {"llloop_install_from": "path", "llloop_path": str(CHECKOUT)}
    controller = Controller(str(scratch), scratch, run_here, places.variables() | installation)
    checkout_before = set(os.listdir(CHECKOUT))
    one, two = places.mount("one", workers=1), places.mount("two", workers=1, read_only=True)

    controller.play([one, two])
    assert (places.read("one"), places.read("two")) == ("one\n", "two\n")
    (places.top / "mounted-one" / "written").write_text("through the mount\n")
    assert (places.top / "source-one" / "written").read_text() == "through the mount\n"
    with pytest.raises(OSError, match="Read-only"):
        (places.top / "mounted-two" / "written").write_text("")
    assert set(os.listdir(CHECKOUT)) == checkout_before
    pids = places.pid("one"), places.pid("two")
    assert workers_of(pids[0]) == 1

    # Nothing to do.
    assert controller.play([one, two], "--diff").changed == 0
    assert (places.pid("one"), places.pid("two")) == pids

    # One option of one mount: in check mode it is shown, and nothing is done.
    one["workers"] = 2
    outcome = controller.play([one, two], "--check", "--diff", "--tags=configure,run")
    assert '-LLLOOP_SERVE_WORKERS="1"\n+LLLOOP_SERVE_WORKERS="2"\n' in outcome.text
    assert "mounted-one would be unmounted and mounted again" in outcome.text
    # The environment file and the restart, and no more.
    assert outcome.changed == 2
    assert (places.pid("one"), places.pid("two")) == pids
    # What cannot be served is refused while the old configuration goes on.
    nowhere = places.mount("three", source=f"{places.top}/source-one", mountpoint=f"{places.top}/source-one")
    mistakes = [one | {"workers": 500}, two | {"options": ["ro", "rw"]}, nowhere]
    for mounts, refused in ((mistakes, len(mistakes)), ([one | {"io": "sometimes"}], 0)):
        outcome = controller.play(mounts, "--tags=configure,run", fails=True)
        assert outcome.text.count("failed: [localhost] (item=") == refused, outcome.text
        assert (places.pid("one"), places.pid("two")) == pids
        assert places.read("one") == "one\n"
        assert 'WORKERS="1"' in (places.top / "etc" / "one.env").read_text()
    # Without check mode, that mount is restarted, the other is not.
    controller.play([one, two], "--tags=configure,run")
    assert places.pid("two") == pids[1]
    assert places.pid("one") != pids[0]
    assert workers_of(places.pid("one")) == 2
    assert (places.read("one"), places.read("two")) == ("one\n", "two\n")

    # One mount less; and the other's server was killed, and is started again.
    os.kill(pids[1], signal.SIGKILL)
    controller.play([{"name": "one", "state": "absent"}, two], "--tags=run")
    assert places.read("two") == "two\n"
    assert places.pid("two") != pids[1]
    assert mount_entry(f"{places.top}/mounted-one") is None
    # The role had made this mount point.
    left = {path for path in everything_below(places.top) if not path.startswith(("venv/", "source-"))}
    assert {path for path in left if "one" in path} == {"log/one.log"}
    assert (places.top / "source-one" / "file").read_text() == "one\n"
    # It had not made this one.
    controller.play([{"name": "two", "state": "absent"}], "--tags=run")
    assert mount_entry(f"{places.top}/mounted-two") is None
    assert os.listdir(places.top / "mounted-two") == []
    assert os.listdir(places.top / "etc") == os.listdir(places.top / "run") == []
