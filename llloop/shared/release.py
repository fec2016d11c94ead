"""The ioctl by which `llloop control MNT release PATH` asks the front to close what it keeps open below a path.

It is made on an open mount point, so that the front answers it in the order of its requests.
"""

from __future__ import annotations

from struct import Struct

PATH_SIZE = 4096  # bytes: the path from the source, padded with NUL
_READ_WRITE = 3 << 30  # _IOC_READ | _IOC_WRITE, <asm-generic/ioctl.h>
RELEASE = _READ_WRITE | PATH_SIZE << 16 | ord("l") << 8 | 1

# The answer: how many files below the path programs have open, and how many descriptors the front has yet to close.
ANSWER = Struct("=II")
