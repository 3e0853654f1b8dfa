"""SIGTERM and SIGINT as the end of a service.

The handler only notes that the end was asked for. ``threading.Event.set`` takes a lock: called in a handler at the
moment at which the main thread holds that lock, it would never return.
"""

from __future__ import annotations

import signal
import time

STEP_S = 0.1


class Ending:
    """From now on SIGTERM and SIGINT are noted and end nothing by themselves."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self._asked = True

    def wait(self, seconds: float = float("inf")) -> bool:
        """Sleep until the end is asked for, at most ``seconds``; whether it was."""
        until = time.monotonic() + seconds
        while not self._asked and (left := until - time.monotonic()) > 0:
            time.sleep(min(STEP_S, left))
        return self._asked
