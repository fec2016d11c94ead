"""The connection with the kernel: the INIT request and its result."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass

from llloop.config import WITHOUT_OWN_LOOP, Cache, IoKind, LoopKind, MetadataKind, ServeConfig
from llloop.errors import HostError
from llloop.front.passthrough import refusal
from llloop.linux import syscalls
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
            posix_acl=config.xattr and not config.shows_other_attributes and _has_acls(source),
            writeback=config.writeback,
            passthrough=config.io is not IoKind.WORKERS and not config.writeback,
            stack_depth=2 if _type_of(source) in syscalls.STACKED else 1,
            readdirplus=not preflight,  # READDIRPLUS makes the front access each entry
            id_maps=config.id_maps is not None,
        )
    except negotiation.UnsupportedProtocol as error:
        raise HostError(str(error)) from None
    os.write(device, answer)
    return Connection(device, _check_passthrough(device, config, capabilities), preflight=preflight)


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
