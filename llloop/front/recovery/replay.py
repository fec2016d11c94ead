"""Answers requests that the kernel sends again and that a dead front had already done.

Most requests can simply be done again. Those that cannot (a second mkdir(2) would fail with EEXIST) are noted before
they are done, see `llloop.front.recovery.intents`. If there is a note of a request, a method of `Replay` checks whether
the request was done. If so, it completes what the dead front may have missed (the inode table, the handle), and
answers. If not, the handler serves the request as usual.

If the front dies here, the note is unchanged, so that its successor does the same.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence

from llloop.front.context import Context
from llloop.front.directory_fds import Reached
from llloop.front.handlers import Handler, Handlers
from llloop.front.handlers.base import Responder
from llloop.front.killpriv import CAPABILITY
from llloop.front.recovery.intents import Intent
from llloop.front.request import FuseRequest
from llloop.front.tree import check_name
from llloop.linux import fuse, syscalls
from llloop.linux.fuse import Opcode
from llloop.linux.syscalls import Attributes, fstatx, statx_or_none

# Answers a request and returns True, or returns False if it was not done.
_Method = Callable[[FuseRequest, Intent], bool]


class Replay(Responder):
    """The methods by opcode.

    Args:
        context: the objects that handlers work on.
        device: a descriptor of /dev/fuse.
        handlers: the handlers for requests that were not done.
    """

    def __init__(self, context: Context, device: int, handlers: Handlers) -> None:
        super().__init__(context, device)
        self._intents = context.intents
        self._mutations = handlers.mutations
        self._opens = handlers.files
        self._directories = handlers.directories
        self._methods: dict[Opcode, _Method] = {
            Opcode.MKNOD: self._make,
            Opcode.MKDIR: self._make,
            Opcode.SYMLINK: self._make,
            Opcode.LINK: self._link,
            Opcode.UNLINK: self._remove,
            Opcode.RMDIR: self._remove,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename,
            Opcode.SETXATTR: self._setxattr,
            Opcode.REMOVEXATTR: self._removexattr,
            Opcode.OPEN: self._open,
            Opcode.OPENDIR: self._opendir,
            Opcode.CREATE: self._create,
            Opcode.TMPFILE: self._tmpfile,
        }

    def before(self, table: Sequence[Handler]) -> list[Handler]:
        """Return handlers by opcode that replay a request if it was done, and otherwise call the one of *table*."""
        replaying = list(table)
        for opcode, method in self._methods.items():
            replaying[opcode] = self._handler(method, table[opcode])
        return replaying

    def _handler(self, method: _Method, serve: Handler) -> Handler:
        def handler(request: FuseRequest) -> None:
            intent = self._intents.of(request.unique)
            if intent is None or not method(request, intent):
                serve(request)

        return handler

    # Names

    def _make(self, request: FuseRequest, intent: Intent) -> bool:
        name = request.string(fuse.NAME_OFFSETS[Opcode(request.opcode)])
        there = self._find(request.nodeid, name)
        if there is None or not intent.made(there):
            return False
        self._reply_entry(request.unique, *self._tree.lookup(request.nodeid, name))
        return True

    def _link(self, request: FuseRequest, intent: Intent) -> bool:
        (nodeid,) = fuse.LINK_REQUEST.unpack_from(self._memory, request.base)
        name = request.string(fuse.LINK_REQUEST.size)
        there = self._find(request.nodeid, name)
        if there is None or not _is_same(there, self._tree.getattr(nodeid)):
            return False
        nodeid, attributes = self._tree.lookup(request.nodeid, name)
        self._tree.note_new_name(nodeid)
        self._reply_entry(request.unique, nodeid, attributes)
        return True

    def _remove(self, request: FuseRequest, intent: Intent) -> bool:
        name = check_name(request.name())
        if not self._is_gone(request.nodeid, name, intent):
            return False
        if intent.has_pin():
            self._tree.note_removed_name(intent.nodeid, request.nodeid, name, intent.pin, fstatx(intent.pin).uid)
        self._send(fuse.error_reply(request.unique, 0))
        return True

    def _rename(self, request: FuseRequest, intent: Intent) -> bool:
        flags = 0
        if request.opcode == Opcode.RENAME2:
            new_parent, flags = fuse.RENAME2_REQUEST.unpack_from(self._memory, request.base)
        else:
            (new_parent,) = fuse.RENAME_REQUEST.unpack_from(self._memory, request.base)
        name, new_name = map(check_name, request.strings(fuse.NAME_OFFSETS[Opcode(request.opcode)]))
        if not intent.done:
            there = self._find(new_parent, new_name)
            if there is None or there.ino != intent.number:
                return False
            if not flags & syscalls.RENAME_EXCHANGE and not self._is_gone(request.nodeid, name, intent):
                return False
        victim, uid = (intent.pin, fstatx(intent.pin).uid) if intent.has_pin() else (None, 0)
        old, new = (request.nodeid, name), (new_parent, new_name)
        self._tree.note_renamed(intent.nodeid, old, new, flags, intent.target, victim, uid)
        self._send(fuse.error_reply(request.unique, 0))
        return True

    def _find(self, parent: int, name: bytes) -> Attributes | None:
        return statx_or_none(self._tree.directory_fds.directory(parent), check_name(name))

    def _is_gone(self, parent: int, name: bytes, intent: Intent) -> bool:
        """Return whether a name was removed or leads to another file than that of the request."""
        there = None if intent.done else self._find(parent, name)
        return there is None or there.ino != intent.number

    # Extended attributes

    def _setxattr(self, request: FuseRequest, intent: Intent) -> bool:
        name, _, flags, _ = self._mutations.setxattr_arguments(request)
        is_new = flags & os.XATTR_CREATE and not intent.number
        if not (intent.done or (is_new and self._tree.has_xattr(request.nodeid, name))):
            return False
        self._send(fuse.error_reply(request.unique, 0))
        return True

    def _removexattr(self, request: FuseRequest, intent: Intent) -> bool:
        name = request.name()
        if not (intent.done or (intent.number and not self._tree.has_xattr(request.nodeid, name))):
            return False
        if name == CAPABILITY:
            self._tree.clears_capability(request.nodeid, request.caller())
        self._send(fuse.error_reply(request.unique, 0))
        return True

    # Open files

    def _open(self, request: FuseRequest, intent: Intent) -> bool:
        number = self._handle_of(intent)
        if number is not None:
            self._opens.reply_open(request, number, fstatx(self._handles.get(number).descriptor))
        return number is not None

    def _opendir(self, request: FuseRequest, intent: Intent) -> bool:
        number = self._handle_of(intent)
        if number is not None:
            self._directories.reply_open(request, number, fstatx(self._handles.get(number).descriptor))
        return number is not None

    def _tmpfile(self, request: FuseRequest, intent: Intent) -> bool:
        number = self._handle_of(intent)
        if number is not None:
            handle = self._handles.get(number)
            self._opens.reply_created(request, number, handle.nodeid, fstatx(handle.descriptor))
        return number is not None

    def _create(self, request: FuseRequest, intent: Intent) -> bool:
        if self._tmpfile(request, intent):
            return True
        flags, *_ = fuse.CREATE_REQUEST.unpack_from(self._memory, request.base)
        name = check_name(request.string(fuse.CREATE_REQUEST.size))
        descriptor = self._made_file(request, name, flags, intent)
        if descriptor is None:
            return False
        created = self._files.add_created(descriptor, request.nodeid, name, flags, request.caller())
        self._opens.reply_created(request, *created)
        return True

    def _handle_of(self, intent: Intent) -> int | None:
        """Return the number of the handle that the request created, or None."""
        self._context.passthrough.drop(intent.backing)
        return intent.handle if intent.handle in self._handles else None

    def _made_file(self, request: FuseRequest, name: bytes, flags: int, intent: Intent) -> int | None:
        """Return a descriptor of the file that the request created, or None if it created none.

        It is one that the dead front left open, if there is one, because not every file can be reopened like at its
        creation.
        """
        directory = self._tree.directory_fds.directory(request.nodeid)
        try:
            pin = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        with Reached(pin, is_path=True, is_own=True):
            there = fstatx(pin)
            # Another process may have created one since, which the requester must not get.
            is_own = stat.S_ISREG(there.mode) and self._tree.permissions.may_have_created(request.caller(), there)
            if not (intent.made(there) and is_own):
                return None
            orphan = self._intents.take_orphan(there)
            if orphan is not None:
                return orphan
            return self._tree.directory_fds.open_again(pin, self._files.source_flags(flags) & ~os.O_NOATIME)[0]


def _is_same(one: Attributes, other: Attributes) -> bool:
    return (one.ino, one.device) == (other.ino, other.device)
