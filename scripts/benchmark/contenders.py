"""Who takes part: the native directory, llloop on each of its data paths, and the peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import peers
from .tools import TOP, Installer, Unavailable, run

NATIVE = "native"
# What all ratios but those to native are to: a peer that everybody can get, with its defaults.
REFERENCE = "passthrough_ll"

# From source and mount point to the command that serves it in the foreground.
Command = Callable[[Path, Path], list[str]]


@dataclass(frozen=True, slots=True)
class Contender:
    """One that takes part.

    Attributes:
        name: how the report calls it.
        command: how to serve it; None if nothing is to be served: the native directory.
        peer: whether it is one that llloop is compared with.
        remark: what a reader has to know about it.
    """

    name: str
    command: Command | None
    peer: bool = False
    remark: str = ""


@dataclass(slots=True)
class Field:
    """The contenders that can be had here, and why others cannot."""

    contenders: list[Contender] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


# The options of `llloop serve` that each data path takes.
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
    """Make the contenders of these names ready to be mounted.

    Args:
        names: some of `NAMES`.
        installer: installs what they need.
        say: told what is being made ready, since compiling takes a while.
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
    """Return llloop on one of its data paths.

    Args:
        name: of the contender.
        path: one of `PATHS`.
        further: options of `llloop serve`.

    Raises:
        Unavailable: if this version does not have one of them.
    """
    program = TOP / ".venv" / "bin" / "llloop"
    known = run([program, "serve", "--help"])
    options = _OPTIONS[path]
    missing = [option for option in options if option.startswith("--") and option not in known]
    if path == PATHS[0]:
        # The default path is this one, whether or not it can be asked for by name.
        options = [] if missing else options
    elif missing:
        raise Unavailable(f"this version of llloop has no {' and no '.join(missing)}")
    given = [*options, *further]
    return Contender(name, lambda source, mountpoint: [str(program), "serve", *given, str(source), str(mountpoint)])
