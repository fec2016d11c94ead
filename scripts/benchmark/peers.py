"""The peers: how to install, compile and run each of them.

Each function returns the command and a remark for the report. It raises `Unavailable` if the peer cannot be installed.
All peers run with their defaults, and with the options that they require or that their documentation recommends.
"""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from .tools import BUILD, HERE, Installer, Unavailable, compiled, run

Command = Callable[[Path, Path], list[str]]

_LIBFUSE_EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")
_GO_SOURCES = Path("/usr/share/gocode/src")


def passthrough_ll(installer: Installer) -> tuple[Command, str]:
    """libfuse's low-level example: the reference."""
    program, version = _libfuse_example(installer, "passthrough_ll.c")
    return lambda source, mountpoint: [program, "-f", "-o", f"source={source}", str(mountpoint)], version


def passthrough_ll_permissions(installer: Installer) -> tuple[Command, str]:
    """The reference with permission checks, which a mirror needs if it serves other users than its owner."""
    program, version = _libfuse_example(installer, "passthrough_ll.c")
    remark = f"{version}, with -o default_permissions"
    return lambda source, mount: [program, "-f", "-o", f"source={source},default_permissions", str(mount)], remark


def passthrough_fh(installer: Installer) -> tuple[Command, str]:
    """libfuse's high-level example."""
    program, version = _libfuse_example(installer, "passthrough_fh.c")
    # It can only mirror the root directory. libfuse's module `subdir` puts the path of the source before each name.
    return lambda source, mountpoint: [program, "-f", "-o", f"modules=subdir,subdir={source}", str(mountpoint)], version


def passthrough_hp(installer: Installer) -> tuple[Command, str]:
    """libfuse's high-performance example. It is written in C++, and only the source package contains it."""
    installer.need("libfuse3-dev", "g++", "pkg-config")
    source = _libfuse_source(installer)
    program = compiled(
        source,
        "passthrough_hp",
        lambda output: ["g++", "-std=c++17", "-O2", "-o", output, source, *_fuse3_flags()],
    )
    version = run(["pkg-config", "--modversion", "fuse3"]).strip()
    kernel_passthrough = "fuse_passthrough_open" in source.read_text()
    return (
        lambda origin, mountpoint: [str(program), "--foreground", str(origin), str(mountpoint)],
        f"libfuse {version}, {'with' if kernel_passthrough else 'without'} kernel passthrough; keeps names for a day",
    )


def bindfs(installer: Installer) -> tuple[Command, str]:
    """bindfs with the options that its manual page recommends for speed."""
    installer.need("bindfs")
    program = _program("bindfs")
    return (
        lambda source, mountpoint: [
            program,
            "-f",
            "--multithreaded",
            "-o",
            "big_writes",
            str(source),
            str(mountpoint),
        ],
        _version(program, "--version"),
    )


def mergerfs(installer: Installer) -> tuple[Command, str]:
    """mergerfs with one branch."""
    installer.need("mergerfs")
    program = _program("mergerfs")
    return lambda source, mountpoint: [program, "-f", str(source), str(mountpoint)], _version(program, "-V")


def go_fuse(installer: Installer) -> tuple[Command, str]:
    """go-fuse's loopback, compiled from Debian's package of the library."""
    installer.need("golang-go", "golang-github-hanwen-go-fuse-dev")
    library = _GO_SOURCES / "github.com" / "hanwen" / "go-fuse"
    if not library.is_dir():
        raise Unavailable(f"{library} is not there")
    # Debian's package lacks the v2 of the import path. A link beside the package provides it.
    workspace = BUILD / "go"
    versioned = workspace / "src" / "github.com" / "hanwen" / "go-fuse" / "v2"
    versioned.parent.mkdir(parents=True, exist_ok=True)
    if not versioned.is_symlink():
        versioned.symlink_to(library)
    environment = [
        "env",
        f"GOPATH={workspace}:{_GO_SOURCES.parent}",
        f"GOCACHE={workspace / 'cache'}",
        "GO111MODULE=off",
        "GOFLAGS=",
    ]
    source = HERE / "loopback.go"
    program = compiled(
        source,
        "go-fuse-loopback",
        lambda output: [*environment, "go", "build", "-o", str(output), str(source)],
    )
    try:
        version = run(["dpkg-query", "-W", "-f", "${Version}", "golang-github-hanwen-go-fuse-dev"])
    except Unavailable:
        version = "unknown version"
    return lambda origin, mountpoint: [str(program), str(origin), str(mountpoint)], version


def llfuse_example(_installer: Installer) -> tuple[Command, str]:
    """The example passthroughfs.py of llfuse's source distribution."""
    import llfuse

    version: str = llfuse.__version__
    script = BUILD / f"llfuse-{version}-passthroughfs.py"
    if not script.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as directory:
            wanted = ["--no-deps", "--no-binary", "llfuse", f"llfuse=={version}"]
            run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", directory, *wanted])
            (archive,) = Path(directory).glob("llfuse-*.tar.gz")
            with tarfile.open(archive) as members:
                inside = members.extractfile(f"llfuse-{version}/examples/passthroughfs.py")
                if inside is None:
                    raise Unavailable(f"no example in {archive.name}")
                script.write_bytes(inside.read())
    return lambda source, mountpoint: [sys.executable, str(script), str(source), str(mountpoint)], f"llfuse {version}"


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise Unavailable(f"no program {name}")
    return path


def _version(program: str, option: str) -> str:
    number = re.search(r"\d+(\.\d+)+", run([program, option]))
    return number.group() if number else "unknown version"


def _fuse3_flags() -> list[str]:
    # libfuse's build defines these for its examples on Linux. Without them, the examples cannot even set a time.
    found = ("COPY_FILE_RANGE", "FALLOCATE", "FDATASYNC", "FSTATAT", "POSIX_FALLOCATE", "SETXATTR", "UTIMENSAT")
    return [
        *(f"-DHAVE_{name}" for name in found),
        *run(["pkg-config", "--cflags", "--libs", "fuse3"]).split(),
        "-pthread",
    ]


def _libfuse_example(installer: Installer, name: str) -> tuple[str, str]:
    installer.need("libfuse3-dev", "gcc", "libc6-dev", "pkg-config")
    source = _LIBFUSE_EXAMPLES / name
    if not source.exists():
        raise Unavailable(f"{source} is not there")
    program = compiled(source, source.stem, lambda output: ["gcc", "-O2", "-o", output, source, *_fuse3_flags()])
    return str(program), f"libfuse {run(['pkg-config', '--modversion', 'fuse3']).strip()}"


def _libfuse_source(installer: Installer) -> Path:
    """Return the path of passthrough_hp.cc. The header that it includes is beside it."""
    folder = BUILD / "libfuse"
    source = folder / "passthrough_hp.cc"
    if source.exists():
        return source
    installer.need("dpkg-dev")
    with tempfile.TemporaryDirectory() as scratch:
        archive = _download_source(Path(scratch), "fuse3")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as members:
            # Write the program last: if it exists, everything else does.
            for name in ("cxxopts.hpp", "passthrough_hp.cc"):
                for member in members.getmembers():
                    if member.name.endswith(f"/example/{name}"):
                        inside = members.extractfile(member)
                        assert inside is not None
                        (folder / name).write_bytes(inside.read())
    if not source.exists():
        raise Unavailable(f"no passthrough_hp.cc in {archive.name}")
    return source


def _download_source(scratch: Path, package: str) -> Path:
    """Download a Debian source package and return its archive.

    On most machines apt is not set up for source packages. So this derives their sources from those of the binary
    packages, and uses its own lists. The settings of the machine do not change.
    """
    parts = scratch / "parts"
    parts.mkdir()
    (scratch / "lists" / "partial").mkdir(parents=True)
    for path in [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]:
        if path.suffix == ".sources":
            text = re.sub(r"(?m)^Types:.*$", "Types: deb-src", path.read_text())
        elif path.suffix == ".list" and path.exists():
            text = re.sub(r"(?m)^deb\s", "deb-src ", path.read_text())
        else:
            continue
        (parts / path.name).write_text(text)
    configuration = scratch / "apt.conf"
    configuration.write_text(
        f'Dir::State::Lists "{scratch}/lists";\n'
        'Dir::Etc::SourceList "/dev/null";\n'
        f'Dir::Etc::SourceParts "{parts}";\n'
        'APT::Sandbox::User "root";\n'
    )
    environment = {"APT_CONFIG": str(configuration)}
    run(["apt-get", "-qq", "update"], environment=environment)
    run(["apt-get", "-qq", "source", "--download-only", package], cwd=scratch, environment=environment)
    for archive in scratch.glob(f"{package}_*.orig.tar.*"):
        if archive.suffix != ".asc":
            return archive
    raise Unavailable(f"no archive in the source package {package}")
