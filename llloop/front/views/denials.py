"""Requests that a mount refuses for everybody (`--deny`).

The handlers of these requests are replaced at the start, so the other requests cost nothing more.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable

from llloop.config import Denial
from llloop.front.killpriv import CAPABILITY
from llloop.front.permissions import not_permitted
from llloop.front.request import FuseRequest
from llloop.front.tree import Tree, check_name
from llloop.linux import fuse, syscalls
from llloop.linux.fuse import Opcode
from llloop.linux.syscalls import statx_or_none

_Handler = Callable[[FuseRequest], None]

_REFUSED: dict[Denial, tuple[Opcode, ...]] = {
    Denial.CREATE: (Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK, Opcode.CREATE, Opcode.TMPFILE),
    Denial.DELETE: (Opcode.UNLINK, Opcode.RMDIR),
    Denial.RENAME: (Opcode.RENAME, Opcode.RENAME2),
    Denial.LINK: (Opcode.LINK,),
    Denial.SYMLINK: (Opcode.SYMLINK,),
    Denial.XATTR: (Opcode.SETXATTR, Opcode.REMOVEXATTR),
}


def deny(table: dict[Opcode, _Handler], denied: Iterable[Denial], tree: Tree, memory: mmap.mmap) -> None:
    """Replace the handlers of requests that are denied.

    Args:
        table: the handlers by opcode.
        denied: what to deny.
        tree: the file tree.
        memory: the memory of the slots.
    """
    original = dict(table)
    for denial in denied:
        for opcode in _REFUSED[denial]:
            table[opcode] = _refuse
    if Denial.XATTR in denied:
        table[Opcode.REMOVEXATTR] = _except_capability(original[Opcode.REMOVEXATTR])
    if Denial.DELETE in denied and Denial.RENAME not in denied:
        for opcode in _REFUSED[Denial.RENAME]:
            table[opcode] = _without_replacing(original[opcode], tree, memory)


def _refuse(request: FuseRequest) -> None:
    raise not_permitted()


def _except_capability(handler: _Handler) -> _Handler:
    """Return a handler of REMOVEXATTR that lets file capabilities go: the kernel asks for that before each write."""

    def remove(request: FuseRequest) -> None:
        (handler if request.name() == CAPABILITY else _refuse)(request)

    return remove


def _without_replacing(handler: _Handler, tree: Tree, memory: mmap.mmap) -> _Handler:
    """Return a handler of renames that refuses to replace a file, because this deletes it."""

    def rename(request: FuseRequest) -> None:
        flags = 0
        if request.opcode == Opcode.RENAME2:
            new_parent, flags = fuse.RENAME2_REQUEST.unpack_from(memory, request.base)
        else:
            (new_parent,) = fuse.RENAME_REQUEST.unpack_from(memory, request.base)
        _, new_name = request.strings(fuse.NAME_OFFSETS[Opcode(request.opcode)])
        directory = tree.directory_fds.directory(new_parent)
        if not flags & syscalls.RENAME_EXCHANGE and statx_or_none(directory, check_name(new_name)) is not None:
            _refuse(request)
        handler(request)

    return rename
