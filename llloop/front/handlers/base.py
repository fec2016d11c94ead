"""The base classes of the request handlers: access to requests, and replies."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from llloop.front.context import Context
from llloop.front.inodes import GENERATION
from llloop.linux import fuse
from llloop.linux.syscalls import Attributes
from llloop.shared.negotiation import Feature


class Replies:
    """Writes replies.

    Args:
        device: a descriptor of /dev/fuse.
    """

    def __init__(self, device: int) -> None:
        self._device = device

    def trace(self, replied: Callable[[bytes | bytearray | memoryview], None] | None) -> None:
        """Call *replied* with each reply that the kernel has accepted; None ends that."""

        def send(reply: bytes | bytearray | memoryview) -> bool:
            accepted = Replies._send(self, reply)
            if accepted and replied is not None:
                replied(reply)
            return accepted

        # The attribute of the object hides the method, so that tracing costs nothing while nobody traces.
        vars(self).pop("_send", None)
        if replied is not None:
            vars(self)["_send"] = send

    def _send(self, reply: bytes | bytearray | memoryview) -> bool:
        """Write a reply; return False if the kernel does not wait for it any more."""
        try:
            os.write(self._device, reply)
        except FileNotFoundError:
            return False
        return True


class Responder(Replies):
    """The base of the handlers. Each gets a request, and unpacks the fields after the header from `_memory`.

    Args:
        context: the objects that handlers work on.
        device: a descriptor of /dev/fuse.
    """

    def __init__(self, context: Context, device: int) -> None:
        super().__init__(device)
        self._context = context
        self._memory = context.router.slots.memory
        self._tree = context.tree
        self._inodes = context.inodes
        self._handles = context.handles
        self._files = context.files
        self._attr = context.attribute_fields
        self._validity = context.policy.validity
        self._heard = context.heard
        self._written = context.handles.written

    def _check_xattr(self) -> None:
        """Check that the mount supports extended attributes (`--xattr`).

        Raises:
            OSError: ENOSYS.
        """
        if not self._context.config.xattr:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))  # the kernel then stops asking

    def _entry(self, nodeid: int, attributes: Attributes) -> bytes:
        """Return ``struct fuse_entry_out``."""
        heard = self._heard
        validity = self._validity if heard is None else heard.of_entry(nodeid, attributes)
        return _pack_entry(
            nodeid,
            GENERATION,
            *(validity.both if self._attributes_last(nodeid) else validity.only_entry),
            *self._attr(
                self._inodes.shown(attributes.device, attributes.ino), self._with_dirty_pages(nodeid, attributes)
            ),
        )

    def _reply_entry(self, unique: int, nodeid: int, attributes: Attributes, *, lasting: bool = True) -> None:
        """Answer with an entry; if not *lasting*, its attributes are not valid."""
        inodes = self._inodes
        heard = self._heard
        validity = self._validity if heard is None else heard.of_entry(nodeid, attributes)
        reply = _pack_entry_reply(
            _ENTRY_REPLY_SIZE,
            0,
            unique,
            nodeid,
            GENERATION,
            *(validity.both if lasting and nodeid not in self._written else validity.only_entry),
            *self._attr(inodes.shown(attributes.device, attributes.ino), self._with_dirty_pages(nodeid, attributes)),
        )
        if self._send(reply):
            inodes.count(nodeid)
        else:
            self._tree.forget(nodeid, 0)

    def _attributes_reply(self, unique: int, nodeid: int, attributes: Attributes, *, lasting: bool = True) -> bytes:
        """Return the reply to GETATTR and SETATTR; if not *lasting*, the attributes are not valid."""
        attr_reply = fuse.ATTR_REPLY
        heard = self._heard
        validity = self._validity if heard is None else heard.of_attributes(nodeid, attributes)
        return attr_reply.pack(
            attr_reply.size,
            0,
            unique,
            *(validity.attributes if lasting and self._attributes_last(nodeid) else (0, 0)),
            *self._attr(
                self._inodes.shown(attributes.device, attributes.ino), self._with_dirty_pages(nodeid, attributes)
            ),
        )

    def _attributes_last(self, nodeid: int) -> bool:
        """Return whether only requests change an inode's attributes, apart from changes in the source."""
        pages = self._written.get(nodeid)
        return pages is None or not pages.passthrough

    def _with_dirty_pages(self, nodeid: int, attributes: Attributes) -> Attributes:
        """Return an inode's attributes with at least one block if dirty pages may bring it blocks.

        An archiver treats a file without blocks as one hole and does not read it (`tar --sparse`).
        """
        if not attributes.blocks and self._can_get_blocks(nodeid, attributes.size):
            return attributes._replace(blocks=1)
        return attributes

    def _can_get_blocks(self, nodeid: int, size: int) -> bool:
        """Return whether dirty pages may bring blocks to a file that has none; an empty file cannot be mapped."""
        return (bool(size) or Feature.WRITEBACK_CACHE in self._context.features) and self._handles.may_be_dirty(nodeid)


_pack_entry = fuse.ENTRY.pack
_pack_entry_reply = fuse.ENTRY_REPLY.pack
_ENTRY_REPLY_SIZE = fuse.ENTRY_REPLY.size
