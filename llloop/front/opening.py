"""Opening, creating and closing files and directories."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from llloop.front.descriptor_shares import DIRECTORY_WEIGHT
from llloop.front.directory_fds import DirectoryFds
from llloop.front.inodes import ROOT, Inodes
from llloop.front.killpriv import KillPriv
from llloop.front.nowait import NowaitPolicy
from llloop.front.open_files import Handle, Handles
from llloop.front.passthrough import Passthrough
from llloop.front.requester import Requester
from llloop.front.router import Router
from llloop.front.tree import Tree, check_name
from llloop.front.unsized_files import UnsizedFiles
from llloop.linux.syscalls import Attributes, DirectoryEntry, fstatx, read_directory
from llloop.shared.leadership import Leadership
from llloop.shared.messages import identity_of
from llloop.shared.notifications import expire_attributes

# The caller's open(2) flags that are also used in the source. Not O_APPEND: each WRITE request contains it, so that
# fcntl(F_SETFL) can change it. Not O_TRUNC: the file is truncated only after it is known to be the right one.
_SOURCE_FLAGS = os.O_ACCMODE | os.O_SYNC | os.O_DSYNC | os.O_DIRECT | os.O_NOATIME
# O_NONBLOCK has no effect on regular files. If the name is a FIFO by now, the front must not wait for its other end.
_ALWAYS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


# The flags in the record of a directory's handle.
_DIRECTORY_FLAGS = os.O_DIRECTORY
# The requester of files that the server opens for itself.
_NOBODY = Requester(0, 0)


class Files:
    """Open files and directories.

    Args:
        tree: the file tree.
        handles: the open files and directories.
        router: chooses their workers, and sends releases to them.
        passthrough: the files whose I/O the kernel does itself.
        killpriv: clears set-ID bits on truncation.
        writeback: whether the kernel caches writes. Then it must be able to read files that are open for writing.
        device: a descriptor of /dev/fuse.
        leadership: decides which thread serves.
        closing: a list for descriptors to close later, because closing a file may take long.
    """

    def __init__(
        self,
        tree: Tree,
        handles: Handles,
        router: Router,
        passthrough: Passthrough,
        killpriv: KillPriv,
        writeback: bool,
        device: int,
        leadership: Leadership,
        closing: list[int],
    ) -> None:
        self._call = leadership.call
        self._closing = closing
        self._tree = tree
        self._directory_fds: DirectoryFds = tree.directory_fds
        self._inodes: Inodes = tree.inodes
        self._handles = handles
        self._shares = handles.shares
        self._router = router
        self._passthrough = passthrough
        self._killpriv = killpriv
        self._writeback = writeback
        self._device = device
        self.nowait = NowaitPolicy()
        self._sizes = UnsizedFiles()
        self._root_handle: int | None = None

    def open(self, nodeid: int, flags: int, clear_setid: bool, who: Requester) -> tuple[int, Attributes]:
        """Open a file.

        Args:
            nodeid: its inode.
            flags: the caller's open(2) flags.
            clear_setid: whether O_TRUNC clears set-ID bits.
            who: the caller.

        Returns:
            The handle's number and the file's attributes.
        """
        who.note.begin_open()
        self._shares.ensure_room(who.uid)
        descriptor, attributes = self._open(nodeid, self.source_flags(flags), flags)
        try:
            self._tree.permissions.check_open(who, flags, descriptor, attributes)
            if flags & os.O_TRUNC:
                with self._killpriv.setid_cleared(descriptor, clear_setid, who):
                    if flags & os.O_ACCMODE == os.O_RDONLY:  # Linux truncates also with O_RDONLY
                        self._call(os.truncate, f"/proc/self/fd/{descriptor}", 0)
                    else:
                        self._call(os.ftruncate, descriptor, 0)
                mode = attributes.mode
                attributes = fstatx(descriptor)
                if attributes.mode != mode:  # after OPEN, the kernel only drops its cached size and times
                    expire_attributes(self._device, nodeid)
        except BaseException:
            os.close(descriptor)
            raise
        return self._add(descriptor, nodeid, flags, attributes, who), attributes

    def source_flags(self, flags: int) -> int:
        """Return the open(2) flags in the source for the caller's *flags*."""
        flags = flags & _SOURCE_FLAGS | _ALWAYS
        if self._writeback and flags & os.O_ACCMODE == os.O_WRONLY:
            flags = flags & ~os.O_ACCMODE | os.O_RDWR
        return flags

    def _open(self, nodeid: int, flags: int, wanted: int) -> tuple[int, Attributes]:
        try:
            return self._reopen(nodeid, flags)
        except OSError as error:
            if error.errno == errno.EMFILE:
                self._directory_fds.shrink()
            elif error.errno == errno.EACCES and self._writeback and wanted & os.O_ACCMODE == os.O_WRONLY:
                flags = flags & ~os.O_ACCMODE | os.O_WRONLY  # unreadable for this process; writes of whole pages work
            elif error.errno != errno.EPERM:
                raise
            elif flags & os.O_NOATIME:  # needs ownership, which the caller may have and this process lacks
                flags &= ~os.O_NOATIME
            elif wanted & os.O_APPEND:  # an append-only file (chattr +a) opens for writing only like this
                flags |= os.O_APPEND
            else:
                raise
        return self._reopen(nodeid, flags)

    def _reopen(self, nodeid: int, flags: int) -> tuple[int, Attributes]:
        """Open an inode by name, or by an open descriptor if its names were removed in the source."""
        try:
            return self._directory_fds.open(nodeid, flags)
        except OSError as error:
            handles = self._handles.of_inode(nodeid)
            if error.errno != errno.ESTALE or not handles:
                raise
        return self._directory_fds.open_again(handles[0].descriptor, flags)

    def _add(
        self,
        descriptor: int,
        nodeid: int,
        flags: int,
        attributes: Attributes,
        who: Requester,
        *,
        is_new: bool = False,
    ) -> int:
        handle = self._new_handle(descriptor, nodeid, flags, attributes, (who.uid, who.gid), is_new=is_new)
        who.note.note_handle(self._handles.next_number)  # noted first, because an unknown handle is never released
        return self._handles.add(handle)

    def _new_handle(
        self,
        descriptor: int,
        nodeid: int,
        flags: int,
        attributes: Attributes,
        opener: tuple[int, int],
        *,
        is_new: bool = False,
    ) -> Handle:
        handle = Handle(descriptor, nodeid, self._router.shard_of(nodeid), flags, opener)
        handle.file = identity_of(attributes) if self._inodes.births else 0
        handle.note_mode(attributes)
        handle.unsized = self._sizes.includes(descriptor, attributes, flags, is_new=is_new)
        self.nowait.decide(handle, attributes, flags)
        return handle

    def take_over(
        self, number: int, nodeid: int, descriptor: int, flags: int, opener: int, place: int, left: set[int]
    ) -> Handle:
        """Add an open file of a dead front, whose descriptors have stayed open.

        Args:
            number: the file handle.
            nodeid: the inode.
            descriptor: its descriptor in the dead front.
            flags: the caller's open(2) flags.
            opener: the opener's uid and gid, as in the record.
            place: the place of its record in the journal.
            left: the descriptors that the front has left; this one is removed from it.

        Raises:
            OSError: the descriptor is lost, and the file cannot be reopened.
        """
        wanted = self.source_flags(flags) if flags != _DIRECTORY_FLAGS else _OPEN_DIRECTORY
        if descriptor in left and self._is_usable(descriptor, nodeid, wanted):
            left.discard(descriptor)
            attributes = fstatx(descriptor)
        else:
            found, attributes = self._reopen(nodeid, wanted)
            # Requests that a worker has contain the old number of the descriptor.
            os.dup2(found, descriptor, inheritable=False)
            left.discard(descriptor)
            os.close(found)
        handle = self._new_handle(descriptor, nodeid, flags, attributes, divmod(opener, 1 << 32))
        handle.uncached = True
        self._handles.take_over(number, handle, place)
        return handle

    def _is_usable(self, descriptor: int, nodeid: int, flags: int) -> bool:
        """Return whether a descriptor is one that `_open` would return for this inode and these flags."""
        inode = self._inodes.get(nodeid)
        attributes = fstatx(descriptor)
        opened = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        modes = {flags & os.O_ACCMODE, os.O_WRONLY} if self._writeback else {flags & os.O_ACCMODE}
        return inode.is_same(attributes) and not opened & os.O_PATH and opened & os.O_ACCMODE in modes

    def create(self, parent: int, name: bytes, mode: int, flags: int, who: Requester) -> tuple[int, int, Attributes]:
        """Create and open a file that must not exist.

        The kernel sends CREATE if a name does not exist in its cache, without checking the permissions of a file that
        may exist by now. So this never opens an existing file: ESTALE makes the kernel look up the name again.

        Returns:
            The handle's number, the inode, and its attributes.
        """
        source_flags = self.source_flags(flags) & ~os.O_NOATIME | os.O_CREAT | os.O_EXCL
        mode_bits = stat.S_IMODE(mode)
        check_name(name)
        self._shares.ensure_room(who.uid)
        who.note.begin()
        try:
            descriptor = self._tree.create_as_requester(
                parent, who, lambda at: self._call(os.open, name, source_flags, mode_bits, dir_fd=at), mode_bits
            )
        except FileExistsError:
            number = errno.EEXIST if flags & os.O_EXCL else errno.ESTALE
            raise OSError(number, os.strerror(number)) from None
        return self.add_created(descriptor, parent, name, flags, who)

    def add_created(
        self, descriptor: int, parent: int, name: bytes, flags: int, who: Requester
    ) -> tuple[int, int, Attributes]:
        """Add the file that *descriptor* has created. For the other arguments and the result see `create`."""
        try:
            attributes = fstatx(descriptor)
            nodeid = self._inodes.remember(parent, name, attributes)
        except BaseException:
            os.close(descriptor)
            raise
        return self._add(descriptor, nodeid, flags, attributes, who, is_new=True), nodeid, attributes

    def tmpfile(self, parent: int, mode: int, flags: int, who: Requester) -> tuple[int, int, Attributes]:
        """Create and open an unnamed file (open(2), O_TMPFILE); `Tree.link` can give it a name.

        Returns:
            The handle's number, the inode, and its attributes.
        """
        who.note.begin_open()
        self._shares.ensure_room(who.uid)
        source_flags = self.source_flags(flags) & ~os.O_NOFOLLOW | flags & os.O_EXCL | os.O_TMPFILE
        mode_bits = stat.S_IMODE(mode)
        descriptor = self._tree.create_as_requester(
            parent,
            who,
            lambda at: self._call(os.open, f"/proc/self/fd/{at}", source_flags, mode_bits),
            mode_bits,
        )
        try:
            attributes = fstatx(descriptor)
            pin = os.open(f"/proc/self/fd/{descriptor}", os.O_PATH | os.O_CLOEXEC)
            try:
                nodeid = self._inodes.remember(0, b"", attributes, parent)
            except BaseException:
                os.close(pin)
                raise
        except BaseException:
            os.close(descriptor)
            raise
        self._directory_fds.pins.add(nodeid, pin, attributes.uid)
        return self._add(descriptor, nodeid, flags, attributes, who, is_new=True), nodeid, attributes

    def release(self, number: int) -> None:
        """Close an open file, also in its worker if that may have the descriptor."""
        handle = self._handles.remove(number)
        try:
            if handle.backing:
                self._passthrough.release(handle)
            if handle.in_worker or handle.in_all_workers:
                self._router.release(number, handle)
        finally:
            self._closing.append(handle.descriptor)
            if handle.snapshot >= 0:
                self._closing.append(handle.snapshot)

    def root_handle(self) -> int:
        """Return the number of a handle of the root that stays open, for requests on the whole file system."""
        if self._root_handle is None:
            self._root_handle, _ = self.opendir(ROOT, _NOBODY)
        return self._root_handle

    def opendir(self, nodeid: int, who: Requester) -> tuple[int, Attributes]:
        """Open a directory.

        Args:
            nodeid: its inode.
            who: the requester.

        Returns:
            The handle's number and the directory's attributes.
        """
        who.note.begin_open()
        self._shares.ensure_room(who.uid, DIRECTORY_WEIGHT)
        descriptor, attributes = self._reopen(nodeid, _OPEN_DIRECTORY)
        try:
            self._tree.permissions.check_open(who, os.O_RDONLY, descriptor, attributes)
        except BaseException:
            os.close(descriptor)
            raise
        return self._add(descriptor, nodeid, _DIRECTORY_FLAGS, attributes, who), attributes

    def entries(self, number: int, offset: int) -> list[DirectoryEntry]:
        """Return the entries of an open directory when it was first read; only with `--loop llfuse`.

        Args:
            number: the handle.
            offset: the number of entries already returned; at 0 the directory is read again (rewinddir(3)).
        """
        handle = self._handles.get(number)
        if handle.entries is None or offset == 0:
            device = self._inodes.get(handle.nodeid).device
            entries = read_directory(handle.descriptor)
            handle.entries = self._inodes.with_shown_numbers(device, entries)
        return handle.entries
