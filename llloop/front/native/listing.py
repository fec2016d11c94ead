"""A directory's entries, from what getdents64(2) gives to what FUSE_READDIR wants.

Both are sequences of records with the same fields in another order. A step of the interpreter for each entry would
make large directories slow, so runs of names of one length (photos, mails, hashes) are converted column by
column, with slices that take every n-th byte; what is no such run goes one by one.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import pairwise
from struct import Struct

from ... import wire

_HEAD = Struct("=8s8xHB")  # struct linux_dirent64: d_ino, d_reclen, d_type; then the name and a NUL
_NAME = 19
_WORD = 8
_DIRENT = Struct("=8sQII")  # wire.DIRENT with the number as it lies in memory
_NUMBER = Struct("=Q")
_TYPE = 20  # offsetof(struct fuse_dirent, type)
# What pads a name to a multiple of eight bytes, by its length modulo eight (FUSE_DIRENT_ALIGN).
_PADDING = tuple(bytes(-length % 8) for length in range(8))
_DOTS = frozenset({b".", b".."})
# So many alike in a row are taken for the beginning of a run; shorter runs than the second do not pay.
_ALIKE = 4
_WORTHWHILE = 24


class Listing:
    """A snapshot of a directory. An entry's cookie is its position, counted from one.

    Attributes:
        data: all entries as ``struct fuse_dirent``.

    Args:
        blocks: what getdents64(2) returned, call by call.
        shown: gives the number that the mount shows for a number of the source.
        foreign: whether `shown` has something to say about any entry, not about "." and ".." only.
    """

    def __init__(self, blocks: Iterable[bytes], shown: Callable[[int], int], *, foreign: bool) -> None:
        self._records: list[bytes | bytearray] = []
        self._ends = [0]
        self._shown = shown
        for block in blocks:
            self._convert(block, foreign)
        self.data = b"".join(self._records)
        self._records = []

    @classmethod
    def restored(cls, data: bytes) -> Listing:
        """Return the listing whose `data` were saved."""
        listing = cls((), lambda number: number, foreign=False)
        position = 0
        while position < len(data):
            _, _, length, _ = wire.DIRENT.unpack_from(data, position)
            position += wire.DIRENT.size + length + len(_PADDING[length & 7])
            listing._ends.append(position)
        listing.data = data
        return listing

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _convert(self, block: bytes, foreign: bool) -> None:
        head, pack, index = _HEAD.unpack_from, _DIRENT.pack, block.index
        records, ends = self._records, self._ends
        position, end, cookie, total = 0, len(block), len(ends), ends[-1]
        last = alike = 0
        while position < end:
            number, stride, kind = head(block, position)
            start = position + _NAME
            length = index(0, start) - start
            alike = alike + 1 if length == last else 0
            last = length
            if alike >= _ALIKE and not foreign:
                count = _run(block, position, stride, length)
                alike = -count  # however it ends, the next try is as far away as this one reached
                if count >= _WORTHWHILE:
                    run, size = _columns(block, position, stride, length, count, cookie)
                    records.append(run)
                    ends += range(total + size, total + size * count + 1, size)
                    total = ends[-1]
                    cookie += count
                    position += stride * count
                    alike = 0
                    continue
            name = block[start : start + length]
            if foreign or name in _DOTS:
                number = _NUMBER.pack(self._shown(*_NUMBER.unpack(number)))
            record = pack(number, cookie, length, kind) + name + _PADDING[length & 7]
            records.append(record)
            total += len(record)
            ends.append(total)
            cookie += 1
            position += stride

    def fitting(self, offset: int, size: int) -> tuple[bytes, int]:
        """Return as many entries after the first *offset* ones as fit into *size* bytes, and the last one's cookie."""
        ends = self._ends
        if offset >= len(ends):
            return b"", offset
        start = ends[offset]
        cookie = bisect_right(ends, start + size, offset) - 1
        return self.data[start : ends[cookie]], cookie

    def records(self, offset: int, end: int, size: int, each: int) -> list[bytes]:
        """Return ``struct fuse_dirent`` of as many entries as fit into *size* bytes.

        Args:
            offset: how many entries are passed over.
            end: behind which no more are returned.
            size: in bytes.
            each: what goes along with each entry, in bytes.
        """
        data, ends = self.data, self._ends[offset : end + 1]
        records = []
        for start, following in pairwise(ends):
            size -= following - start + each
            if size < 0:
                break
            records.append(data[start:following])
        return records


def name_of(record: bytes) -> bytes:
    """Return the name in one ``struct fuse_dirent``."""
    return record[wire.DIRENT.size :].rstrip(b"\0")


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
    # No earlier byte of the name may be NUL; what follows a name is not defined. Only the last few can be: records
    # are padded to words of eight bytes (filldir64() of Linux), so names in records of one size differ by less.
    for column in range(length - 1, max(length - _WORD, -1), -1):
        shorter = block[position + _NAME + column :: stride].find(0, 0, count)
        if shorter >= 0:
            count = shorter
    return min(count, (len(block) - position) // stride)


def _same(column: bytes, value: int) -> int:
    """Return how many bytes at the beginning of *column* are *value*."""
    return len(column) - len(column.lstrip(bytes((value,))))


def _columns(block: bytes, position: int, stride: int, length: int, count: int, cookie: int) -> tuple[bytearray, int]:
    """Return *count* records as ``struct fuse_dirent``, and the size of each."""
    size = wire.DIRENT.size + length + len(_PADDING[length & 7])
    end = position + count * stride
    out = bytearray(_DIRENT.pack(bytes(8), 0, length, 0).ljust(size, b"\0") * count)
    # Column by column: words of eight bytes while there are any, for which names are seen from where words begin.
    given = memoryview(block)
    numbers = given[position:end].cast("Q")
    names = given[position + _NAME % _WORD : end + _NAME % _WORD - _WORD].cast("Q")
    words = memoryview(out).cast("Q")
    step, given_step = size // _WORD, stride // _WORD
    words[::step] = numbers[::given_step]
    words[1::step] = memoryview(array("Q", range(cookie, cookie + count)))
    for word in range(length // _WORD):
        words[wire.DIRENT.size // _WORD + word :: step] = names[_NAME // _WORD + word :: given_step]
    for column in range(length // _WORD * _WORD, length):
        out[wire.DIRENT.size + column :: size] = block[position + _NAME + column : end : stride]
    out[_TYPE::size] = block[position + _HEAD.size - 1 : end : stride]
    return out, size
