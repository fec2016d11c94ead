"""The options of a mount. Each field's documentation is also the command's help text."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from llloop import mount_options
from llloop.errors import MountpointError, SourceError, UsageError
from llloop.shared.slots import DEFAULT_SLOTS, MAX_SHARDS

MAX_WORKERS = min(128, MAX_SHARDS)

# virtiofsd and passthrough_ll take a day for "always" too: longer helps nobody.
_DAY = 86400.0


class Cache(str, Enum):
    """How long the kernel may believe what it has been told."""

    NEVER = "never"
    AUTO = "auto"
    ALWAYS = "always"


class LoopKind(str, Enum):
    """Who runs the request loop."""

    OWN = "own"
    LLFUSE = "llfuse"


class IoKind(str, Enum):
    """Who moves the data of open files."""

    WORKERS = "workers"
    KERNEL = "kernel"
    AUTO = "auto"


class MetadataKind(str, Enum):
    """Who meets the source first for a request on names or attributes."""

    FRONT = "front"
    WORKERS = "workers"
    AUTO = "auto"


# What a mount lacks if llfuse runs its loop.
WITHOUT_OWN_LOOP = (
    "POSIX ACLs, fallocate, SEEK_HOLE, flags of renameat2, O_TMPFILE, birth times, and recovery: a worker that hangs "
    "stops the mount, and the death of the front ends it"
)

_TIMEOUTS = {Cache.NEVER: 0.0, Cache.AUTO: 1.0, Cache.ALWAYS: _DAY}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def usable_cpus() -> int:
    """Return the number of CPUs this process may run on (sched_getaffinity(2))."""
    return len(os.sched_getaffinity(0))


# mount(2) takes no longer one: PATH_MAX with what ends the text, and libfuse needs one more.
_LONGEST_FSNAME = 4094


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Everything `llloop serve` and `llloop.mount` can be told about one mount.

    An attribute given as None gets its default, which may depend on others, in `__post_init__`: none stays None.
    """

    source: str
    mountpoint: str
    workers: int = _option(
        None,
        "Number of worker processes that do the data I/O; a file's I/O is always done by the same one. "
        "Default: the number of usable CPUs. More than CPUs helps only where the source waits for disks or a network.",
    )
    read_only: bool = _option(
        False, "Mount read-only: the kernel refuses every change with EROFS; wins over -o rw. Default: off."
    )
    allow_other: bool = _option(
        None,
        "Let users other than the one who mounts use the mount; the kernel checks permissions as it does on the "
        "source. Default: on for root. An ordinary user needs user_allow_other in /etc/fuse.conf, "
        "and then others act with that user's rights on the source.",
    )
    cache: Cache = _option(
        Cache.AUTO,
        "What the kernel may keep. never: nothing; changes made directly in the source are seen at once, and each "
        "access costs a request; only a mapping (mmap) made earlier may show old bytes until the file is opened again. "
        "auto: names and attributes for 1 second, data until a fresh open or a refresh of the "
        "attributes shows another size or time. always: everything for a day; only for a source that nobody else "
        "changes, else old data is shown. Default: auto.",
    )
    io: IoKind = _option(
        IoKind.WORKERS,
        "Who reads and writes open files. workers: the worker processes, each file always the same one. kernel: the "
        "kernel itself, as fast as the source (passthrough; needs root and Linux 6.9; not with --writeback); fails "
        "where that cannot be had. auto: the kernel where it can, else the workers. Risk of kernel: all writes to "
        "a file count as those of the user who opened it first, root loses its reserved blocks for the files of "
        "others, and O_APPEND and O_DIRECT cannot be switched on an open file. Default: workers.",
    )
    writeback: bool = _option(
        False,
        "Let the kernel collect writes and send them later in large pieces: many times faster for small writes. Risk: "
        "while the kernel knows a file, its size and times in the source are not asked for, and what was appended to "
        "it there is hidden and can be overwritten; only for a source nobody else writes to. Data written and not "
        "synced is lost if the machine or the server fails. Not with --io kernel. Default: off.",
    )
    metadata: MetadataKind = _option(
        MetadataKind.AUTO,
        "Who touches the source first for names and attributes. front: the front, which is fastest, and with which a "
        "source that hangs (a dead file server) stops the whole mount. workers: a worker, and the front only when "
        "that has been answered, so that what hangs keeps its own share of requests waiting; every request costs two "
        "wake-ups more. auto: workers where the source is a network or FUSE file system, else front. Default: auto.",
    )
    attr_timeout: float = _option(
        None, "Seconds the kernel may keep attributes (size, mode, times) without asking. Default: as --cache says."
    )
    entry_timeout: float = _option(None, "Seconds the kernel may keep what a name leads to. Default: as --cache says.")
    negative_timeout: float = _option(
        None,
        "Seconds the kernel may keep that a name does not exist; a file made directly in the source stays unseen that "
        "long. Default: as --cache says.",
    )
    xattr: bool = _option(
        True,
        "Pass extended attributes and POSIX ACLs through. Without, programs are told they are not supported, and one "
        "request for each access check is saved. Risk of switching it off: ACLs of the source are not enforced. "
        "Default: on.",
    )
    options: tuple[str, ...] = _option(
        (),
        "Further mount options for libfuse or the kernel, separated by commas: noexec, or as root suid and dev, which "
        "allow set-ID programs and device nodes. Options that exclude each other are refused. Risk of suid and dev: "
        "who can write in the source can become root. "
        "noatime has no effect on the source, whose own mount options decide. Default: none; nosuid,nodev are on.",
    )
    fsname: str = _option(None, "Name of the file system shown by mount(8) and df(1). Default: the source.")
    nonempty: bool = _option(
        False, "Mount over a directory that is not empty; what it holds is hidden until the unmount. Default: off."
    )
    replace_dead: bool = _option(
        False,
        'If the mount point is a dead FUSE mount ("Transport endpoint is not connected"), detach it first. '
        "Default: off.",
    )
    loop: LoopKind = _option(
        LoopKind.OWN,
        "Who runs the request loop. own: llloop. llfuse: the library llfuse, the plain way. Risk of llfuse: it is "
        f"slower, and the mount lacks {WITHOUT_OWN_LOOP}. It excludes --io kernel, --writeback and --metadata workers. "
        "Default: own.",
    )
    slots: int = _option(DEFAULT_SLOTS, "How many requests may be with the workers at a time; for tests.")

    def __post_init__(self) -> None:
        self._check_paths()
        options: Any = self.options
        object.__setattr__(self, "options", mount_options.checked((options,) if isinstance(options, str) else options))
        for name, kind in (("cache", Cache), ("io", IoKind), ("metadata", MetadataKind), ("loop", LoopKind)):
            object.__setattr__(self, name, _member(kind, name, getattr(self, name)))
        defaults = {
            "workers": min(usable_cpus(), MAX_WORKERS),
            "allow_other": os.geteuid() == 0,
            "attr_timeout": _TIMEOUTS[self.cache],
            "entry_timeout": _TIMEOUTS[self.cache],
            "negative_timeout": _TIMEOUTS[self.cache],
            "fsname": _absolute(self.source),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check()

    def _check_paths(self) -> None:
        """Refuse what cannot be a path; an empty one would mean the current directory, which nobody means."""
        for path, kind, what in (
            (self.source, SourceError, "source"),
            (self.mountpoint, MountpointError, "mount point"),
        ):
            if not isinstance(path, str) or not path or "\0" in path:
                raise kind(f"{what} {path!r}: this is not the name of a directory")

    def _check(self) -> None:
        if "ro" in self.options:
            object.__setattr__(self, "read_only", True)
        if type(self.workers) is not int or not 1 <= self.workers <= MAX_WORKERS:
            raise UsageError(f"--workers must be a whole number from 1 to {MAX_WORKERS}, not {self.workers!r}")
        for name in ("read_only", "allow_other", "xattr", "nonempty", "replace_dead", "writeback"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not isinstance(self.fsname, str) or not self.fsname or "\0" in self.fsname:
            raise UsageError(f"--fsname must be a name, not {self.fsname!r}")
        if len(self.fsname) > _LONGEST_FSNAME:
            raise UsageError(f"--fsname may have {_LONGEST_FSNAME} characters at most, not {len(self.fsname)}")
        if self.loop is LoopKind.LLFUSE:
            for unfit, option in (
                (self.io is IoKind.KERNEL, "--io kernel"),
                (self.writeback, "--writeback"),
                (self.metadata is MetadataKind.WORKERS, "--metadata workers"),
            ):
                if unfit:
                    raise UsageError(f"{option} and --loop llfuse exclude each other: llfuse's loop cannot do that")
        if self.writeback and self.io is IoKind.KERNEL:
            raise UsageError("--writeback and --io kernel exclude each other: the kernel has nothing to collect then")
        for name in ("attr_timeout", "entry_timeout", "negative_timeout"):
            seconds: Any = getattr(self, name)
            if type(seconds) not in (int, float) or not (math.isfinite(seconds) and 0 <= seconds <= 2**31):
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} must be a number of seconds from 0 to {2**31}, not {seconds!r}")


def _absolute(path: str) -> str:
    """Return *path* as an absolute one, or as it is where the current directory is gone."""
    try:
        return os.path.abspath(path)
    except OSError:
        return path


def _member(kind: type[Enum], option: str, value: Any) -> Enum:
    """Return the member of *kind* that *value* is or names."""
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(str(member.value) for member in kind)
        raise UsageError(f"--{option} must be one of {known}, not {value!r}") from None


def help_text(name: str) -> str:
    """Return the documentation of the option called *name*."""
    for one in fields(ServeConfig):
        if one.name == name:
            return str(one.metadata["help"])
    raise KeyError(name)
