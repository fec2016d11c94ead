"""Maps of user and group ids, for id-mapped mounts (mount_setattr(2), MOUNT_ATTR_IDMAP)."""

from __future__ import annotations

from dataclasses import dataclass

# The ids of the kernel are 0 to 2^32 - 2 (user_namespaces(7)).
IDS = 2**32 - 1
# The most lines of a map (UID_GID_MAP_MAX_EXTENTS of <linux/user_namespace.h>).
MAX_RANGES = 340
# The id that llloop takes for a caller whose id is not mapped. In the source, no file belongs to it.
UNMAPPED = IDS - 1


@dataclass(frozen=True, slots=True)
class IdRange:
    """*count* ids from *source* on appear in the mount as the ids from *mount* on."""

    source: int
    mount: int
    count: int

    def overlaps(self, other: IdRange) -> bool:
        """Return whether both ranges map one id, on one of both sides."""
        return any(
            mine < theirs + other.count and theirs < mine + self.count
            for mine, theirs in ((self.source, other.source), (self.mount, other.mount))
        )

    def __str__(self) -> str:
        return f"{self.source}:{self.mount}:{self.count}"


@dataclass(frozen=True, slots=True)
class IdMap:
    """Which id of the mount stands for which id of the source."""

    ranges: tuple[IdRange, ...]

    def to_source(self, number: int) -> int:
        """Return the id in the source for an id in the mount, `UNMAPPED` if there is none."""
        for one in self.ranges:
            if one.mount <= number < one.mount + one.count:
                return number - one.mount + one.source
        return UNMAPPED

    def to_mount(self, number: int) -> int | None:
        """Return the id in the mount for an id in the source, None if there is none."""
        for one in self.ranges:
            if one.source <= number < one.source + one.count:
                return number - one.source + one.mount
        return None


SAME_IDS = IdMap((IdRange(0, 0, IDS),))
