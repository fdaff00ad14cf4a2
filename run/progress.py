"""A progress bar, drawn on a terminal only, and only if tqdm is installed."""

import sys
from typing import Any


class Bar:
    """A bar on standard error that counts `total` units; used as a context manager.

    Nothing is drawn in a file or a pipe, without tqdm, or if the bar is not `wanted`: of several
    processes only the first wants one.
    """

    def __init__(
        self, total: int | None, what: str, unit: str = "tok", *, wanted: bool = True
    ) -> None:
        self._bar: Any = None
        if not wanted or not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(
            total=total,
            desc=what,
            unit=unit,
            unit_scale=True,
            leave=False,
            # Without the counts, so that it fits 80 columns with the numbers of training.
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}"
            "{postfix}",
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.close()

    @property
    def shown(self) -> bool:
        """Whether the bar is drawn; numbers that cost time are needed only then."""
        return self._bar is not None

    def update(self, n: int, **numbers: str) -> None:
        """Advance by `n` units; `numbers`, such as `loss="4.61"`, are shown after the bar."""
        if self._bar is not None:
            if numbers:
                self._bar.set_postfix(numbers, refresh=False)
            self._bar.update(n)

    def to(self, n: int) -> None:
        """Advance to `n` units in total."""
        if self._bar is not None:
            self._bar.update(n - self._bar.n)

    def line(self, text: str) -> None:
        """Write a line to standard output, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            sys.stdout.write(f"{text}\n")
