"""The requests that llloop answers itself, decoded from and encoded to the kernel's own structs.

`native_table` is the whole choice of what does not go through libfuse and llfuse, and why:

* READ, WRITE and what else moves or waits for data: so that the loop never waits.
* OPEN, CREATE: llfuse forces KEEP_CACHE, with which old bytes would be read for ever.
* SETATTR, SETXATTR: llfuse drops the flags that say whether set-ID bits go, and UTIME_NOW.
* GETATTR: llfuse drops the handle, without which a file that lost its name behind the mount could not be found.
* READDIRPLUS, FALLOCATE, LSEEK, COPY_FILE_RANGE, RENAME2, TMPFILE, SYNCFS, STATX: libfuse 2.9 does not know them.
* MKNOD, MKDIR, SYMLINK, LINK, UNLINK, RMDIR, RENAME, REMOVEXATTR: what must not be done twice when the kernel sends it
  twice after a front's death, for which the request's number is needed, and llfuse does not tell it.
* LOOKUP, FORGET, OPENDIR, READDIR, RELEASE: they come most often, and cost half as much here.
* GETXATTR, LISTXATTR: the kernel asks for security.capability at the first write and at each chown of a file.
* INTERRUPT: libfuse would wait for a request it never sees. ENOSYS tells the kernel not to send any.
"""

from __future__ import annotations

from collections.abc import Callable

from ...negotiation import Feature
from ...wire import Opcode
from ..mirror import Mirror
from .changes import ChangeRequests
from .directories import DirectoryRequests
from .files import FileRequests
from .names import NameRequests
from .recent import RecentLookups
from .xattrs import XattrRequests

# Takes the position of a request in the arena, and its length.
Handler = Callable[[int, int], None]


def native_table(mirror: Mirror, device: int) -> dict[Opcode, Handler]:
    """Return llloop's own handlers by opcode.

    Args:
        mirror: what they work on.
        device: the descriptor of /dev/fuse.
    """
    recent = RecentLookups(mirror.policy.both_ns)
    names = NameRequests(mirror, device, recent)
    changes = ChangeRequests(mirror, device)
    directories = DirectoryRequests(mirror, device, recent)
    files = FileRequests(mirror, device)
    xattrs = XattrRequests(mirror, device)
    table: dict[Opcode, Handler] = {
        Opcode.LOOKUP: names.lookup,
        Opcode.FORGET: names.forget,
        Opcode.BATCH_FORGET: names.forget,
        Opcode.GETATTR: names.getattr,
        Opcode.SETATTR: names.setattr,
        Opcode.STATX: names.statx,
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
        Opcode.REMOVEXATTR: changes.removexattr,
        Opcode.INTERRUPT: names.interrupt,
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
    }
    if Feature.SETXATTR_EXT in mirror.features:
        table[Opcode.SETXATTR] = changes.setxattr  # libfuse knows only the shorter form
    return table
