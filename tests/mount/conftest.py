"""What tests of a mount share."""

from __future__ import annotations

import sys
import threading

# Measure coverage only in the servers that tests start. In the process of the tests it would take too long.
sys.settrace(None)
threading.settrace(None)
