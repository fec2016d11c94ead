"""The handlers of FUSE requests: one method for each opcode. An opcode without a handler gets ENOSYS.

ENOSYS tells the kernel not to send a request of that kind again (fs/fuse, the ``no_`` flags of struct fuse_conn).
"""

from __future__ import annotations

from collections.abc import Callable

from llloop.front.context import Context
from llloop.front.handlers.base import Replies
from llloop.front.handlers.directories import DirectoryRequests
from llloop.front.handlers.files import FileRequests
from llloop.front.handlers.ioctls import IoctlRequests
from llloop.front.handlers.mutations import MutationRequests
from llloop.front.handlers.names import NameRequests
from llloop.front.handlers.recent_lookups import RecentLookups
from llloop.front.handlers.xattrs import XattrRequests
from llloop.front.request import FuseRequest
from llloop.front.views.denials import deny
from llloop.linux import fuse
from llloop.linux.fuse import Opcode

Handler = Callable[[FuseRequest], None]


class Handlers:
    """The handlers of all opcodes.

    Args:
        context: the objects that they work on.
        device: a descriptor of /dev/fuse.

    Attributes:
        table: the handlers by opcode.
        responders: the objects whose methods they are.
    """

    def __init__(self, context: Context, device: int) -> None:
        recent = RecentLookups(context.policy.both_ns)
        self.names = NameRequests(context, device, recent)
        self.mutations = MutationRequests(context, device)
        self.directories = DirectoryRequests(context, device, recent)
        self.files = FileRequests(context, device)
        self.xattrs = XattrRequests(context, device)
        self.ioctls = IoctlRequests(context, device)
        self.responders: tuple[Replies, ...] = (
            self.names,
            self.mutations,
            self.directories,
            self.files,
            self.xattrs,
            self.ioctls,
        )
        self.table: dict[Opcode, Handler] = {
            Opcode.LOOKUP: self.names.lookup,
            Opcode.FORGET: self.names.forget,
            Opcode.BATCH_FORGET: self.names.forget,
            Opcode.GETATTR: self.names.getattr,
            Opcode.SETATTR: self.names.setattr,
            Opcode.STATX: self.names.statx,
            Opcode.READLINK: self.names.readlink,
            Opcode.STATFS: self.names.statfs,
            Opcode.MKNOD: self.mutations.mknod,
            Opcode.MKDIR: self.mutations.mkdir,
            Opcode.SYMLINK: self.mutations.symlink,
            Opcode.LINK: self.mutations.link,
            Opcode.UNLINK: self.mutations.unlink,
            Opcode.RMDIR: self.mutations.rmdir,
            Opcode.RENAME: self.mutations.rename,
            Opcode.RENAME2: self.mutations.rename2,
            Opcode.GETXATTR: self.xattrs.getxattr,
            Opcode.LISTXATTR: self.xattrs.listxattr,
            Opcode.SETXATTR: self.mutations.setxattr,
            Opcode.REMOVEXATTR: self.mutations.removexattr,
            Opcode.OPENDIR: self.directories.opendir,
            Opcode.READDIR: self.directories.readdir,
            Opcode.READDIRPLUS: self.directories.readdirplus,
            Opcode.OPEN: self.files.open,
            Opcode.CREATE: self.files.create,
            Opcode.TMPFILE: self.files.tmpfile,
            Opcode.READ: self.files.read,
            Opcode.WRITE: self.files.write,
            Opcode.RELEASE: self.files.release,
            Opcode.RELEASEDIR: self.directories.releasedir,
            Opcode.FLUSH: self.files.flush,
            Opcode.FSYNC: self.files.fsync,
            Opcode.FSYNCDIR: self.files.fsync,
            Opcode.FALLOCATE: self.files.fallocate,
            Opcode.LSEEK: self.files.lseek,
            Opcode.COPY_FILE_RANGE: self.files.copy_file_range,
            Opcode.SYNCFS: self.files.syncfs,
            Opcode.IOCTL: self.ioctls.ioctl,
        }
        if context.config.deny:
            deny(self.table, context.config.deny, context.tree, context.router.slots.memory)
        if context.heard is not None:
            for opcode in fuse.MAKES_ENTRIES:
                self.table[opcode] = context.heard.before(self.table[opcode])
