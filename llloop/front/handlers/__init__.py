"""The requests of the kernel, decoded from and encoded to its own structs. What is not in the table gets ENOSYS.

ENOSYS tells the kernel not to send a request of that kind again (fs/fuse, the ``no_`` flags of struct fuse_conn). It is
also the answer to INTERRUPT: no request of llloop's can be interrupted.
"""

from __future__ import annotations

from collections.abc import Callable

from llloop.front.context import Context
from llloop.front.handlers.directories import DirectoryRequests
from llloop.front.handlers.file_attributes import FileAttributeRequests
from llloop.front.handlers.files import FileRequests
from llloop.front.handlers.mutations import MutationRequests
from llloop.front.handlers.names import NameRequests
from llloop.front.handlers.recent_lookups import RecentLookups
from llloop.front.handlers.xattrs import XattrRequests
from llloop.front.request import FuseRequest
from llloop.linux.fuse import Opcode

Handler = Callable[[FuseRequest], None]


def handler_table(context: Context, device: int) -> dict[Opcode, Handler]:
    """Return llloop's own handlers by opcode.

    Args:
        mirror: what they work on.
        device: the descriptor of /dev/fuse.
    """
    recent = RecentLookups(context.policy.both_ns)
    names = NameRequests(context, device, recent)
    changes = MutationRequests(context, device)
    directories = DirectoryRequests(context, device, recent)
    files = FileRequests(context, device)
    xattrs = XattrRequests(context, device)
    file_attributes = FileAttributeRequests(context, device)
    return {
        Opcode.LOOKUP: names.lookup,
        Opcode.FORGET: names.forget,
        Opcode.BATCH_FORGET: names.forget,
        Opcode.GETATTR: names.getattr,
        Opcode.SETATTR: names.setattr,
        Opcode.STATX: names.statx,
        Opcode.READLINK: names.readlink,
        Opcode.STATFS: names.statfs,
        Opcode.MKNOD: changes.mknod,
        Opcode.MKDIR: changes.mkdir,
        Opcode.SYMLINK: changes.symlink,
        Opcode.LINK: changes.link,
        Opcode.UNLINK: changes.unlink,
        Opcode.RMDIR: changes.rmdir,
        Opcode.RENAME: changes.rename,
        Opcode.RENAME2: changes.rename2,
        Opcode.GETXATTR: xattrs.getxattr,
        Opcode.LISTXATTR: xattrs.listxattr,
        Opcode.SETXATTR: changes.setxattr,
        Opcode.REMOVEXATTR: changes.removexattr,
        Opcode.OPENDIR: directories.opendir,
        Opcode.READDIR: directories.readdir,
        Opcode.READDIRPLUS: directories.readdirplus,
        Opcode.OPEN: files.open,
        Opcode.CREATE: files.create,
        Opcode.TMPFILE: files.tmpfile,
        Opcode.READ: files.read,
        Opcode.WRITE: files.write,
        Opcode.RELEASE: files.release,
        Opcode.RELEASEDIR: directories.releasedir,
        Opcode.FLUSH: files.flush,
        Opcode.FSYNC: files.fsync,
        Opcode.FSYNCDIR: files.fsync,
        Opcode.FALLOCATE: files.fallocate,
        Opcode.LSEEK: files.lseek,
        Opcode.COPY_FILE_RANGE: files.copy_file_range,
        Opcode.SYNCFS: files.syncfs,
        Opcode.IOCTL: file_attributes.ioctl,
    }
