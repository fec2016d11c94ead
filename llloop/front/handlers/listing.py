"""Conversion of directory entries from getdents64(2) to FUSE_READDIR.

Both formats are sequences of records with the same fields in another order. Converting each entry in Python would make
large directories slow. So runs of names of equal length (photos, mails, hashes) are converted column by column, with
slices that take every n-th byte. Other entries are converted one by one.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from struct import Struct

from llloop.linux import fuse

_HEAD = Struct("=8s8xHB")  # struct linux_dirent64: d_ino, d_reclen, d_type; then the name and a NUL
_OFFSET = Struct("=8xQ")  # d_off
_NAME = 19
_WORD = 8
_DIRENT = Struct("=8sQII")  # fuse.DIRENT with the inode number as bytes
_NUMBER = Struct("=Q")
_TYPE = 20  # offsetof(struct fuse_dirent, type)
# The padding of a name to a multiple of eight bytes, by its length modulo eight (FUSE_DIRENT_ALIGN).
_PADDING = tuple(bytes(-length % 8) for length in range(8))
_DOTS = frozenset({b".", b".."})
# After so many names of equal length, look for a run. Runs shorter than the second number are not worth it.
_ALIKE = 4
_WORTHWHILE = 24


class Part:
    """Successive entries of a listing.

    Attributes:
        data: the entries as ``struct fuse_dirent``.
        before: the number of entries before them.
        ends: the start of the first entry in *data*, and the end of each one.
    """

    __slots__ = ("before", "data", "ends")

    def __init__(self, data: bytes, before: int, ends: Sequence[int]) -> None:
        self.data = data
        self.before = before
        self.ends = ends

    @classmethod
    def restored(cls, data: bytes) -> Part:
        """Return the first part of a listing from its `data`."""
        ends = array("I", (0,))
        position = 0
        while position < len(data):
            _, _, length, _ = fuse.DIRENT.unpack_from(data, position)
            position += fuse.DIRENT.size + length + len(_PADDING[length & 7])
            ends.append(position)
        return cls(data, 0, ends)

    def __len__(self) -> int:
        return len(self.ends) - 1


class Listing:
    """The entries of an open directory that were read so far. An entry's cookie is its position, counted from one.

    The directory is only read as far as requested, so that a large directory does not delay other requests.

    Attributes:
        parts: the entries, one part for each block.
        complete: whether the whole directory was read.
        position: the directory's cookie (d_off) of the last entry that was read, where reading continues.
        saved: how many of the parts are saved for the next front.

    Args:
        blocks: the results of successive getdents64(2) calls.
        shown: returns the inode number in the mount for one of the source.
        foreign: whether `shown` may change the number of any entry, not only of "." and "..".
        first: the entries that a dead front had read.
    """

    def __init__(
        self, blocks: Iterable[bytes], shown: Callable[[int], int], *, foreign: bool, first: Part | None = None
    ) -> None:
        self._blocks = iter(blocks)
        self._shown = shown
        self._foreign = foreign
        self.parts = [first] if first else []
        self._befores = [part.before for part in self.parts]
        self._count = len(first) if first else 0
        self.complete = False
        self.position = 0
        self.saved = 0

    def __len__(self) -> int:
        """The number of entries that were read."""
        return self._count

    def _reach(self, offset: int) -> Part | None:
        """Read as far as needed; return the part with the entry after the first *offset* ones, or None at the end."""
        while offset >= self._count:
            block = None if self.complete else next(self._blocks, None)
            if block is None:
                self.complete = True
                return None
            part = self._converted(block)
            self._befores.append(self._count)
            self.parts.append(part)
            self._count += len(part)
        return self.parts[bisect_right(self._befores, offset) - 1]

    def _converted(self, block: bytes) -> Part:
        head, pack, index = _HEAD.unpack_from, _DIRENT.pack, block.index
        foreign, shown = self._foreign, self._shown
        records: list[bytes | bytearray] = []
        ends = array("I", (0,))
        position, end, cookie, total = 0, len(block), self._count + 1, 0
        last = alike = previous = 0
        while position < end:
            number, stride, kind = head(block, position)
            start = position + _NAME
            length = index(0, start) - start
            alike = alike + 1 if length == last else 0
            last = length
            if alike >= _ALIKE and not foreign:
                count = _run(block, position, stride, length)
                alike = -count  # if the run is too short, look for the next one only after its end
                if count >= _WORTHWHILE:
                    run, size = _columns(block, position, stride, length, count, cookie)
                    records.append(run)
                    ends.extend(range(total + size, total + size * count + 1, size))
                    total = ends[-1]
                    cookie += count
                    previous = position + stride * (count - 1)
                    position += stride * count
                    alike = 0
                    continue
            name = block[start : start + length]
            if foreign or name in _DOTS:
                number = _NUMBER.pack(shown(*_NUMBER.unpack(number)))
            record = pack(number, cookie, length, kind) + name + _PADDING[length & 7]
            records.append(record)
            total += len(record)
            ends.append(total)
            cookie += 1
            previous = position
            position += stride
        (self.position,) = _OFFSET.unpack_from(block, previous)
        return Part(b"".join(records), self._count, ends)

    def fitting(self, offset: int, size: int) -> tuple[bytes, int]:
        """Return up to *size* bytes of entries after the first *offset* ones, and the cookie of the last one."""
        part = self._reach(offset)
        if part is None:
            return b"", offset
        ends = part.ends
        start = ends[offset - part.before]
        last = bisect_right(ends, start + size, offset - part.before) - 1
        return part.data[start : ends[last]], part.before + last

    def records(self, offset: int, size: int, each: int) -> list[bytes]:
        """Return the ``struct fuse_dirent`` of each entry that fits into *size* bytes.

        Args:
            offset: the number of entries to skip.
            size: the available bytes.
            each: the bytes needed for each entry in addition.
        """
        part = self._reach(offset)
        if part is None:
            return []
        data, ends = part.data, part.ends[offset - part.before :]
        records = []
        for start, following in pairwise(ends):
            size -= following - start + each
            if size < 0:
                break
            records.append(data[start:following])
        return records


def name_of(record: bytes) -> bytes:
    """Return the name in one ``struct fuse_dirent``."""
    return record[fuse.DIRENT.size :].rstrip(b"\0")


def number_of(record: bytes) -> int:
    """Return the inode number in one ``struct fuse_dirent``."""
    number: int = _NUMBER.unpack_from(record)[0]
    return number


def _run(block: bytes, position: int, stride: int, length: int) -> int:
    """Return how many records from *position* on are *stride* bytes long and have names of *length* bytes."""
    low, high = _HEAD.size - 3, _HEAD.size - 2
    end = _NAME + length
    count = _same(block[position + low :: stride], stride & 255)
    count = _same(block[position + high :: stride][:count], stride >> 8)
    count = _same(block[position + end :: stride][:count], 0)
    # No earlier byte of the name may be NUL, and the bytes after a name are undefined. Only the last few bytes need a
    # check: records are padded to words of eight bytes (filldir64() of Linux), so names in records of equal size differ
    # in length by less than a word.
    for column in range(length - 1, max(length - _WORD, -1), -1):
        shorter = block[position + _NAME + column :: stride].find(0, 0, count)
        if shorter >= 0:
            count = shorter
    return min(count, (len(block) - position) // stride)


def _same(column: bytes, value: int) -> int:
    """Return how many bytes at the beginning of *column* equal *value*."""
    return len(column) - len(column.lstrip(bytes((value,))))


def _columns(block: bytes, position: int, stride: int, length: int, count: int, cookie: int) -> tuple[bytearray, int]:
    """Return *count* records as ``struct fuse_dirent``, and the size of each."""
    size = fuse.DIRENT.size + length + len(_PADDING[length & 7])
    end = position + count * stride
    out = bytearray(_DIRENT.pack(bytes(8), 0, length, 0).ljust(size, b"\0") * count)
    # Copy column by column: words of eight bytes as far as possible, with a view of the names that is aligned to words.
    given = memoryview(block)
    numbers = given[position:end].cast("Q")
    names = given[position + _NAME % _WORD : end + _NAME % _WORD - _WORD].cast("Q")
    words = memoryview(out).cast("Q")
    step, given_step = size // _WORD, stride // _WORD
    words[::step] = numbers[::given_step]
    words[1::step] = memoryview(array("Q", range(cookie, cookie + count)))
    for word in range(length // _WORD):
        words[fuse.DIRENT.size // _WORD + word :: step] = names[_NAME // _WORD + word :: given_step]
    for column in range(length // _WORD * _WORD, length):
        out[fuse.DIRENT.size + column :: size] = block[position + _NAME + column : end : stride]
    out[_TYPE::size] = block[position + _HEAD.size - 1 : end : stride]
    return out, size
