"""The contenders: the native directory, llloop with each of its data paths, and the peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import peers
from .tools import TOP, Installer, Unavailable, run

NATIVE = "native"
# The reference of all ratios except those to the native directory: a peer that everybody can install.
REFERENCE = "passthrough_ll"

# Returns the command that serves a source at a mount point in the foreground.
Command = Callable[[Path, Path], list[str]]


@dataclass(frozen=True, slots=True)
class Contender:
    """A file system that is measured.

    Attributes:
        name: its name in the report.
        command: the command that serves it; None for the native directory.
        peer: whether it is a file system to compare llloop with.
        remark: an explanation for readers of the report.
    """

    name: str
    command: Command | None
    peer: bool = False
    remark: str = ""


@dataclass(slots=True)
class Field:
    """The contenders that are available here, and the reasons why others are not."""

    contenders: list[Contender] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


# The options of `llloop serve` for each data path.
_OPTIONS: dict[str, list[str]] = {
    "llloop": ["--io", "workers"],
    "llloop-writeback": ["--io", "workers", "--writeback"],
    "llloop-kernel": ["--io", "kernel"],
}
PATHS = tuple(_OPTIONS)
_PEERS: dict[str, Callable[[Installer], tuple[Command, str]]] = {
    "passthrough_ll": peers.passthrough_ll,
    "passthrough_ll-permissions": peers.passthrough_ll_permissions,
    "passthrough_fh": peers.passthrough_fh,
    "passthrough_hp": peers.passthrough_hp,
    "bindfs": peers.bindfs,
    "mergerfs": peers.mergerfs,
    "go-fuse": peers.go_fuse,
    "llfuse-example": peers.llfuse_example,
}
NAMES = (NATIVE, *PATHS, *_PEERS)


def gather(names: Sequence[str], installer: Installer, say: Callable[[str], None]) -> Field:
    """Install or compile the contenders of these names.

    Args:
        names: some of `NAMES`.
        installer: installs the packages that they need.
        say: prints a progress message, because compiling takes some time.
    """
    found = Field()
    for name in names:
        say(f"making {name} ready")
        try:
            if name == NATIVE:
                found.contenders.append(Contender(name, None))
            elif name in PATHS:
                found.contenders.append(llloop(name, path=name))
            else:
                command, remark = _PEERS[name](installer)
                found.contenders.append(Contender(name, command, peer=True, remark=remark))
        except Unavailable as reason:
            found.skipped[name] = str(reason)
    return found


def llloop(name: str, path: str, further: Sequence[str] = ()) -> Contender:
    """Return llloop with one of its data paths.

    Args:
        name: the name of the contender.
        path: one of `PATHS`.
        further: more options of `llloop serve`.

    Raises:
        Unavailable: this version lacks one of the options.
    """
    program = TOP / ".venv" / "bin" / "llloop"
    known = run([program, "serve", "--help"])
    options = _OPTIONS[path]
    missing = [option for option in options if option.startswith("--") and option not in known]
    if path == PATHS[0]:
        # This is the default path, even in a version without an option for it.
        options = [] if missing else options
    elif missing:
        raise Unavailable(f"this version of llloop has no {' and no '.join(missing)}")
    given = [*options, *further]
    return Contender(name, lambda source, mountpoint: [str(program), "serve", *given, str(source), str(mountpoint)])
