"""A flag that a signal's handler may set. `threading.Event` may not be: its `wait` holds a lock for moments, and a
handler that interrupts the thread in one of them waits in `set` for ever."""

from __future__ import annotations

import os
import select
import time


class Stop:
    """False, and from `set` on true. It may be set and waited for by any thread, and set by a signal's handler."""

    def __init__(self) -> None:
        self._set = False
        self._end, self._told = os.pipe()

    def __del__(self) -> None:
        os.close(self._end)
        os.close(self._told)

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        if not self._set:
            self._set = True
            os.write(self._told, b".")      # stays there: every wait sees it

    def wait(self, seconds: float) -> bool:
        """Wait until it is set, `seconds` at most; whether it is."""
        end = time.monotonic() + seconds
        while not self._set and (left := end - time.monotonic()) > 0:
            select.select([self._end], [], [], left)
        return self._set
