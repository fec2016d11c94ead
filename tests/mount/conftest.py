"""What tests of a mount share."""

from __future__ import annotations

import sys
import threading

# Coverage is measured in the servers that tests start. In the tests' own process it would take longer than these.
sys.settrace(None)
threading.settrace(None)
