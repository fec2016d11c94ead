"""Permission checks of a mount that shows other owners or modes, or whose new files belong to somebody else.

The kernel checks what the mount shows, with cached attributes. Here the same is checked again with current attributes.
Then the front acts with its own rights, because the caller may have none in the source. Rights that outlast the mount
are not given away: who gives a file to another user or group, sets set-ID bits, file flags, or attributes other than
user.*, needs the rights for that in the source.
"""

from __future__ import annotations

import os
import stat
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from llloop.front.permissions import Permissions, denied, not_permitted
from llloop.front.requester import Requester
from llloop.front.views.shown import Shown
from llloop.linux import syscalls
from llloop.linux.credentials import FILE_CAPABILITIES
from llloop.linux.syscalls import Attributes, fstatx

_READ, _WRITE, _EXECUTE = 4, 2, 1
_OWN_RIGHTS = nullcontext()


class CreatorPermissions(Permissions):
    """See `Permissions`.

    Args:
        user, group: owner and group of new files, or None for those of the requester.
    """

    def __init__(self, *arguments: Any, user: int | None, group: int | None, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._user = user
        self._group = group

    def creating(self, who: Requester, directory: int, *, by_group: bool | None = None) -> AbstractContextManager[None]:
        """Act as the owner of a new object, with all rights, if the requester may create something in the directory."""
        if not self.may(who, _WRITE | _EXECUTE, directory, fstatx(directory)):
            raise denied()
        self._caller.set_umask(who.umask)
        gid = who.gid if self._group is None else self._group
        return self._caller(self._creator(who), gid, (), FILE_CAPABILITIES)

    def may_have_created(self, who: Requester, attributes: Attributes) -> bool:
        """See `Permissions.may_have_created`."""
        return attributes.uid == self._creator(who)

    def _creator(self, who: Requester) -> int:
        if not self._caller.can_switch:
            return os.geteuid()
        return who.uid if self._user is None else self._user


class ShownPermissions(CreatorPermissions):
    """See `CreatorPermissions`; *shown* converts attributes into those that the mount shows."""

    def __init__(self, *arguments: Any, shown: Shown, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._shown = shown

    def is_trusted(self, who: Requester) -> bool:
        """Return whether the requester may do everything: root. It is checked also if this process is not root."""
        return super().is_trusted(who) if self._caller.can_switch else who.uid == 0

    def may(self, who: Requester, needed: int, fd: int, attributes: Attributes) -> bool:
        """See `Permissions.may`."""
        return self._allows(who, needed, self._shown.of(attributes))

    def owns(self, who: Requester, attributes: Attributes) -> bool:
        """Return whether the requester is the shown owner, or has CAP_FOWNER."""
        return super().owns(who, self._shown.of(attributes))

    def owns_in_source(self, who: Requester, attributes: Attributes) -> bool:
        """Return whether the requester is the owner in the source, or root."""
        return who.uid == attributes.uid or self.is_trusted(who)

    def changing_names(
        self, who: Requester, *fds: int, owned: tuple[Attributes, ...] = (), by_group: bool | None = None
    ) -> AbstractContextManager[None]:
        """See `Permissions.acting`."""
        files = [fstatx(fd) for fd in fds]
        for one in files:
            is_directory = stat.S_ISDIR(one.mode)
            needed = _WRITE | _EXECUTE if is_directory else _READ | _WRITE
            # Only the owner can give a file a name that he can neither read nor write (proc(5), protected_hardlinks).
            if not self._allows(who, needed, self._shown.of(one)) and (is_directory or not self.owns(who, one)):
                raise denied() if is_directory else not_permitted()
        for directory, one in zip(files, owned, strict=False):
            if directory.mode & stat.S_ISVTX and not self.owns(who, one) and not self.owns(who, directory):
                raise not_permitted()
        # A directory that gets another parent must be writable itself.
        if by_group and stat.S_ISDIR(owned[0].mode) and not self._allows(who, _WRITE, self._shown.of(owned[0])):
            raise denied()
        return _OWN_RIGHTS

    def changing_attributes(
        self, who: Requester, *fds: int, owned: tuple[Attributes, ...] = (), by_group: bool | None = None
    ) -> AbstractContextManager[None]:
        """See `Permissions.acting`. What the owner in the source may do is done as him."""
        files = [fstatx(fd) for fd in fds]
        if not all(self.owns(who, one) for one in files):
            raise not_permitted()
        if all(self.owns_in_source(who, one) for one in files):
            return self.acting(who, *fds, by_group=by_group)
        return _OWN_RIGHTS

    def setting_xattr(self, who: Requester, fd: int, name: bytes) -> AbstractContextManager[None]:
        """See `Permissions.setting_xattr`."""
        if not name.startswith(b"user."):
            return super().setting_xattr(who, fd, name)
        if not self.may(who, _WRITE, fd, fstatx(fd)):
            raise denied()
        return _OWN_RIGHTS

    def setting_file_attributes(self, who: Requester, fd: int) -> AbstractContextManager[None]:
        """See `Permissions.setting_file_attributes`."""
        if not self.owns_in_source(who, fstatx(fd)):
            raise not_permitted()
        return super().setting_file_attributes(who, fd)

    def _allows(self, who: Requester, needed: int, shown: Attributes) -> bool:
        """Return whether the requester may access a file with these shown attributes (path_resolution(7))."""
        mode = shown.mode
        if who.uid == shown.uid:
            granted = mode >> 6
        elif self.is_member(who, shown.gid):
            granted = mode >> 3
        else:
            granted = mode
        if granted & needed == needed or self.is_trusted(who):
            return True
        capabilities = self._capabilities(self._credentials(who), shown)
        if not stat.S_ISDIR(mode) and needed & _EXECUTE and not mode & 0o111:
            return False
        return bool(
            capabilities >> syscalls.CAP_DAC_OVERRIDE & 1
            or (capabilities >> syscalls.CAP_DAC_READ_SEARCH & 1 and not needed & _WRITE and stat.S_ISDIR(mode))
            or (capabilities >> syscalls.CAP_DAC_READ_SEARCH & 1 and needed == _READ)
        )
