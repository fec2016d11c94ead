"""Mount options, as -o takes them: how they are written, which there are, and which exclude each other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llloop.errors import HostError, UsageError

if TYPE_CHECKING:
    from llloop.config import ServeConfig

# The kernel's own options that libfuse 2.9 hands on (its lib/mount.c), by what excludes what.
_KERNEL_GROUPS = (
    *(("ro", "rw"), ("suid", "nosuid"), ("dev", "nodev"), ("exec", "noexec"), ("sync", "async"), ("atime", "noatime")),
    ("dirsync",),
)
KERNEL = frozenset(option for group in _KERNEL_GROUPS for option in group)
# What mount(8) knows besides and a FUSE mount does nothing with. It must not contradict itself all the same.
_ATIME_GROUPS = (
    ("noatime", "relatime", "strictatime"),
    *(("relatime", "norelatime"), ("strictatime", "nostrictatime"), ("diratime", "nodiratime")),
    ("lazytime", "nolazytime"),
)
WITHOUT_EFFECT = frozenset(option for group in _ATIME_GROUPS for option in group) - KERNEL

_MAX_READ = re.compile(r"max_read=([0-9]+)")
_LARGEST_NUMBER = 2**32 - 1  # the kernel takes it as an unsigned int
# Options of libfuse that llloop sets itself or cannot hold to, and what to do instead.
_REFUSED = {
    "allow_other": "use --allow-other or --no-allow-other",
    # libfuse checks this in its own request loop, which llloop does not use: everybody would be let in.
    "allow_root": "llloop does not support it; use --allow-other or --no-allow-other",
    "auto_unmount": "it is not needed: llloop detaches a mount when its server dies",
    "fsname": "use --fsname NAME",
    "nonempty": "use --nonempty",
    "remount": "llloop cannot change the options of a mount; unmount it, then mount it again",
    "subtype": "llloop sets it itself",
}
# For these an ordinary user's fusermount goes on without a word, as if they had not been given.
_ONLY_ROOT = ("suid", "dev")


def split(text: str) -> list[str]:
    """Split what -o is given at its commas; empty options are left out.

    A comma is part of a value within double quotes, as mount(8) has it, or after a backslash, as libfuse has it.
    """
    parts, part, quoted = [], "", False
    characters = iter(text)
    for character in characters:
        if character == "\\":
            following = next(characters, "")
            part += following if following in ("\\", ",", '"') else character + following
        elif character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            parts.append(part)
            part = ""
        else:
            part += character
    return [one for one in (*parts, part) if one]


def refuse_contradictions(options: Iterable[str]) -> None:
    """Check that no two of *options* exclude each other.

    Raises:
        UsageError: two do. Which of them was meant cannot be known.
    """
    given = list(dict.fromkeys(options))
    sizes = [option for option in given if _MAX_READ.fullmatch(option)]
    for group in (*_KERNEL_GROUPS, *_ATIME_GROUPS, sizes):
        found = [option for option in given if option in group]
        if len(found) > 1:
            raise UsageError(f"mount options {' and '.join(found)} exclude each other; give one of them")


def checked(options: Iterable[str]) -> tuple[str, ...]:
    """Return the options that `ServeConfig` is given, split, each once, in their order.

    Raises:
        UsageError: an option does not exist, cannot be had, or excludes another.
    """
    single = tuple(dict.fromkeys(part for option in options for part in split(option)))
    for option in single:
        name = option.partition("=")[0]
        if name in _REFUSED:
            raise UsageError(f"mount option {option}: {_REFUSED[name]}")
        if not option.isascii():
            raise UsageError(f"mount option {option!r}: it may contain ASCII characters only")
        size = _MAX_READ.fullmatch(option)
        if size is not None and int(size[1]) > _LARGEST_NUMBER:
            raise UsageError(f"mount option {option}: the number must be at most {_LARGEST_NUMBER}")
        if option not in KERNEL and option != "default_permissions" and size is None:
            raise UsageError(
                f"mount option {option}: there is no such option; the options are: "
                + ", ".join(one for group in _KERNEL_GROUPS for one in group)
            )
    refuse_contradictions(single)
    return single


def check_user(config: ServeConfig) -> None:
    """Check that this user may ask for the options.

    Raises:
        HostError: an option is root's.
    """
    if os.geteuid() != 0:
        for option in config.options:
            if option in _ONLY_ROOT:
                raise HostError(f"mount option {option}: only root may use it")


def for_libfuse(config: ServeConfig) -> list[str]:
    """Return all options of a mount in the order in which libfuse is to take them."""
    # libfuse splits options at commas unless they are escaped, and llfuse passes only ASCII.
    fsname = config.fsname.encode("ascii", "replace").decode().replace("\\", "\\\\").replace(",", "\\,")
    options = ["default_permissions", "subtype=llloop", f"fsname={fsname}"]
    # --read-only wins, wherever it and rw come from: mount(8) says rw of everything that is not ro.
    options += [option for option in config.options if option not in ("ro", "rw", "default_permissions")]
    options.append("ro" if config.read_only else "rw")
    if config.allow_other:
        options.append("allow_other")
    if config.nonempty:
        options.append("nonempty")
    return options
