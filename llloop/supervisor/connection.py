"""The connection with the kernel: mounting, the INIT request, and its result."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from dataclasses import dataclass

import llfuse

from llloop.config import WITHOUT_OWN_LOOP, Cache, IoKind, LoopKind, MetadataKind, ServeConfig
from llloop.errors import HostError, LlloopError, UsageError
from llloop.front.llfuse.operations import Operations
from llloop.front.passthrough import refusal
from llloop.linux import mount_identity, syscalls
from llloop.linux.mount_identity import MountIdentity
from llloop.linux.stdio import CapturedStderr
from llloop.shared import negotiation
from llloop.shared.negotiation import Capabilities, Feature

_log = logging.getLogger(__name__)

_INIT_BUFFER = 1 << 21  # larger than any request, because the kernel refuses reads into small buffers


@dataclass(frozen=True, slots=True)
class Connection:
    """The connection of an initialised mount.

    Attributes:
        device: the descriptor of /dev/fuse.
        capabilities: the result of the negotiation with the kernel; None with `--loop llfuse`.
        preflight: whether workers access the source before the front does.
    """

    device: int
    capabilities: Capabilities | None
    preflight: bool = False

    def describe(self) -> str:
        """Return loop and features in words, for the line that `llloop serve` prints."""
        if self.capabilities is None:
            return "llfuse's loop"
        preflight = ", metadata through workers" if self.preflight else ""
        return f"own loop{preflight}, {self.capabilities.describe()}"

    def in_force(self, config: ServeConfig) -> dict[str, str]:
        """Return the values that options with automatic choices have resolved to."""
        features = self.capabilities.features if self.capabilities is not None else Feature(0)
        kept = {Cache.NEVER: "not kept", Cache.AUTO: "kept until it changes", Cache.ALWAYS: "kept"}[config.cache]
        return {
            "cache": f"names {config.entry_timeout:g} s, missing names {config.negative_timeout:g} s, "
            f"attributes {config.attr_timeout:g} s, data {kept}",
            "io": IoKind.KERNEL.value if Feature.PASSTHROUGH in features else IoKind.WORKERS.value,
            "metadata": MetadataKind.WORKERS.value if self.preflight else MetadataKind.FRONT.value,
        }


def mount(operations: Operations, mountpoint: str, options: list[str]) -> tuple[int, MountIdentity]:
    """Mount, and return the descriptor of /dev/fuse and the identity of the mount.

    Args:
        operations: the handlers that llfuse calls with `--loop llfuse`.
        mountpoint: an absolute path without symlinks.
        options: libfuse's mount options, in order.

    Raises:
        UsageError: libfuse does not know an option.
        HostError: libfuse or fusermount failed for another reason.
        LlloopError: the mount disappeared immediately.
    """
    before = fuse_devices()
    complaints = CapturedStderr()
    mounted = False
    try:
        with complaints:
            llfuse.init(operations, mountpoint, options)
            mounted = True
        (device,) = fuse_devices() - before
        identity = mount_identity.identify(mountpoint)
        if identity is None:
            raise LlloopError(f"mount point {mountpoint}: the mount disappeared right after it was made")
        return device, identity
    except RuntimeError as error:
        # libfuse and fusermount write the reason to standard error.
        reason = complaints.text or str(error)
        if "fuse_lowlevel_new" in str(error) or "option" in reason:
            raise UsageError(f"mount options {','.join(options)}: {reason}") from None
        raise HostError(f"mount point {mountpoint}: mounting failed: {reason}") from None
    except BaseException as error:
        if mounted:
            llfuse.close()
        if isinstance(error, ValueError):
            raise LlloopError("libfuse did not open exactly one descriptor of /dev/fuse") from None
        raise


def initialise(device: int, config: ServeConfig, source: str) -> Connection:
    """Answer INIT, except with `--loop llfuse`, where llfuse does it.

    Args:
        device: the descriptor of /dev/fuse of a new mount.
        config: the mount's options.
        source: the absolute path of the source.

    Raises:
        HostError: the kernel lacks a feature that the options need.
    """
    if config.loop is LoopKind.LLFUSE:
        _log.info("llfuse runs the request loop; this mount lacks %s", WITHOUT_OWN_LOOP)
        return Connection(device, None)
    preflight = _asks_first(config, source)
    buffer = bytearray(_INIT_BUFFER)
    length = os.readv(device, [buffer])
    request = bytes(buffer[:length])
    try:
        answer, capabilities = negotiation.negotiate(
            request,
            posix_acl=config.xattr and _has_acls(source),
            writeback=config.writeback,
            passthrough=config.io is not IoKind.WORKERS and not config.writeback,
            stack_depth=2 if _type_of(source) in syscalls.STACKED else 1,
            readdirplus=not preflight,  # READDIRPLUS makes the front access each entry
        )
    except negotiation.UnsupportedProtocol as error:
        raise HostError(str(error)) from None
    os.write(device, answer)
    return Connection(device, _check_passthrough(device, config, capabilities), preflight=preflight)


def fuse_devices() -> frozenset[int]:
    """Return this process's open descriptors of /dev/fuse (proc(5), /proc/self/fd)."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.add(int(name))
    return frozenset(found)


def _check_passthrough(device: int, config: ServeConfig, capabilities: Capabilities) -> Capabilities:
    """Return the capabilities without passthrough if this process may not use it.

    Raises:
        HostError: `--io kernel` demands it.
    """
    if config.io is IoKind.WORKERS:
        return capabilities
    if Feature.PASSTHROUGH in capabilities.features:
        reason = refusal(device)
    else:
        reason = "--writeback excludes it" if config.writeback else "it needs Linux 6.9"
    if reason is None:
        return capabilities
    if config.io is IoKind.KERNEL:
        hint = "" if os.geteuid() == 0 else ", it needs root"
        raise HostError(f"--io kernel is not possible: {reason}{hint}; use --io auto or --io workers")
    return capabilities.without(Feature.PASSTHROUGH)


def _asks_first(config: ServeConfig, source: str) -> bool:
    """Return whether workers access the source before the front does (`--metadata`)."""
    if config.metadata is MetadataKind.AUTO:
        return _type_of(source) in syscalls.CAN_HANG
    return config.metadata is MetadataKind.WORKERS


def _type_of(source: str) -> int:
    """Return the magic number of the source's file system."""
    fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return syscalls.file_system_type(fd)
    finally:
        os.close(fd)


def _has_acls(source: str) -> bool:
    """Return whether the source's file system has POSIX ACLs (acl(5))."""
    try:
        os.getxattr(source, b"system.posix_acl_access")
    except OSError as error:
        return error.errno == errno.ENODATA
    return True
