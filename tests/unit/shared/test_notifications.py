"""FUSE notifications as the kernel receives them."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from llloop.linux import fuse
from llloop.shared import notifications
from tests.unit.support import Device, Reply


def test_expire_attributes_keeps_pages(device: Device) -> None:
    notifications.expire_attributes(device.fd, 2**63)
    assert device.take() == [Reply(0, -fuse.FUSE_NOTIFY_INVAL_INODE, struct.pack("=Qqq", 2**63, -1, 0))]


def test_drop_pages_of_a_range_or_to_the_end(device: Device) -> None:
    notifications.drop_pages(device.fd, 7, 4096, 100)
    notifications.drop_pages(device.fd, 8)
    code = -fuse.FUSE_NOTIFY_INVAL_INODE
    assert device.take() == [
        Reply(0, code, struct.pack("=Qqq", 7, 4096, 100)),
        Reply(0, code, struct.pack("=Qqq", 8, 0, 0)),
    ]


def test_names_are_any_bytes(device: Device) -> None:
    notifications.drop_entry(device.fd, 1, b"\xff name")
    notifications.expire_entry(device.fd, 1, b"\xff name")
    assert device.take() == [
        Reply(0, -fuse.FUSE_NOTIFY_INVAL_ENTRY, struct.pack("=QII", 1, 6, flags) + b"\xff name\0") for flags in (0, 1)
    ]


def test_epoch_has_no_arguments(device: Device) -> None:
    notifications.increase_epoch(device.fd)
    assert device.take() == [Reply(0, -fuse.FUSE_NOTIFY_INC_EPOCH, b"")]


def test_unknown_inode_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", refuse)
    number = errno.ENOENT
    notifications.expire_attributes(3, 5)
    notifications.drop_pages(3, 5)
    notifications.expire_entry(3, 5, b"name")
    number = errno.ENOTDIR
    notifications.drop_entry(3, 5, b"name")
    number = errno.ENODEV
    with pytest.raises(OSError, match=os.strerror(errno.ENODEV)):
        notifications.expire_attributes(3, 5)
