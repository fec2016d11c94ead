"""Mounting: by libfuse, or with mapped ids by the kernel's newer calls."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Protocol

import llfuse

from llloop import mount_options
from llloop.config import ServeConfig
from llloop.errors import HostError, LlloopError, UsageError
from llloop.front.llfuse.operations import Operations
from llloop.linux import mount_api, mount_identity, user_namespaces
from llloop.linux.id_maps import IdMap
from llloop.linux.mount_identity import MountIdentity
from llloop.linux.stdio import CapturedStderr
from llloop.shared.negotiation import Capabilities, Feature
from llloop.supervisor import unmounting

_DEVICE = "/dev/fuse"


class Mount(Protocol):
    """A mount that is being made.

    Attributes:
        device: the descriptor of /dev/fuse.
    """

    device: int

    def attach(self, capabilities: Capabilities | None) -> MountIdentity:
        """Let the mount appear at its mount point, after INIT was answered; return its identity.

        Args:
            capabilities: the result of the negotiation with the kernel; None with `--loop llfuse`.

        Raises:
            LlloopError: that is not possible; the subclasses say why.
        """

    def detach(self) -> None:
        """Detach the mount if it is attached."""

    def close(self) -> None:
        """Close the device."""


def mount(config: ServeConfig, mountpoint: str, operations: Operations) -> Mount:
    """Make a mount.

    Args:
        config: its options.
        mountpoint: an absolute path without symlinks.
        operations: the handlers that llfuse calls with `--loop llfuse`.

    Raises:
        UsageError: an option does not exist.
        HostError: mounting failed for another reason.
        LlloopError: the mount disappeared immediately.
    """
    if config.id_maps is None:
        return _LibfuseMount(operations, mountpoint, mount_options.for_libfuse(config))
    return _MappedMount(config, mountpoint, config.id_maps)


class _LibfuseMount:
    """A mount by libfuse, which fusermount makes for an ordinary user. It is attached at once."""

    def __init__(self, operations: Operations, mountpoint: str, options: list[str]) -> None:
        self.device, self._identity = _mount_with_libfuse(operations, mountpoint, options)

    def attach(self, capabilities: Capabilities | None) -> MountIdentity:
        """See `Mount`."""
        return self._identity

    def detach(self) -> None:
        """See `Mount`."""
        unmounting.detach(self._identity, self.device)

    def close(self) -> None:
        """See `Mount`."""
        llfuse.close(unmount=False)


class _MappedMount:
    """An id-mapped mount. The kernel maps ids only after INIT, so the mount stays detached until then."""

    def __init__(self, config: ServeConfig, mountpoint: str, maps: tuple[IdMap, IdMap]) -> None:
        self._mountpoint = mountpoint
        self._maps = maps
        self._identity: MountIdentity | None = None
        self.device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        kind = stat.S_IFMT(os.stat(mountpoint).st_mode)
        parameters, attributes = mount_options.for_kernel(config)
        parameters |= {"fd": str(self.device), "rootmode": f"{kind:o}"}
        try:
            self._mount = mount_api.detached_mount("fuse", parameters, attributes)
        except OSError as error:
            os.close(self.device)
            raise HostError(f"mount point {mountpoint}: mounting failed: {error.strerror}") from None

    def attach(self, capabilities: Capabilities | None) -> MountIdentity:
        """See `Mount`."""
        if capabilities is None or Feature.ALLOW_IDMAP not in capabilities.features:
            raise HostError("--map-users and --map-groups are not possible: they need Linux 6.12")
        try:
            namespace = user_namespaces.user_namespace(*self._maps)
            try:
                mount_api.map_ids(self._mount, namespace)
            finally:
                os.close(namespace)
        except OSError as error:
            raise HostError(
                f"--map-users and --map-groups are not possible: the kernel refuses the map ({error.strerror})"
            ) from None
        try:
            mount_api.attach(self._mount, self._mountpoint)
        except OSError as error:
            raise HostError(f"mount point {self._mountpoint}: mounting failed: {error.strerror}") from None
        self._identity = _identify(self._mountpoint)
        self._close_mount()
        return self._identity

    def _close_mount(self) -> None:
        fd, self._mount = self._mount, -1
        if fd >= 0:
            os.close(fd)

    def detach(self) -> None:
        """See `Mount`."""
        self._close_mount()
        if self._identity is not None:
            unmounting.detach(self._identity, self.device)

    def close(self) -> None:
        """See `Mount`."""
        os.close(self.device)


def _identify(mountpoint: str) -> MountIdentity:
    identity = mount_identity.identify(mountpoint)
    if identity is None:
        raise LlloopError(f"mount point {mountpoint}: the mount disappeared right after it was made")
    return identity


def _mount_with_libfuse(operations: Operations, mountpoint: str, options: list[str]) -> tuple[int, MountIdentity]:
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
    before = _fuse_devices()
    complaints = CapturedStderr()
    mounted = False
    try:
        with complaints:
            llfuse.init(operations, mountpoint, options)
            mounted = True
        (device,) = _fuse_devices() - before
        return device, _identify(mountpoint)
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


def _fuse_devices() -> frozenset[int]:
    """Return this process's open descriptors of /dev/fuse (proc(5), /proc/self/fd)."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.add(int(name))
    return frozenset(found)
