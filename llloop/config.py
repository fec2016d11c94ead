"""The options of a mount. Each field's documentation is also the command's help text."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, TypeVar

from llloop import id_ranges, mount_options
from llloop.errors import MountpointError, SourceError, UsageError
from llloop.linux.id_maps import SAME_IDS, IdMap
from llloop.mode_changes import ModeChange
from llloop.shared.slots import DEFAULT_SLOTS, MAX_SHARDS

MAX_WORKERS = min(128, MAX_SHARDS)

# virtiofsd and passthrough_ll take a day for "always" too: longer helps nobody.
_DAY = 86400.0


class Cache(str, Enum):
    """What the kernel may cache."""

    NEVER = "never"
    AUTO = "auto"
    ALWAYS = "always"


class LoopKind(str, Enum):
    """Which request loop serves the mount."""

    OWN = "own"
    LLFUSE = "llfuse"


class IoKind(str, Enum):
    """Which process reads and writes open files."""

    WORKERS = "workers"
    KERNEL = "kernel"
    AUTO = "auto"


class MetadataKind(str, Enum):
    """Which process accesses the source first for names and attributes."""

    FRONT = "front"
    WORKERS = "workers"
    AUTO = "auto"


class WakeLatency(str, Enum):
    """What llloop does about the time that waking a halted CPU takes."""

    AUTO = "auto"
    HOLD = "hold"
    NEVER = "never"


class Policy(str, Enum):
    """What to do when a program changes owners or modes."""

    IGNORE = "ignore"
    DENY = "deny"
    REAL = "real"


class Denial(str, Enum):
    """What nobody can do in a mount."""

    CREATE = "create"
    DELETE = "delete"
    RENAME = "rename"
    LINK = "link"
    SYMLINK = "symlink"
    XATTR = "xattr"


# What a mount lacks if llfuse runs its loop.
WITHOUT_OWN_LOOP = (
    "POSIX ACLs, fallocate, SEEK_HOLE, flags of renameat2, O_TMPFILE, birth times, and recovery (a worker that hangs "
    "stops the mount, and the death of the front ends it)"
)

_Kind = TypeVar("_Kind", bound=Enum)

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
    """The options of one mount, for `llloop serve` and `llloop.mount`.

    For each attribute that is None, `__post_init__` sets the default. The default can depend on other attributes.
    """

    source: str
    mountpoint: str
    workers: int = _option(
        None,
        "Number of worker processes. Workers read and write the data of files. One worker does all data I/O of one "
        "file. More workers than CPUs help only if the source waits for disks or a network. "
        "Default: the number of usable CPUs.",
    )
    read_only: bool = _option(
        False,
        "Mount read-only. The kernel refuses every change with EROFS. This option overrides -o rw. Default: off.",
    )
    allow_other: bool = _option(
        None,
        "Let all users use the mount. The kernel checks permissions as it does in the source. Default: on for root. "
        "For an ordinary user this needs the line user_allow_other in /etc/fuse.conf. Risk: on an ordinary user's "
        "mount, other users act in the source with that user's rights.",
    )
    cache: Cache = _option(
        Cache.AUTO,
        "What the kernel may cache. never: nothing. The mount shows changes in the source at once, and each "
        "access is a request to llloop. An older mapping (mmap) may show old data until the next open of the "
        "file. Risk of never: if one program writes to a page while another program changes this page through a "
        "mapping, the write can be lost. auto: names and attributes for 1 second, and data. The kernel drops the "
        "data of a file when an open or a refresh of the attributes shows another size or time. always: "
        "everything for a day. Risk of always: if anybody changes the source directly, the mount shows old data. "
        "Default: auto.",
    )
    watch: bool = _option(
        False,
        "Hear of changes that are made directly in the source, and show them in the mount at once. Until then, the "
        "kernel caches names, attributes, data and listings without a time limit. As root with Linux 5.17, llloop uses "
        "fanotify. Otherwise it uses inotify on the directories that the kernel knows, within "
        "fs.inotify.max_user_watches. Where changes cannot be heard, the timeouts of --cache apply. `llloop status` "
        "says which of these is in use. Risk: the mount shows writes through a shared mapping in the source only after "
        "the writer has closed the file. Excludes --loop llfuse. Default: off.",
    )
    events: bool = _option(
        True,
        "With --watch, tell programs that watch the mount (inotify, fanotify) of changes that are made directly in the "
        "source, too. This needs fanotify, that is root. It does not work with --read-only, --map-users and "
        "--map-groups, and not for writes with --io kernel. With --no-events, programs only hear of changes that are "
        "made through the mount. Default: on.",
    )
    io: IoKind = _option(
        IoKind.WORKERS,
        "Which process reads and writes open files. workers: the worker processes. kernel: the kernel itself "
        "(FUSE passthrough), almost as fast as in the source. This needs root and Linux 6.9 and excludes "
        "--writeback. If the kernel cannot do it, llloop does not mount. auto: the kernel if it can, otherwise "
        "the workers. Risk of kernel: all writes to a file count as writes of the user who opened it first. Root "
        "cannot use its reserved blocks for files of other users. Switching O_APPEND or O_DIRECT on an open file "
        "has no effect. Default: workers.",
    )
    writeback: bool = _option(
        False,
        "Let the kernel collect writes and send them later in large requests. Small writes become several times "
        "faster. Use this only if nobody else writes to the source. Risk: while the kernel knows a file, it uses its "
        "own values for size and times. It hides data that somebody appended in the source, and later writes can "
        "overwrite that data. If the machine or the server fails, data that was not synced is lost. Excludes --io "
        "kernel. Default: off.",
    )
    metadata: MetadataKind = _option(
        MetadataKind.AUTO,
        "Which process accesses the source first for names and attributes. front: the front process. This is fastest, "
        "but a source that hangs (a dead file server) stops the whole mount. workers: a worker, and the front after "
        "the worker has finished. A hanging source then blocks only some of the requests. Each request costs two more "
        "wake-ups. auto: workers if the source is on a network or FUSE file system, otherwise front. Default: auto.",
    )
    attr_timeout: float = _option(
        None,
        "For how many seconds the kernel may cache attributes (size, mode, times). Default: set by --cache.",
    )
    entry_timeout: float = _option(
        None, "For how many seconds the kernel may cache which file a name leads to. Default: set by --cache."
    )
    negative_timeout: float = _option(
        None,
        "For how many seconds the kernel may cache that a name does not exist. For that long, the mount may hide "
        "a file that somebody creates directly in the source. Default: set by --cache.",
    )
    xattr: bool = _option(
        True,
        "Support extended attributes and POSIX ACLs. With --no-xattr, programs get the error that the file system "
        "does not support them. This saves requests. Risk of --no-xattr: the mount does not enforce ACLs of the "
        "source. Default: on.",
    )
    map_users: tuple[str, ...] = _option(
        (),
        "SRC:MNT:COUNT. Show the files of COUNT users from SRC on as those of the users from MNT on, and store what "
        "these users create as that of the users from SRC on. SRC and MNT are user ids or names. Give it several "
        "times, or separate values with commas. The files of all other users belong to nobody, and other users "
        "cannot create anything. The kernel does this with an id-mapped mount. It needs root and Linux 6.12. Default: "
        "all users are the same on both sides.",
    )
    map_groups: tuple[str, ...] = _option(
        (), "SRC:MNT:COUNT. The same for groups. Default: all groups are the same on both sides."
    )
    force_user: str = _option(
        "",
        "Show all files as those of this user (a name or an id). Effect: this user has the owner's rights to every "
        "file in the mount, whoever owns it in the source, and the true owners lose them. Risk: the user can read and "
        "change files of others, also those of root. Set-ID bits of files and ACLs are neither shown nor used. Who "
        "lacks the rights for it in the source cannot give files away, set set-ID bits or file flags. Excludes "
        "--map-users and --map-groups. Default: the owners of the source.",
    )
    force_group: str = _option(
        "",
        "Show all files as those of this group. Risk: its members have the group's rights to every file. What "
        "--force-user says of set-ID bits, ACLs and other options applies here, too. Default: the groups of the "
        "source.",
    )
    mode: str = _option(
        "",
        "Show all files and directories with other permissions, such as 0644,a+X or u=rwX,go=rX: the syntax of bindfs "
        "and mostly that of chmod(1). Clauses are separated by commas or colons. X is x for directories and for files "
        "that somebody can execute in the source, D is x for directories, f or d before the sign restrict a clause to "
        "files or directories. Risk: users have the rights that the mount shows, not those of the source. What "
        "--force-user says of set-ID bits, ACLs and other options applies here, too. Default: the permissions of the "
        "source.",
    )
    create_user: str = _option(
        "",
        "Let all new files belong to this user in the source. This needs root. New files get no set-ID bits. Risk: "
        "quotas count the files of all as those of this user. Without --force-user, their creators have only the "
        "rights of other users to them. Excludes --map-users and --map-groups. Default: the user who creates the file.",
    )
    create_group: str = _option(
        "",
        "The same for the group, except in set-group-ID directories, whose group new files get. Default: the group of "
        "the user who creates the file.",
    )
    create_mode: str = _option(
        "",
        "Change the permissions of new files and directories, in the syntax of --mode, after the umask of the program. "
        "Risk: files can get permissions that the program did not want. Default: no change.",
    )
    chown: Policy = _option(
        Policy.REAL,
        "What happens when a program changes the owner or the group of a file. real: they change in the source. "
        "ignore: the call succeeds and changes nothing. deny: it fails with EPERM, also for root. Risk of ignore: a "
        "program takes the change for done. Default: real.",
    )
    chmod: Policy = _option(
        Policy.REAL,
        "The same for changes of the mode and of the access ACL. Default: real.",
    )
    deny: tuple[Denial, ...] = _option(
        (),
        "What fails with EPERM for everybody, also for root; several values are separated by commas. create: new "
        "files, directories, links and other names. delete: to remove a name, also by renaming another file over it. "
        "rename: to rename or move anything. link: hard links. symlink: new symbolic links. xattr: to set or remove "
        "extended attributes and ACLs. None of them protects the content of files. Default: nothing.",
    )
    options: tuple[str, ...] = _option(
        (),
        "Further mount options, separated by commas, such as noexec. Root can give suid and dev, which allow "
        "set-ID programs and device nodes. llloop refuses options that exclude each other. Risk of suid and dev: "
        "anybody who can write to the source can become root. noatime has no effect: the mount options of the "
        "source decide about access times. Default: nosuid,nodev.",
    )
    fsname: str = _option(None, "Name of the file system in the output of mount(8) and df(1). Default: the source.")
    nonempty: bool = _option(
        False,
        "Mount over a directory that is not empty. The mount hides the content of this directory. Default: off.",
    )
    replace_dead: bool = _option(
        False,
        'If the mount point is a dead FUSE mount ("Transport endpoint is not connected"), detach that mount first. '
        "Default: off.",
    )
    wake_latency: WakeLatency = _option(
        WakeLatency.NEVER,
        "What to do about halted CPUs, because waking one takes longer than most requests. never: nothing. auto: while "
        "programs make more than 4,000 requests per second, the front polls for the next one, as long as it measures "
        "that this saves time. If llloop runs as root, the machine has at most 4 CPUs, and its kernel has a cpuidle "
        "driver, no CPU halts meanwhile and for some milliseconds after that (/dev/cpu_dma_latency). hold: like auto, "
        "but on any machine; if this user may not keep CPUs from halting, llloop does not mount. Risk of auto and "
        "hold: CPUs that are kept awake use as much energy as busy ones. In a virtual machine, they take this time "
        "from the host. Default: never.",
    )
    loop: LoopKind = _option(
        LoopKind.OWN,
        "Which request loop serves the mount. own: the loop of llloop. llfuse: the loop of the library llfuse, for "
        f"comparison. Risk of llfuse: it is slower, and the mount lacks {WITHOUT_OWN_LOOP}. It excludes --io kernel, "
        "--writeback, --watch, --metadata workers and all options of views (--map-users to --deny). Default: own.",
    )
    slots: int = _option(DEFAULT_SLOTS, "How many requests the workers may have at the same time; for tests.")

    @property
    def shows_other_attributes(self) -> bool:
        """Whether the mount shows other owners or modes than the source, other than by maps of ids."""
        return bool(self.force_user or self.force_group or self.mode)

    @property
    def id_maps(self) -> tuple[IdMap, IdMap] | None:
        """The maps of users and groups, or None if no ids are mapped."""
        if not self.map_users and not self.map_groups:
            return None
        users, groups = (
            IdMap(tuple(map(id_ranges.parsed, texts))) if texts else SAME_IDS
            for texts in (self.map_users, self.map_groups)
        )
        return users, groups

    def __post_init__(self) -> None:
        self._check_paths()
        options: Any = self.options
        object.__setattr__(self, "options", mount_options.checked((options,) if isinstance(options, str) else options))
        object.__setattr__(self, "map_users", id_ranges.checked(self.map_users, "--map-users", id_ranges.user))
        object.__setattr__(self, "map_groups", id_ranges.checked(self.map_groups, "--map-groups", id_ranges.group))
        for name, number in _IDS.items():
            if getattr(self, name) != "":
                object.__setattr__(self, name, id_ranges.checked_id(getattr(self, name), _flag(name), number))
        for name in ("mode", "create_mode"):
            if getattr(self, name) != "":
                ModeChange(str(getattr(self, name)), _flag(name))
        object.__setattr__(self, "deny", _denials(self.deny))
        for name, kind in _ENUMS.items():
            object.__setattr__(self, name, _member(kind, name, getattr(self, name)))
        timeout = _DAY if self.watch and self.cache is not Cache.NEVER else _TIMEOUTS[self.cache]
        defaults = {
            "workers": min(usable_cpus(), MAX_WORKERS),
            "allow_other": os.geteuid() == 0,
            "attr_timeout": timeout,
            "entry_timeout": timeout,
            "negative_timeout": timeout,
            "fsname": _absolute(self.source),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check()

    def _views(self) -> list[tuple[bool, str]]:
        """Return the options that show or give other owners or modes, and whether each is set."""
        names = ("force_user", "force_group", "mode", "create_user", "create_group", "create_mode")
        return [(getattr(self, name) != "", _flag(name)) for name in names]

    def unheard_timeouts(self) -> tuple[float, float, float]:
        """Return the longest timeouts of entries, attributes and missing names where `watch` does not hear changes."""
        longest = _TIMEOUTS[self.cache]
        return longest, longest, longest

    def _check_paths(self) -> None:
        """Refuse what cannot be a path; an empty one would mean the current directory, which nobody means."""
        for path, kind, what in (
            (self.source, SourceError, "source"),
            (self.mountpoint, MountpointError, "mount point"),
        ):
            if not isinstance(path, str) or not path or "\0" in path:
                raise kind(f"{what} {path!r}: a path must be a non-empty string without null bytes")

    def _check(self) -> None:
        if "ro" in self.options:
            object.__setattr__(self, "read_only", True)
        if type(self.workers) is not int or not 1 <= self.workers <= MAX_WORKERS:
            raise UsageError(f"--workers must be a whole number from 1 to {MAX_WORKERS}, not {self.workers!r}")
        for name in ("read_only", "allow_other", "xattr", "nonempty", "replace_dead", "writeback", "watch", "events"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not isinstance(self.fsname, str) or not self.fsname or "\0" in self.fsname:
            raise UsageError(f"--fsname must be a non-empty string without null bytes, not {self.fsname!r}")
        if len(self.fsname) > _LONGEST_FSNAME:
            raise UsageError(f"--fsname may have at most {_LONGEST_FSNAME} characters, not {len(self.fsname)}")
        if self.loop is LoopKind.LLFUSE:
            for unfit, option in (
                (self.io is IoKind.KERNEL, "--io kernel"),
                (self.writeback, "--writeback"),
                (self.watch, "--watch"),
                (self.metadata is MetadataKind.WORKERS, "--metadata workers"),
                (bool(self.map_users), "--map-users"),
                (bool(self.map_groups), "--map-groups"),
                *self._views(),
                (self.chown is not Policy.REAL, "--chown"),
                (self.chmod is not Policy.REAL, "--chmod"),
                (bool(self.deny), "--deny"),
            ):
                if unfit:
                    raise UsageError(
                        f"{option} and --loop llfuse exclude each other: the loop of llfuse does not support {option}"
                    )
        for maps, map_option in ((self.map_users, "--map-users"), (self.map_groups, "--map-groups")):
            for is_set, option in self._views():
                if maps and is_set:
                    raise UsageError(f"{option} and {map_option} exclude each other; give one of them")
        if self.writeback and self.io is IoKind.KERNEL:
            raise UsageError("--writeback and --io kernel exclude each other; give one of them")
        for name in ("attr_timeout", "entry_timeout", "negative_timeout"):
            seconds: Any = getattr(self, name)
            if type(seconds) not in (int, float) or not (math.isfinite(seconds) and 0 <= seconds <= 2**31):
                raise UsageError(f"{_flag(name)} must be a number of seconds from 0 to {2**31}, not {seconds!r}")


_IDS = {
    "force_user": id_ranges.user,
    "force_group": id_ranges.group,
    "create_user": id_ranges.user,
    "create_group": id_ranges.group,
}
_ENUMS: dict[str, type[Enum]] = {
    "cache": Cache,
    "io": IoKind,
    "metadata": MetadataKind,
    "wake_latency": WakeLatency,
    "loop": LoopKind,
    "chown": Policy,
    "chmod": Policy,
}


def _flag(name: str) -> str:
    """Return the option of the command line that sets the field *name*."""
    return "--" + name.replace("_", "-")


def _absolute(path: str) -> str:
    """Return *path* as an absolute one, or as it is where the current directory is gone."""
    try:
        return os.path.abspath(path)
    except OSError:
        return path


def _member(kind: type[_Kind], option: str, value: Any) -> _Kind:
    """Return the member of *kind* that *value* is or names."""
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(str(member.value) for member in kind)
        raise UsageError(f"{_flag(option)} must be one of {known}, not {value!r}") from None


def _denials(given: Iterable[str] | str) -> tuple[Denial, ...]:
    """Return the members of *given*, texts with one or more names, separated by commas; or a single text."""
    texts = [given] if isinstance(given, str) else given
    names = [one for text in texts for one in (text.value if isinstance(text, Denial) else str(text)).split(",")]
    return tuple(dict.fromkeys(_member(Denial, "deny", name) for name in names))


def help_text(name: str) -> str:
    """Return the documentation of the option called *name*."""
    for one in fields(ServeConfig):
        if one.name == name:
            return str(one.metadata["help"])
    raise KeyError(name)
