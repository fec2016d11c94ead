"""Coverage-guided fuzzing, by hand: `python -m tests.fuzz front|worker [-max_total_time=SECONDS ...]`.

Needs `pip install atheris`; what follows the name of what to fuzz goes to libFuzzer. It tries what
tests/unit/front/test_hostile_bytes.py tries, as long as it is let. A crash is kept in a file, which can be given to it
again.
"""

from __future__ import annotations

import logging
import os
import sys

import atheris

with atheris.instrument_imports(include=["llloop", "msgpack"]):
    from llloop.shared.messages import Operation, encode
    from tests.hostile import Choices, hostile_request
    from tests.unit.front.test_hostile_bytes import front, worker


def fuzz_front(data: bytes) -> None:
    """Send some requests; the front must still serve and not have changed anything outside its source."""
    choose = Choices(data)
    with front() as own:
        own.feed([hostile_request(choose, 2 * number, own.nodeids, own.handles) for number in range(1, 9)])
        assert own.outside.read_text() == "untouched"


def fuzz_worker(data: bytes) -> None:
    """Send two messages; the worker must still work."""
    with worker() as (own, _, writer, _):
        for message in (data[: len(data) // 2], data[len(data) // 2 :], encode((Operation.FSYNC, 77, -1, 1, 2))):
            if message:
                os.write(writer, message[:4096])
        os.close(writer)
        own.run()


if __name__ == "__main__":
    targets = {"front": fuzz_front, "worker": fuzz_worker}
    if len(sys.argv) < 2 or sys.argv[1] not in targets:
        sys.exit(__doc__)
    logging.disable()
    atheris.Setup([sys.argv[0], *sys.argv[2:]], targets[sys.argv[1]])
    atheris.Fuzz()
