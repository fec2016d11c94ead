"""The wheel contains all modules of llloop, with the workers, and nothing else."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from llloop.version import __version__

CHECKOUT = Path(__file__).parents[2]
# pip fetches setuptools for an isolated build, as it does for a user.
pytestmark = pytest.mark.timeout(180)


def modules_of_checkout() -> set[str]:
    """The wheel's paths of all modules: workers/ is installed as llloop/workers/."""
    found = set()
    for top, prefix in (("llloop", "llloop"), ("workers", "llloop/workers")):
        for path in (CHECKOUT / top).rglob("*.py"):
            found.add(f"{prefix}/{path.relative_to(CHECKOUT / top)}")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Use a copy: setuptools builds in the source tree and would also pack files of older builds.
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("llloop", "workers", "tests", "scripts"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in CHECKOUT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_contains_exactly_all_modules(names: set[str]) -> None:
    packed = {name for name in names if not name.startswith(f"llloop-{__version__}.dist-info/")}
    data = {
        *("lib/systemd/system/llloop@.service", "share/man/man1/llloop.1", "share/man/man8/mount.llloop.8"),
        *("share/bash-completion/completions/llloop", "share/zsh/site-functions/_llloop"),
        "share/fish/vendor_completions.d/llloop.fish",
    }
    expected = {"llloop/py.typed", *(f"llloop-{__version__}.data/data/{name}" for name in data)}
    assert packed == modules_of_checkout() | expected


def test_wheel_contains_the_workers(names: set[str]) -> None:
    assert any(name.startswith("llloop/workers/") and not name.endswith("__init__.py") for name in names)


def test_metadata(wheel: Path, names: set[str]) -> None:
    assert wheel.name == f"llloop-{__version__}-py3-none-any.whl"
    info = f"llloop-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = message_from_string(archive.read(f"{info}/METADATA").decode())
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    needed = {line.split(">")[0].strip() for line in metadata.get_all("Requires-Dist", []) if "extra" not in line}
    assert needed == {
        "llfuse",
        "msgpack",
        "click",
        "setproctitle",
        "multiprocessing-logging",
        "rich",
        "prometheus-client",
    }
    assert dict(entry_points["console_scripts"]) == {
        "llloop": "llloop.cli.main:main",
        "mount.llloop": "llloop.cli.mount_helper:main",
    }
    assert any(name.startswith(info) and name.endswith("/LICENSE") for name in names)


def test_unpacked_wheel_runs_without_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys\n"
        # The editable installation of the tests would provide files that the wheel lacks.
        "sys.meta_path = [finder for finder in sys.meta_path if '__editable__' not in str(finder)]\n"
        "import importlib, pkgutil, llloop\n"
        "for module in pkgutil.walk_packages(llloop.__path__, 'llloop.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        print(importlib.import_module(module.name).__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    files = done.stdout.split()
    assert len(files) > 5
    assert all(file.startswith(f"{tmp_path}/llloop/") for file in files), files
