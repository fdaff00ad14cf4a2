"""Apply the patches of docs/changing.md, also where somebody has added a line beside theirs."""

import re
from itertools import takewhile
from pathlib import Path


def apply(patch: str, tree: Path) -> None:
    """Apply a unified diff to the files of `tree`; raises ValueError for a place not found."""
    for section in re.split(r"^--- ", patch, flags=re.MULTILINE)[1:]:
        names, *hunks = re.split(r"^@@ -(\d+).*\n", section, flags=re.MULTILINE)
        path = tree / re.search(r"^\+\+\+ b/(.*)", names, re.MULTILINE)[1]
        lines = [] if names.startswith("/dev/null") else path.read_text("utf-8").splitlines()
        grown = 0
        for start, body in zip(hunks[::2], hunks[1::2], strict=True):
            changes = [(line[:1] or " ", line[1:]) for line in body.splitlines()]
            try:
                grown += _apply_hunk(lines, changes, int(start) - 1 + grown)
            except ValueError as error:
                raise ValueError(f"{path.name}: {error}") from None
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _apply_hunk(lines: list[str], changes: list[tuple[str, str]], start: int) -> int:
    """Change `lines` near `start`; returns by how many lines they grow.

    Without a place that has all context, a place with as much of it as possible is taken.
    """
    before, after = (
        len([*takewhile(lambda change: change[0] == " ", order)])
        for order in (changes, reversed(changes))
    )
    for left_out in range(before + after + 1):
        for first in range(max(0, left_out - after), min(before, left_out) + 1):
            part = changes[first : len(changes) - (left_out - first)]
            old, new = ([text for sign, text in part if sign != other] for other in "+-")
            places = range(len(lines) - len(old) + 1) if old or not lines else ()
            found = [n for n in places if lines[n : n + len(old)] == old]
            if found:
                place = min(found, key=lambda n: abs(n - start - first))
                lines[place : place + len(old)] = new
                return len(new) - len(old)
    raise ValueError(f"no place for the lines {[text for _, text in changes]}")
