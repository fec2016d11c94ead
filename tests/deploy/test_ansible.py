"""The Ansible role is valid."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.deploy.playbook import ANSIBLE, CHECKOUT, COMMANDS, controller_environment

ROLE = ANSIBLE / "roles" / "llloop"
pytestmark = pytest.mark.timeout(900)


def ansible(scratch: Path, *command: str, cwd: Path = ANSIBLE) -> str:
    done = subprocess.run(
        [str(COMMANDS / command[0]), *command[1:]],
        cwd=cwd,
        env=controller_environment(scratch),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_ansible_lint_accepts_the_role(scratch: Path) -> None:
    said = ansible(scratch, "ansible-lint", "--offline", "--nocolor", "--profile", "production", "--strict", ".")
    assert "'production' was required, and it passed" in said


def test_example_playbook_matches_example_inventory(scratch: Path) -> None:
    ansible(scratch, "ansible-playbook", "--syntax-check", "site.yml")
    hosts = ansible(scratch, "ansible-playbook", "--list-hosts", "site.yml")
    assert "files1.example.org" in hosts


def test_defaults_match_argument_specs() -> None:
    defaults = [line.partition(":")[0] for line in (ROLE / "defaults" / "main.yml").read_text().splitlines()]
    named = {line for line in defaults if line.startswith("llloop_")}
    specified = {
        line.strip().rstrip(":")
        for line in (ROLE / "meta" / "argument_specs.yml").read_text().splitlines()
        if line.startswith("      llloop_")
    }
    assert named == specified
    readme = (ANSIBLE / "README.md").read_text()
    assert [name for name in sorted(named) if f"`{name}`" not in readme] == []


def test_role_is_installed_with_ansible_galaxy(scratch: Path) -> None:
    with tarfile.open(scratch / "llloop-role.tar.gz", "w:gz", dereference=True) as archive:
        archive.add(ROLE, arcname="llloop")
    ansible(
        scratch,
        "ansible-galaxy",
        "role",
        "install",
        "--roles-path",
        f"{scratch}/roles",
        "llloop-role.tar.gz,,llloop",
        cwd=scratch,
    )
    unit = scratch / "roles" / "llloop" / "files" / "llloop@.service"
    assert not unit.is_symlink()
    assert unit.read_text() == (CHECKOUT / "scripts" / "systemd" / "llloop@.service").read_text()
