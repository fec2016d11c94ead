"""The sdist is complete: it builds what the checkout builds, and its tests run. The installed package is complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from llloop.version import __version__
from tests.conftest import Serve
from tests.mount.command_line import environment

CHECKOUT = Path(__file__).parents[2]
# The files of llloop, also outside of a git checkout.
PARTS = ("llloop", "workers", "tests", "scripts", "docs", ".ci", "setup.cfg", "pyproject.toml")
TEXTS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "LICENSE",
    ".gitignore",
    ".pre-commit-config.yaml",
)
# The build fetches setuptools, as it does for a user.
pytestmark = pytest.mark.timeout(240)


def run(*command: str | Path, cwd: Path | str = "/") -> str:
    done = subprocess.run(
        list(map(str, command)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment({"PYTHONWARNINGS": "default"}),  # the warnings of pip and setuptools are expected
        cwd=cwd,
        timeout=200,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout[-5000:]}"
    return done.stdout


def files_of(directory: Path) -> set[str]:
    found = set()
    for part in (*PARTS, *TEXTS):
        path = directory / part
        inside = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
        found |= {str(one.relative_to(directory)) for one in inside if "__pycache__" not in one.parts}
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean checkout without build results."""
    copy = tmp_path_factory.mktemp("clean") / "checkout"
    for name in files_of(CHECKOUT):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(CHECKOUT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def archive(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist as for a release."""
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, checkout)
    (built,) = out.iterdir()
    assert built.name == f"llloop-{__version__}.tar.gz"
    return built


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as tar:
        tar.extractall(directory)
    return directory / f"llloop-{__version__}"


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the sdist."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", out, unpacked)
    (built,) = out.iterdir()
    return built


@dataclass(frozen=True)
class Installation:
    """A virtual environment that sees llloop's dependencies in this one, but not its llloop."""

    prefix: Path

    @property
    def python(self) -> Path:
        return self.prefix / "bin" / "python"

    def pip_install(self, *arguments: str | Path) -> None:
        # Do not use the llloop of the environment that provides pip and the dependencies.
        run(self.python, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed", *arguments)


def environment_in(prefix: Path) -> Installation:
    venv.create(prefix, symlinks=True)
    made = Installation(prefix)
    (site,) = prefix.glob("lib/python*/site-packages")
    # Python searches the paths in a .pth file, but reads no .pth files there. So it does not find this llloop.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    made = environment_in(tmp_path_factory.mktemp("installed") / "with space")
    made.pip_install(wheel)
    return made


def test_sdist_contains_the_checkout(checkout: Path, unpacked: Path) -> None:
    generated = {"PKG-INFO", *(str(path.relative_to(unpacked)) for path in unpacked.glob("llloop.egg-info/*"))}
    everything = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert everything - generated == files_of(checkout)
    for name in files_of(checkout) - {"setup.cfg"}:  # setuptools writes it again, without its comments
        assert (unpacked / name).read_bytes() == (checkout / name).read_bytes(), name
        assert os.access(unpacked / name, os.X_OK) == os.access(checkout / name, os.X_OK), name


def test_sdist_contains_all_files_of_git(unpacked: Path) -> None:
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={CHECKOUT}", "-C", CHECKOUT, "ls-files", "-z"], capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("these tests run from an sdist themselves")
    assert {name for name in listed.stdout.split("\0") if name and not (unpacked / name).exists()} == set()


def test_sdist_of_the_sdist_is_identical(archive: Path, unpacked: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(unpacked, copy)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, copy)
    with tarfile.open(archive) as first, tarfile.open(tmp_path / archive.name) as second:
        assert sorted(first.getnames()) == sorted(second.getnames())


def test_wheels_of_sdist_and_checkout_are_identical(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path, checkout)
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(tmp_path / wheel.name) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())
        for name in first.namelist():
            assert first.read(name) == second.read(name), name


def test_tests_of_the_sdist_run(unpacked: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sdist"
    shutil.copytree(unpacked, copy)
    made = environment_in(tmp_path / "environment")
    made.pip_install("--editable", copy)
    tests = ["tests/unit/linux/test_fuse.py", "tests/unit/test_manual.py", "tests/mount/test_links.py"]
    said = run(made.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=copy)
    assert " passed" in said.splitlines()[-1]
    assert "failed" not in said


def test_installed_files(installed: Installation) -> None:
    prefix = installed.prefix
    assert run(prefix / "bin" / "llloop", "--version") == f"llloop {__version__}\n"
    assert run(prefix / "bin" / "mount.llloop", "--version") == f"mount.llloop {__version__}\n"
    unit = run(prefix / "bin" / "llloop", "systemd-unit")
    assert f'ExecStart="{prefix}/bin/llloop" serve --replace-dead' in unit.splitlines()
    for name in ("man/man1/llloop.1", "man/man8/mount.llloop.8", "bash-completion/completions/llloop"):
        assert (prefix / "share" / name).is_file()


@pytest.mark.mounted
def test_installed_package_serves(installed: Installation, serve: Serve) -> None:
    server = serve(command=[str(installed.prefix / "bin" / "llloop"), "serve"])
    (server.source / "file").write_text("served")
    assert (server.mountpoint / "file").read_text() == "served"
    loaded = run(installed.python, "-c", "import llloop.workers.loop; print(llloop.workers.loop.__file__)")
    assert loaded.startswith(f"{installed.prefix}/lib/")
