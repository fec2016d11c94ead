"""Opening, replacing and removing files by a path of which another user may control a part.

If root gives ``--pid-file /tmp/llloop.pid``, any user may have put a symbolic link, a named pipe or a hard link there.
The kernel's protection (``fs.protected_symlinks`` and similar, proc_sys_fs(5)) covers sticky directories only and can
be disabled. So this module resolves the path component by component, with a descriptor for each directory, and
refuses what another user may have put there:

* A directory is *trusted* if it belongs to root or this user, and is sticky or writable for its owner only.
* It follows a symbolic link in a trusted directory. If the directory is sticky, the link must belong to root or this
  user.
* It uses an existing file under the same conditions. In an untrusted directory, the file must be a regular file of
  root or this user with a single hard link.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass

from llloop.linux import syscalls

_MOST_LINKS = 40  # the kernel's limit, path_resolution(7)
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
    """A directory on the path.

    Attributes:
        fd: an O_PATH descriptor.
        trusted: whether other users cannot replace files of root and this user in it.
        exclusive: whether other users cannot create files in it.
    """

    fd: int
    trusted: bool
    exclusive: bool

    @classmethod
    def of(cls, fd: int) -> _Directory:
        status = os.fstat(fd)
        # In a user namespace, stat(2) shows root's directories, "/" among them, as owned by the overflow user.
        known = status.st_uid in (0, os.geteuid(), os.stat("/").st_uid)
        exclusive = known and not status.st_mode & 0o022
        return cls(fd, exclusive or (known and bool(status.st_mode & stat.S_ISVTX)), exclusive)

    def vouches_for(self, status: os.stat_result) -> bool:
        """Return whether only root or this user can have put the file *status* into this directory."""
        return self.exclusive or (self.trusted and status.st_uid in (0, os.geteuid()))


@dataclass(frozen=True)
class _ResolvedPath:
    """A resolved path.

    Attributes:
        directory: the directory of the last component.
        name: the last component.
        status: the file's status, None if there is no such file.
        by_kernel: whether it is a magic link in /proc, which only the kernel can follow (symlink(7)).
    """

    directory: _Directory
    name: str
    status: os.stat_result | None
    by_kernel: bool = False


def _problem(text: str) -> OSError:
    return OSError(errno.EPERM, text)


def _owner(status: os.stat_result) -> str:
    return f"it belongs to user {status.st_uid}"


class _Walk:
    """Resolves one path; closes all descriptors at the end of the ``with`` block."""

    def __enter__(self) -> _Walk:
        self._fds: list[int] = []
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.close(fd)

    def open(self, name: str, directory: _Directory | None, flags: int = 0) -> int:
        """Return an O_PATH descriptor of *name* in *directory*, of a symbolic link itself.

        Args:
            name: one component, "/" or ".".
            directory: None for "/" and ".".
            flags: further O_ flags.
        """
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=directory.fd if directory else None)
        self._fds.append(fd)
        return fd

    def to(self, path: str) -> _ResolvedPath:
        """Resolve *path*.

        Raises:
            OSError: a directory is missing, or another user may have put a symbolic link on the path there.
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
                    return _ResolvedPath(directory, name, None)
                raise
            status = os.fstat(fd)
            if stat.S_ISLNK(status.st_mode):
                if not directory.vouches_for(status):
                    raise _problem(f"llloop does not follow the symbolic link {name} in this path: {_owner(status)}")
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
                    return _ResolvedPath(directory, name, os.stat(name, dir_fd=directory.fd), by_kernel=True)
                followed = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory.fd)
                self._fds.append(followed)
                directory = _Directory.of(followed)
            elif not last or name == "..":
                if not stat.S_ISDIR(status.st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                directory = _Directory.of(fd)
            else:
                return _ResolvedPath(directory, name, status)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def is_trusted_directory(path: str, *, sticky: bool = False) -> bool:
    """Return whether only root and this user can replace the directory *path* or create files in it.

    Args:
        path: an absolute path.
        sticky: also accept a sticky directory, in which other users can create files but not replace this user's.
    """
    try:
        with _Walk() as walk:
            place = walk.to(path)
            if place.status is None or not stat.S_ISDIR(place.status.st_mode):
                return False
            itself = _Directory.of(walk.open(place.name, place.directory, os.O_DIRECTORY))
            return place.directory.vouches_for(place.status) and (itself.trusted if sticky else itself.exclusive)
    except OSError:
        return False


def _check(place: _ResolvedPath) -> None:
    """Check that no other user can have put the file there.

    Raises:
        OSError: EPERM; the text says why.
    """
    status = place.status
    if status is None or (place.directory.vouches_for(status) and not _has_other_names(place, status)):
        return
    if not stat.S_ISREG(status.st_mode):
        what = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise _problem(f"this is {what} that another user may have put there ({_owner(status)})")
    if status.st_uid not in (0, os.geteuid()):
        raise _problem(f"{_owner(status)}, who may have put it there")
    if status.st_nlink > 1:
        raise _problem("it has several hard links, and another user may have put this one there")


def _has_other_names(place: _ResolvedPath, status: os.stat_result) -> bool:
    return not place.directory.exclusive and stat.S_ISREG(status.st_mode) and status.st_nlink > 1


def open_file(path: str, flags: int) -> int:
    """Open a file like os.open, with O_CLOEXEC, unless another user may have put it there. Never block.

    Raises:
        OSError: the file cannot be opened, or another user may have put it there.
    """
    with _Walk() as walk:
        place = walk.to(path)
        _check(place)
        if place.status is not None and stat.S_IFMT(place.status.st_mode) in (
            stat.S_IFDIR,
            stat.S_IFBLK,
            stat.S_IFSOCK,
        ):
            raise _problem(f"this is {_KINDS[stat.S_IFMT(place.status.st_mode)]}, not a file")
        # With O_NONBLOCK, a named pipe without a reader fails with ENXIO instead of blocking.
        flags |= os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if place.by_kernel else os.O_NOFOLLOW)
        fd = os.open(place.name, flags, 0o666, dir_fd=place.directory.fd)
        try:
            if not place.by_kernel:  # the file may have been replaced since the first check
                _check(_ResolvedPath(place.directory, place.name, os.fstat(fd)))
            os.set_blocking(fd, True)
        except BaseException:
            os.close(fd)
            raise
        return fd


def check_appendable(path: str) -> None:
    """Check that `open_file` can append to *path* or create it; change nothing.

    Raises:
        OSError: as `open_file`.
    """
    with _Walk() as walk:
        place = walk.to(path)
        if place.status is None:
            _check_writable(place.directory)
            return
    os.close(open_file(path, os.O_WRONLY | os.O_APPEND))


def check_replaceable(path: str) -> None:
    """Check that `replace_file` can write *path*; change nothing.

    Raises:
        OSError: as `replace_file`.
    """
    with _Walk() as walk:
        place = walk.to(path)
        _replaceable(place)
        _check_writable(place.directory)


def _check_writable(directory: _Directory) -> None:
    """Check that this user can create files in *directory*.

    Raises:
        OSError: EACCES or EROFS.
    """
    if not os.access(".", os.W_OK | os.X_OK, dir_fd=directory.fd, effective_ids=True):
        read_only = os.fstatvfs(directory.fd).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
        raise OSError(number, os.strerror(number))


def _replaceable(place: _ResolvedPath) -> None:
    if place.status is None:
        return
    if place.by_kernel or not stat.S_ISREG(place.status.st_mode):
        status = _KINDS.get(stat.S_IFMT(place.status.st_mode), "a link of /proc")
        raise _problem(f"this is {status}; llloop replaces only regular files")
    _check(place)
    directory = os.fstat(place.directory.fd)
    if directory.st_mode & stat.S_ISVTX and os.geteuid() not in (0, place.status.st_uid, directory.st_uid):
        raise _problem(f"{_owner(place.status)}, and only that user can replace it in a sticky directory")


def replace_file(path: str, data: bytes) -> None:
    """Create or atomically replace the regular file *path* with one that contains *data*.

    Raises:
        OSError: it cannot be written, it is not a regular file, or another user may have put it there.
    """
    with _Walk() as walk:
        place = walk.to(path)
        _replaceable(place)
        directory = place.directory.fd
        temporary = f".llloop-{secrets.token_hex(8)}"
        fd = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=directory
        )
        try:
            with open(fd, "wb") as file:
                file.write(data)
            os.rename(temporary, place.name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            raise


def remove_file(path: str, content: bytes) -> None:
    """Remove the regular file *path* if it contains exactly *content*. Ignore errors."""
    with suppress(OSError), _Walk() as walk:
        place = walk.to(path)
        if place.status is None or place.by_kernel or not stat.S_ISREG(place.status.st_mode):
            return
        _check(place)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(place.name, flags, dir_fd=place.directory.fd), "rb") as file:
            if file.read(len(content) + 1) == content:
                os.unlink(place.name, dir_fd=place.directory.fd)
