"""What belongs to the request that the front has in hand, for when a system call holds its thread up."""

from __future__ import annotations

from llloop.front.recovery.intents import Intents
from llloop.front.router import Router
from llloop.linux.credentials import restore_process_attributes

_Aside = tuple[tuple[int, int], tuple[int, int, bool]]


class FrontsInHand:
    """See `llloop.shared.leadership.InHand`.

    Args:
        attempts: has the request's note.
        router: has its slot.
    """

    def __init__(self, intents: Intents, router: Router) -> None:
        self._intents = intents
        self._router = router

    def set_aside(self, thread: int) -> _Aside:
        restore_process_attributes()  # the thread that is held up may act as somebody else
        return self._intents.set_aside(thread), self._router.set_aside()

    def exchange(self, other: _Aside) -> _Aside:
        return self._intents.exchange(other[0]), self._router.exchange(other[1])

    def finished(self) -> None:
        self._intents.finished()
        self._router.finished()
