"""Every call by which a front can change something is one at which tests kill it; a new call cannot escape them.

`tests/unit/killable_front.py` kills fronts before and after the calls of its list `STEPS`. This test searches the
source code of everything that a front runs for system calls. Each must be in that list, or in the list below of calls
that change nothing that survives the process.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import llloop
from tests.unit.killable_front import STEPS

PACKAGE = Path(llloop.__file__).parent
SYSCALLS = "llloop.linux.syscalls"
# A front runs the code in llloop.front and the modules of these packages that it imports. The rest is configuration.
PACKAGES = ("llloop.front", "llloop.linux", "llloop.shared")

# Modules of which no function calls the operating system in a way that outlives the process.
HARMLESS_MODULES = {
    *("__future__", "array", "bisect", "collections", "collections.abc", "concurrent.futures", "contextlib"),
    *("copy", "ctypes", "dataclasses", "enum", "errno", "functools", "gc", "heapq", "itertools", "logging"),
    *(
        "math",
        "mmap",
        "msgpack",
        "operator",
        "random",
        "re",
        "select",
        "signal",
        "stat",
        "string",
        "struct",
        "sys",
        "termios",
    ),
    *("threading", "time", "types", "typing", "zlib"),
}
# Modules of which each function that is used must be in one of the lists.
CALLING_MODULES = {"builtins", "fcntl", "libc", "llfuse", "os", "resource", "syscall"}

CHANGES_NOTHING = {
    # They only read.
    *("builtins.open", "fcntl.F_GETFL", "libc.fstatfs", "libc.getdents64", "libc.statx", "os.fstat", "os.fstatvfs"),
    *("os.getegid", "os.geteuid", "os.getpid", "os.getppid", "os.getxattr", "os.listdir", "os.listxattr", "os.pread"),
    *("os.preadv", "os.readlink", "os.uname", "resource.getrlimit", "syscall.faccessat2"),
    # They change only this process, and the change ends with it.
    *("libc.capget", "libc.capset", "libc.mlock2", "libc.prctl", "libc.setfsgid", "libc.setfsuid", "libc.unshare"),
    *("os.setgroups", "os.umask", "syscall.setgroups"),
    # The front sets the position of a directory before each call that reads it.
    "os.lseek",
    # It serves requests, whose calls are searched here, too.
    "llfuse.main",
    # The size of a pipe, which is only set when the pipe is created.
    "fcntl.F_SETPIPE_SZ",
    # They order memory accesses, and give the processor to another thread.
    *("syscall.membarrier", "os.sched_yield"),
    # The supervisor makes the memory of the trace, and readers check it.
    *("fcntl.F_ADD_SEALS", "fcntl.F_GET_SEALS", "fcntl.F_SEAL_GROW", "fcntl.F_SEAL_SHRINK"),
}
# Modules that read /proc with other calls than those listed here.
READS_PROC = {("llloop.linux.pidfds", "pathlib"), ("llloop.linux.inotify", "pathlib")}
# Functions that do not call the operating system; of fcntl(2), each command is in the lists.
CALLS_NOTHING = {
    "fcntl.fcntl",
    "os.fsdecode",
    "os.fsencode",
    "os.fspath",
    "os.makedev",
    "os.major",
    "os.minor",
    "os.strerror",
}
# Built-in functions that do.
CALLING_BUILTINS = {"open", "print", "input", "exec", "eval", "__import__"}


def parsed(module: str) -> ast.Module | None:
    """The module's source code, if there is a module of this name."""
    place = PACKAGE.parent.joinpath(*module.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.exists():
            return ast.parse(path.read_text(), str(path))
    return None


def modules_of_a_front() -> dict[str, ast.Module]:
    """All modules that a front imports from PACKAGES."""
    found: dict[str, ast.Module] = {}
    start = [path.relative_to(PACKAGE.parent) for path in (PACKAGE / "front").rglob("*.py")]
    waiting = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in start]
    while waiting:
        name = waiting.pop()
        tree = None if name in found or not name.startswith(PACKAGES) else parsed(name)
        if tree is not None:
            found[name] = tree
            waiting += imported(tree)
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """The full names of what a module imports; of a name that it takes from a module, both."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names_in(tree: ast.AST) -> dict[str, str]:
    """What each name stands for that a module imports."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def used(tree: ast.AST, names: dict[str, str]) -> Iterator[tuple[str, int]]:
    """The full name of each imported thing that is used, or attribute of one, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            yield f"{names[node.value.id]}.{node.attr}", node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            if node.id in names:
                yield names[node.id], node.lineno
            elif node.id in CALLING_BUILTINS:
                yield f"builtins.{node.id}", node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            modes = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
            if not all(isinstance(mode, ast.Constant) and mode.value in ("r", "rb") for mode in modes):
                yield "builtins.open for writing", node.lineno


class Wrappers:
    """What each function of llloop/linux/syscalls.py calls."""

    def __init__(self) -> None:
        tree = parsed(SYSCALLS)
        assert tree is not None
        self._names = {**names_in(tree), "_libc": "libc", "_quick": "libc"}
        self._defined: dict[str, ast.AST] = {}
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self._defined[node.name] = node
            elif isinstance(node, ast.Assign):
                self._defined |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}

    def calls_of(self, name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        """The calls behind a name of the module; numbers of system calls are named by their constants."""
        if name.startswith("_SYS_"):
            return {"syscall." + name.removeprefix("_SYS_").lower()}
        if name in seen or name not in self._defined:
            return set()
        body = self._defined[name]
        found = {call for call, _ in used(body, self._names) if call.partition(".")[0] in CALLING_MODULES}
        for node in ast.walk(body):
            if isinstance(node, ast.Name):
                found |= self.calls_of(node.id, seen | {name})
        return found - {"libc.syscall"}  # the number says which


def is_call(name: str) -> bool:
    """Whether it is a function that is to be in one of the lists, or a command of fcntl(2)."""
    module, _, function = name.rpartition(".")
    if module not in CALLING_MODULES or name in CALLS_NOTHING:
        return False
    if module in ("libc", "syscall", "builtins"):
        return True
    value = getattr(importlib.import_module(module), function)
    return name.startswith("fcntl.F_") or (callable(value) and not isinstance(value, type))


def calls_of_a_front() -> dict[str, str]:
    """Every call of the operating system, and one place where it is made."""
    wrappers = Wrappers()
    found: dict[str, str] = {}
    for module, tree in modules_of_a_front().items():
        if module == SYSCALLS:
            continue
        names = names_in(tree)
        for name, line in used(tree, names):
            calls = wrappers.calls_of(name.rpartition(".")[2]) if name.startswith(f"{SYSCALLS}.") else {name}
            for call in filter(is_call, calls):
                found.setdefault(call, f"{module}, line {line}")
    return found


def test_fronts_are_killed_at_each_call_with_effects() -> None:
    calls = calls_of_a_front()
    assert len(calls) > 40, "the search finds hardly anything"
    escaped = {call: place for call, place in calls.items() if call not in STEPS and call not in CHANGES_NOTHING}
    assert not escaped, (
        f"calls that tests/unit/killable_front.py does not kill a front at: {escaped}. "
        "Add them to its list STEPS, and a request that makes them to test_resent.py; "
        "or, if they change nothing that outlives the process, to CHANGES_NOTHING"
    )


def test_lists_are_disjoint() -> None:
    assert not CHANGES_NOTHING & set(STEPS)


def test_no_module_makes_unlisted_calls() -> None:
    unknown = {
        (name, module)
        for module, tree in modules_of_a_front().items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name
        and not name.startswith("llloop")
        and name not in HARMLESS_MODULES | CALLING_MODULES
        and (module, name) not in READS_PROC
    }
    assert not unknown, f"say of these modules whether what they do outlives the process: {unknown}"
