"""Files that are opened by a path of which another user may control a part.

Root says ``--pid-file /tmp/llloop.pid``, and any user may have put a symbolic link, a named pipe or a hard link there.
The kernel's own protection (``fs.protected_symlinks`` and its like, proc_sys_fs(5)) covers sticky directories only and
can be off. So the path is walked component by component, with a descriptor for each directory, and what another user
may have put there is refused:

* A directory is *trusted* if it belongs to root or to this user, and is either sticky or writable for its owner only.
* A symbolic link is followed if it lies in a trusted directory and, where that is sticky, belongs to root or this user.
* A file that exists is used under the same condition; in other directories, if it is a regular file of root or this
  user that has one name only.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass

from llloop.linux import syscalls

_MOST_LINKS = 40  # as path_resolution(7) has it
_PROC = 0x9FA0  # PROC_SUPER_MAGIC, <linux/magic.h>
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


@dataclass(frozen=True)
class _Directory:
    """A directory on the way.

    Attributes:
        fd: an O_PATH descriptor of it.
        trusted: whether other users cannot replace what root or this user has put there.
        exclusive: whether they can put nothing there.
    """

    fd: int
    trusted: bool
    exclusive: bool

    @classmethod
    def of(cls, fd: int) -> _Directory:
        kind = os.fstat(fd)
        # In a user namespace root's directories show the overflow user as their owner, as the root directory does.
        known = kind.st_uid in (0, os.geteuid(), os.stat("/").st_uid)
        exclusive = known and not kind.st_mode & 0o022
        return cls(fd, exclusive or (known and bool(kind.st_mode & stat.S_ISVTX)), exclusive)

    def vouches_for(self, kind: os.stat_result) -> bool:
        """Whether no other user can have put here what *kind* describes."""
        return self.exclusive or (self.trusted and kind.st_uid in (0, os.geteuid()))


@dataclass(frozen=True)
class _Place:
    """Where a path leads.

    Attributes:
        directory: holds its last component,
        name: which this is.
        kind: what is there, None if nothing is.
        by_kernel: whether it is one of the links in /proc that only the kernel can follow.
    """

    directory: _Directory
    name: str
    kind: os.stat_result | None
    by_kernel: bool = False


def _problem(text: str) -> OSError:
    return OSError(errno.EPERM, text)


def _owner(kind: os.stat_result) -> str:
    return f"it belongs to user {kind.st_uid}"


class _Walk:
    """The way along one path; all descriptors are closed at its end."""

    def __enter__(self) -> _Walk:
        self._fds: list[int] = []
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.close(fd)

    def open(self, name: str, directory: _Directory | None, flags: int = 0) -> int:
        """Return an O_PATH descriptor of what is called *name* there, that of a link where it is one."""
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=directory.fd if directory else None)
        self._fds.append(fd)
        return fd

    def to(self, path: str) -> _Place:
        """Go to *path*.

        Raises:
            OSError: a directory is missing, or a link on the way is not to be followed.
        """
        start = "/" if path.startswith("/") else "."
        directory = _Directory.of(self.open(start, None, os.O_DIRECTORY))
        left = path.split("/")[::-1]
        links = 0
        while left:
            name = left.pop()
            last = not any(left)
            if name in ("", "."):
                continue
            try:
                fd = self.open(name, directory)
            except FileNotFoundError:
                if last and name != "..":
                    return _Place(directory, name, None)
                raise
            kind = os.fstat(fd)
            if stat.S_ISLNK(kind.st_mode):
                if not directory.vouches_for(kind):
                    raise _problem(f"the symbolic link {name} on the way is not followed: {_owner(kind)}")
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                if syscalls.file_system_type(directory.fd) != _PROC:
                    target = os.readlink("", dir_fd=fd)
                    if target.startswith("/"):
                        directory = _Directory.of(self.open("/", None, os.O_DIRECTORY))
                    left += target.split("/")[::-1]
                    continue
                if last:
                    return _Place(directory, name, os.stat(name, dir_fd=directory.fd), by_kernel=True)
                followed = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory.fd)
                self._fds.append(followed)
                directory = _Directory.of(followed)
            elif not last or name == "..":
                if not stat.S_ISDIR(kind.st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                directory = _Directory.of(fd)
            else:
                return _Place(directory, name, kind)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def is_trusted_directory(path: str, *, sticky: bool = False) -> bool:
    """Whether no user but root and this one can replace the directory *path* or put something into it.

    Args:
        path: an absolute path.
        sticky: whether a directory is good enough in which others can put things, but not replace what is not theirs.
    """
    try:
        with _Walk() as walk:
            place = walk.to(path)
            if place.kind is None or not stat.S_ISDIR(place.kind.st_mode):
                return False
            itself = _Directory.of(walk.open(place.name, place.directory, os.O_DIRECTORY))
            return place.directory.vouches_for(place.kind) and (itself.trusted if sticky else itself.exclusive)
    except OSError:
        return False


def _check(place: _Place) -> None:
    """Refuse a file that another user may have put there.

    Raises:
        OSError: it is refused; the text says why.
    """
    kind = place.kind
    if kind is None or (place.directory.vouches_for(kind) and not _has_other_names(place, kind)):
        return
    if not stat.S_ISREG(kind.st_mode):
        what = _KINDS.get(stat.S_IFMT(kind.st_mode), "no file")
        raise _problem(f"this is {what} that another user may have put there ({_owner(kind)})")
    if kind.st_uid not in (0, os.geteuid()):
        raise _problem(f"{_owner(kind)}, who may have put it there")
    if kind.st_nlink > 1:
        raise _problem("it has several names, and another user may have put this one there (a hard link)")


def _has_other_names(place: _Place, kind: os.stat_result) -> bool:
    return not place.directory.exclusive and stat.S_ISREG(kind.st_mode) and kind.st_nlink > 1


def open_file(path: str, flags: int) -> int:
    """Open a file as os.open(2) does, with O_CLOEXEC, unless another user may have put it there. Never waits for it.

    Raises:
        OSError: it cannot be opened, or is refused.
    """
    with _Walk() as walk:
        place = walk.to(path)
        _check(place)
        if place.kind is not None and stat.S_IFMT(place.kind.st_mode) in (stat.S_IFDIR, stat.S_IFBLK, stat.S_IFSOCK):
            raise _problem(f"this is {_KINDS[stat.S_IFMT(place.kind.st_mode)]}, not a file")
        # A named pipe that nobody reads is refused by O_NONBLOCK (ENXIO), not waited for.
        flags |= os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if place.by_kernel else os.O_NOFOLLOW)
        fd = os.open(place.name, flags, 0o666, dir_fd=place.directory.fd)
        try:
            if not place.by_kernel:  # what was looked at may have been replaced since
                _check(_Place(place.directory, place.name, os.fstat(fd)))
            os.set_blocking(fd, True)
        except BaseException:
            os.close(fd)
            raise
        return fd


def check_appendable(path: str) -> None:
    """Refuse a file that `open_file` could not append to, or could not make; change nothing.

    Raises:
        OSError: see there.
    """
    with _Walk() as walk:
        place = walk.to(path)
        if place.kind is None:
            _check_writable(place.directory)
            return
    os.close(open_file(path, os.O_WRONLY | os.O_APPEND))


def check_replaceable(path: str) -> None:
    """Refuse what `replace_file` would refuse, or could not write; change nothing.

    Raises:
        OSError: see there.
    """
    with _Walk() as walk:
        place = walk.to(path)
        _replaceable(place)
        _check_writable(place.directory)


def _check_writable(directory: _Directory) -> None:
    """Refuse a directory in which this user can make no file."""
    if not os.access(".", os.W_OK | os.X_OK, dir_fd=directory.fd, effective_ids=True):
        read_only = os.fstatvfs(directory.fd).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
        raise OSError(number, os.strerror(number))


def _replaceable(place: _Place) -> None:
    if place.kind is None:
        return
    if place.by_kernel or not stat.S_ISREG(place.kind.st_mode):
        kind = _KINDS.get(stat.S_IFMT(place.kind.st_mode), "a link of /proc")
        raise _problem(f"this is {kind}, not a regular file, and is not replaced")
    _check(place)
    directory = os.fstat(place.directory.fd)
    if directory.st_mode & stat.S_ISVTX and os.geteuid() not in (0, place.kind.st_uid, directory.st_uid):
        raise _problem(f"{_owner(place.kind)}, who alone can replace it in a sticky directory")


def replace_file(path: str, data: bytes) -> None:
    """Put *data* into the regular file *path*, which is made or replaced as a whole: no reader sees half of it.

    Raises:
        OSError: it cannot be written, is no regular file, or another user may have put it there.
    """
    with _Walk() as walk:
        place = walk.to(path)
        _replaceable(place)
        directory = place.directory.fd
        beginning = f".llloop-{secrets.token_hex(8)}"
        fd = os.open(
            beginning, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=directory
        )
        try:
            with open(fd, "wb") as file:
                file.write(data)
            os.rename(beginning, place.name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(beginning, dir_fd=directory)
            raise


def remove_file(path: str, content: bytes) -> None:
    """Remove the regular file *path* if it holds *content*; else, or if it cannot be, leave it alone."""
    with suppress(OSError), _Walk() as walk:
        place = walk.to(path)
        if place.kind is None or place.by_kernel or not stat.S_ISREG(place.kind.st_mode):
            return
        _check(place)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(place.name, flags, dir_fd=place.directory.fd), "rb") as file:
            if file.read(len(content) + 1) == content:
                os.unlink(place.name, dir_fd=place.directory.fd)
