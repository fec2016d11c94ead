"""llloop mirrors a directory at a mount point through FUSE.

    with llloop.mount("/host/data", "/mnt/c", workers=2) as mounted:
        ...

The `llloop` command does the same for administrators: `llloop serve SRC MNT`.
"""

from llloop.api import Mounted, mount, serve
from llloop.errors import LlloopError
from llloop.version import __version__

__all__ = ["LlloopError", "Mounted", "__version__", "mount", "serve"]
