"""The times at which the state of a run is saved."""

import contextlib
import time
from collections.abc import Callable, Iterator


class SaveClock:
    """Decides when the state of a run is saved; `clock` returns seconds.

    Within an epoch the state is saved every `every` seconds. At an epoch's end it is saved sooner,
    if the time since the last save is at least 49 times the duration of that save: short epochs
    then spend at most 2 % of the time on saving. It is also saved if nothing was saved before.
    """

    def __init__(self, every: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._clock = clock
        self._last = clock()
        self._took: float | None = None

    def due(self) -> bool:
        """Whether `every` seconds have passed since the last save."""
        return self._clock() - self._last >= self._every

    def due_at_epoch_end(self) -> bool:
        """Whether to save at an epoch's end."""
        return self._took is None or self.due() or self._clock() - self._last >= 49 * self._took

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A context that measures the duration of a save."""
        start = self._clock()
        yield
        self._last = self._clock()
        self._took = self._last - start
