"""Makes the same calls in the mount and in a directory of the source's file system, and compares everything visible."""

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.as_user import MYSELF, Caller, run_as
from tests.server import Tree

# Other names (security.selinux, system.nfs4_acl ...) depend on the machine, not on the test.
_XATTRS = ("user.", "system.posix_acl_", "security.capability")


@dataclass(frozen=True)
class Twins:
    native: Path
    behind: Path
    mounted: Path

    @classmethod
    def of(cls, tree: Tree) -> "Twins":
        """Creates two empty directories in a `tree`, one of them also in the mount."""
        os.mkdir(tree.src / "native")
        os.mkdir(tree.mnt / "mounted")
        for directory in (tree.src / "native", tree.src / "mounted"):
            os.chmod(directory, 0o755)
        return cls(tree.src / "native", tree.src / "mounted", tree.mnt / "mounted")

    def prepare(self, action: Callable[[Path], Any]) -> None:
        """Runs an action on both sides as the test's user; the kernel then has the mount's attributes in its cache."""
        action(self.native)
        action(self.mounted)
        self.compare()

    def both(self, action: Callable[..., Any], *args: Any, caller: Caller = MYSELF) -> Any:
        """Runs an action as `caller` on both sides, checks for equal outcomes and trees, and returns the outcome."""
        expected = run_as(caller, outcome_of, action, self.native, *args)
        actual = run_as(caller, outcome_of, action, self.mounted, *args)
        demand_equal(actual, expected, f"another outcome as {caller}")
        self.compare()
        return expected

    def compare(self) -> None:
        expected = describe(self.native)
        demand_equal(describe(self.behind), expected, "the source differs from the native twin")
        demand_equal(describe(self.mounted), expected, "the mount shows another tree than the native twin")


def demand_equal(found: Any, expected: Any, problem: str) -> None:
    lines = differences({"result": found}, {"result": expected})
    assert not lines, "\n".join([f"{problem}, {len(lines)} times:", *lines[:20]])


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Returns only the differences: pytest's comparison of large trees is slow and unreadable."""
    lines = []
    for name in sorted(found.keys() | expected.keys(), key=str):
        one, other = found.get(name), expected.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            lines += [f"{name}: {line}" for line in differences(one, other)]
        elif one != other:
            lines.append(f"{name} is {one!r}, natively {other!r}")
    return lines


def outcome_of(action: Callable[..., Any], *args: Any) -> Any:
    """Returns the result of a call, or the name of its errno."""
    try:
        return action(*args)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def outcomes(actions: dict[Any, Callable[[], Any]]) -> dict[Any, Any]:
    return {name: outcome_of(action) for name, action in actions.items()}


def describe(root: Path) -> dict[str, dict[str, Any]]:
    """Describes a tree without properties that differ between runs."""
    found = {".": describe_one(root)}
    for directory, names, files in os.walk(root):
        for name in names + files:
            path = Path(directory, name)
            found[str(path.relative_to(root))] = describe_one(path)
    return found


def describe_one(path: Path) -> dict[str, Any]:
    attributes = os.lstat(path)
    found: dict[str, Any] = {
        "mode": oct(attributes.st_mode),
        "owner": (attributes.st_uid, attributes.st_gid),
        "links": attributes.st_nlink,
        "device": attributes.st_rdev,
        "xattrs": {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in sorted(os.listxattr(path, follow_symlinks=False))
            if name.startswith(_XATTRS)
        },
    }
    if stat.S_ISLNK(attributes.st_mode):
        found["target"] = os.readlink(path)
    elif stat.S_ISREG(attributes.st_mode):
        found["size"] = attributes.st_size
        found["bytes"] = path.read_bytes()[:4096]
    return found
