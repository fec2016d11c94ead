"""llloop with faults: `python faulty_server.py TRIGGER serve SRC MNT ...`.

A method named in the file TRIGGER, as "Tree.mkdir", raises what no handler expects, in whichever process it runs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llloop.cli.main import main
from llloop.front.handlers.directories import DirectoryRequests
from llloop.front.opening import Files
from llloop.front.tree import Tree
from llloop.workers.operations import Operations

METHODS: dict[type, tuple[str, ...]] = {
    Tree: (
        "find", "forget", "getattr", "setattr", "readlink", "mknod", "mkdir", "symlink", "link", "unlink", "rmdir",
        "rename", "statfs", "setxattr", "getxattr", "listxattr", "removexattr", "statx_raw",
    ),
    Files: ("open", "create", "tmpfile", "opendir", "entries", "release"),
    DirectoryRequests: ("_listing",),
    Operations: ("_read", "_write", "_fsync", "_fallocate", "_lseek", "_copy_file_range"),
}  # fmt: skip


def with_fault(name: str, method: Callable[..., Any], trigger: Path) -> Callable[..., Any]:
    @functools.wraps(method)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        if name in trigger.read_text().split():
            raise RuntimeError(f"injected into {name}")
        return method(*args, **kwargs)

    return faulty


if __name__ == "__main__":
    trigger_file = Path(sys.argv.pop(1))
    for owner, names in METHODS.items():
        for method_name in names:
            original = getattr(owner, method_name)
            setattr(owner, method_name, with_fault(f"{owner.__name__}.{method_name}", original, trigger_file))
    main()
