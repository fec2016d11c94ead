"""The event relay: a process that makes inotify and fanotify events on the mount for changes in the source.

The kernel makes such events for system calls on the mount, and a FUSE server cannot ask it for others. So the relay
makes system calls on the mount, one for each change in the source. The front recognises the requests and answers them
without any change in the source (`llloop.front.handlers.relayed`).

A program that watches gets the event that it would get in the source:

======================  ===================================================================================
in the source           on the mount
======================  ===================================================================================
create, link, move in   mknod(2) or mkdir(2) of a phantom -> IN_CREATE
remove, move out        unlink(2) or rmdir(2) -> IN_DELETE, IN_DELETE_SELF
rename                  rename(2) -> IN_MOVED_FROM and IN_MOVED_TO with one cookie, IN_MOVE_SELF
write, truncate         utimensat(2) of the mtime -> IN_MODIFY
attributes              utimensat(2) of atime and mtime -> IN_ATTRIB
close after writing     open(2) and close(2) -> IN_OPEN, IN_CLOSE_WRITE
======================  ===================================================================================

The relay works on a detached copy of the mount (open_tree(2)), because a descriptor of the mount itself would make it
busy. The copy keeps the file system alive. So the relay closes it when no event comes for a moment, and when the mount
is unmounted.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from llloop.linux import fuse, syscalls
from llloop.linux.credentials import drop_capabilities_except, restore_process_attributes
from llloop.linux.mount_identity import MountIdentity
from llloop.shared import notifications
from llloop.shared.relay import INODE_QUESTION, RELAY_UID, Answer, Kind, Place, RelayEvent, RelayPipe, RelayState

_log = logging.getLogger(__name__)

_CAPABILITIES = (
    1 << syscalls.CAP_DAC_OVERRIDE  # the kernel checks permissions on the mount
    | 1 << syscalls.CAP_DAC_READ_SEARCH  # open_by_handle_at(2)
    | 1 << syscalls.CAP_FOWNER  # utimensat(2), sticky directories
    | 1 << syscalls.CAP_SYS_ADMIN  # open_tree(2)
    | 1 << syscalls.CAP_SETUID
    | 1 << syscalls.CAP_SETGID
)

# The copy of the mount is closed if no event comes for so long, in milliseconds. Closing it takes some milliseconds.
_IDLE = 100
# How often to try again if a program looks a name up at the same moment.
_ATTEMPTS = 3

_MOST_GENERATIONS = 1024
_DEEPEST = 100  # directories above each other that have lost their names

_ROOT = 1  # FUSE_ROOT_ID
# The handle of a FUSE inode (fs/fuse/inode.c, fuse_encode_fh): nodeid, upper half first, and generation.
_FUSE_HANDLE = struct.Struct("=III")
_FILEID_INO64_GEN = 0x81

_DEAD_DIRECTORY = fuse.ATTR.pack(*(0,) * 9, stat.S_IFDIR, 0, 0, 0, 0, 0, 0)

_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NOW, _OMIT = (0, syscalls.UTIME_NOW), (0, syscalls.UTIME_OMIT)
# Errors after which another attempt, or a phantom, can succeed: another inode has the name, or the kernel has dropped
# what it knew.
_OTHERWISE = frozenset(
    {errno.ESTALE, errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EIO, errno.EBUSY}
)
_ENDED = frozenset({errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV})


@dataclass(frozen=True, slots=True)
class RelaySetup:
    """What the relay inherits from the supervisor.

    Attributes:
        pipe: brings the events.
        state: tells the front what the relay does.
        device: a descriptor of /dev/fuse.
        mount: the mount.
        only_phantoms: whether the relay must not use inodes of the source, because the kernel caches writes to them.
    """

    pipe: RelayPipe
    state: RelayState
    device: int
    mount: MountIdentity
    only_phantoms: bool


def run_relay(setup: RelaySetup) -> None:
    """Relay events until the file system is unmounted."""
    drop_capabilities_except(_CAPABILITIES)
    if not _take_uid():
        _log.warning("programs that watch the mount are not told of changes in the source: the user id cannot be taken")
        while True:
            signal.pause()
    if setup.state.started():
        setup.pipe.empty()
    relay = EventRelay(setup)
    while relay.wait():
        for event in setup.pipe.received():
            relay.tell(event)


def _take_uid() -> bool:
    """Take the file system uid by which fronts recognise the relay; return whether this is certain.

    A user namespace may not have this uid. setfsuid(2) reports no error. With -1 it only returns the current value.
    """
    syscalls.setfsgid(RELAY_UID)
    syscalls.setfsuid(RELAY_UID)
    restore_process_attributes()
    return bool(syscalls.setfsuid(-1) & 0xFFFFFFFF == RELAY_UID)


class EventRelay:
    """Makes the system calls.

    Args:
        setup: see `RelaySetup`.
    """

    def __init__(self, setup: RelaySetup) -> None:
        self._setup = setup
        self._state = setup.state
        self._device = setup.device
        self._tree = -1
        self._mounts = -1
        # The generations of inodes that were needed lately, the latest last.
        self._generations: dict[int, int] = {}
        self._poll = select.poll()
        self._poll.register(setup.pipe.reader, select.POLLIN)
        self._calls: dict[Kind, Callable[[RelayEvent, bool], None]] = {
            Kind.CREATE: self._create,
            Kind.DELETE: self._delete,
            Kind.RENAME: self._rename,
            Kind.MODIFY: self._modify,
            Kind.ATTRIB: self._attrib,
            Kind.CLOSE_WRITE: self._close_write,
        }

    def wait(self) -> bool:
        """Wait for events; return False if no more can come."""
        while True:
            ready = dict(self._poll.poll(_IDLE if self._tree >= 0 else None))
            if (self._mounts in ready and not self._setup.mount.is_reachable()) or not ready:
                self._leave()
            if self._setup.pipe.reader in ready:
                return bool(ready[self._setup.pipe.reader] & select.POLLIN)

    def _enter(self) -> None:
        """Open a copy of the mount, if it is not open.

        Raises:
            OSError: the mount is gone, or aborted.
        """
        if self._tree >= 0:
            return
        self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._poll.register(self._mounts, select.POLLPRI)  # poll(2) reports each change of the mount table once
        path = self._setup.mount.current_path()
        if path is None:
            self._leave()
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        try:
            self._tree = syscalls.clone_mount(path)
            os.fchdir(self._tree)  # open_by_handle_at(2) takes the current directory, but no O_PATH descriptor
        except OSError:
            self._leave()
            raise

    def _leave(self) -> None:
        """Close the copy of the mount."""
        if self._tree >= 0:
            os.chdir("/")
            os.close(self._tree)
        if self._mounts >= 0:
            self._poll.unregister(self._mounts)
            os.close(self._mounts)
        self._tree = self._mounts = -1

    def tell(self, event: RelayEvent) -> None:
        """Make the system call for an event. If it fails, the event is lost."""
        try:
            self._enter()
            known = bool(event.target) and not self._setup.only_phantoms
            if not (known and self._tried(event, True)):
                self._tried(event, False)
        except OSError as error:
            if error.errno not in _ENDED:
                _log.warning("cannot tell the mount of a change in the source: %s", error, extra={"once": "relay"})
        finally:
            self._state.end()

    def _tried(self, event: RelayEvent, known: bool) -> bool:
        """Make the system call, with the inode that the kernel knows or with a phantom; return whether it succeeded."""
        for _ in range(_ATTEMPTS):
            try:
                self._calls[event.kind](event, known)
            except OSError as error:
                if error.errno not in _OTHERWISE:
                    raise
            else:
                return True
        return False

    # The system calls

    def _create(self, event: RelayEvent, known: bool) -> None:
        place = event.place
        with self._directory(place) as directory:
            phantom = self._state.new_phantom()
            self._begin(event, Answer(place, 0))
            if event.is_directory:
                os.mkdir(place.name, dir_fd=directory)
            else:
                os.mknod(place.name, stat.S_IFREG, dir_fd=directory)
        self._drop_phantom(place, phantom)

    def _delete(self, event: RelayEvent, known: bool) -> None:
        with self._directory(event.place) as directory:
            self._begin(event, self._answer(event.place, event.target if known else 0))
            remove = os.rmdir if event.is_directory else os.unlink
            remove(event.place.name, dir_fd=directory)

    def _rename(self, event: RelayEvent, known: bool) -> None:
        old, new = event.place, event.new
        assert new is not None
        with self._directory(old) as old_directory, self._directory(new) as new_directory:
            moved = self._answer(old, event.target if known else 0)
            replaced = Answer(new, 0)
            if event.victim and not self._setup.only_phantoms:
                replaced = self._answer(new, event.victim)
            self._begin(event, moved, replaced)
            os.rename(old.name, new.name, src_dir_fd=old_directory, dst_dir_fd=new_directory)
        if not known:
            self._drop_phantom(new, moved.nodeid)

    def _modify(self, event: RelayEvent, known: bool) -> None:
        with self._object(event, known) as fd:
            syscalls.utimens(fd, _OMIT, _NOW)

    def _attrib(self, event: RelayEvent, known: bool) -> None:
        with self._object(event, known) as fd:
            syscalls.utimens(fd, _NOW, _NOW)

    def _close_write(self, event: RelayEvent, known: bool) -> None:
        place = event.place
        with self._directory(place) as directory:
            answer = self._answer(place, event.target if known else 0)
            if known and not stat.S_ISREG(fuse.ATTR.unpack(answer.attributes)[9]):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))  # opening a FIFO would wake its readers
            self._begin(event, answer)
            os.close(os.open(place.name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory))

    # What they need

    def _drop_phantom(self, place: Place, phantom: int) -> None:
        """Make the kernel drop a phantom. If it does not, the next lookup of the name does."""
        with suppress(OSError):
            notifications.drop_entry_of(self._device, place.parent, place.name, phantom)

    def _begin(self, event: RelayEvent, *answers: Answer) -> None:
        """Tell the front what comes, and make the kernel look the names up."""
        for answer in answers:
            if answer.place.name:
                notifications.expire_entry(self._device, answer.place.parent, answer.place.name)
        self._state.begin(answers, event.is_directory)

    def _answer(self, place: Place, nodeid: int) -> Answer:
        """Return the answer that a name leads to an inode; *nodeid* is 0 for a new phantom."""
        if not nodeid:
            return Answer(place, self._state.new_phantom())
        try:
            fd = self._open(nodeid)
        except OSError as error:
            # The kernel does not open a directory that has lost its name. It is gone in the source, too.
            if error.errno != errno.ESTALE:
                raise
            return Answer(place, nodeid, _DEAD_DIRECTORY)
        try:
            attributes = syscalls.cached_attributes(fd)
        finally:
            os.close(fd)
        return Answer(place, nodeid, fuse.ATTR.pack(*fuse.attribute_fields(attributes.ino, attributes)))

    @contextmanager
    def _directory(self, place: Place) -> Iterator[int]:
        """Open the directory of a name."""
        fd = self._open(place.parent)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open(self, nodeid: int, depth: int = 0) -> int:
        """Open an inode that the kernel knows.

        Args:
            nodeid: the inode.
            depth: how many directories below it have lost their names.

        Raises:
            OSError: ESTALE if the kernel does not know it.
        """
        if nodeid == _ROOT:
            return os.open(".", _PATH | os.O_DIRECTORY)
        generation = self._generations.pop(nodeid, None)
        if generation is not None:
            with suppress(OSError):  # the number was given to another file, or the directory has no name
                return self._open_handle(nodeid, generation)
        generation, place = self._ask(nodeid)
        try:
            return self._open_handle(nodeid, generation)
        except OSError as error:
            if error.errno != errno.ESTALE or not place.name or depth > _DEEPEST:
                raise
        # The kernel opens no directory that has lost its name in its cache. A lookup gives it one.
        parent = self._open(place.parent, depth + 1)
        try:
            os.close(os.open(place.name, _PATH, dir_fd=parent))
        finally:
            os.close(parent)
        return self._open_handle(nodeid, generation)

    def _ask(self, nodeid: int) -> tuple[int, Place]:
        """Return generation and place of an inode.

        Raises:
            OSError: ESTALE if the front does not know it.
        """
        self._state.ask(nodeid)
        with suppress(FileNotFoundError):
            os.lstat(INODE_QUESTION)
        answer = self._state.answered
        if answer is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return answer

    def _open_handle(self, nodeid: int, generation: int) -> int:
        handle = _FUSE_HANDLE.pack(nodeid >> 32, nodeid & 0xFFFFFFFF, generation)
        fd = syscalls.open_by_handle(_FILEID_INO64_GEN, handle, _PATH)
        if len(self._generations) >= _MOST_GENERATIONS:
            self._generations.pop(next(iter(self._generations)))
        self._generations[nodeid] = generation
        return fd

    @contextmanager
    def _object(self, event: RelayEvent, known: bool) -> Iterator[int]:
        """Open the object of an event by its name."""
        place = event.place
        with self._directory(place) as directory:
            if not place.name:
                self._begin(event, self._answer(place, place.parent))
                yield directory
                return
            self._begin(event, self._answer(place, event.target if known else 0))
            fd = os.open(place.name, _PATH, dir_fd=directory)
            try:
                yield fd
            finally:
                os.close(fd)
