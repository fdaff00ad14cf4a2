"""When the state of a run is written."""

import contextlib
import time
from collections.abc import Callable, Iterator


class SaveClock:
    """Says when the state of a run is to be written; `clock` gives seconds.

    Within an epoch every `every` seconds. At an epoch's end sooner, if the time since the last
    write is at least 49 times what that write took: short epochs then spend at most a fiftieth of
    the time on writing. An epoch's end before which nothing was written is always worth a write.
    """

    def __init__(self, every: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._clock = clock
        self._last = clock()
        self._took: float | None = None

    def due(self) -> bool:
        """Whether it is time for a write, wherever the run stands."""
        return self._clock() - self._last >= self._every

    def due_at_epoch_end(self) -> bool:
        """Whether an epoch's end is to be written."""
        return self._took is None or self.due() or self._clock() - self._last >= 49 * self._took

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """To be held during a write, to measure it."""
        start = self._clock()
        yield
        self._last = self._clock()
        self._took = self._last - start
