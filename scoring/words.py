"""Which words the cache helps and hurts: a table and a figure."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from scoring import plotting


class Change(NamedTuple):
    """The cache's effect on a word over all of its occurrences."""

    word: str
    total: float  # the sum of the changes of log p, in nats
    count: int


def changes(gain: Tensor, words: Tensor, names: Sequence[str]) -> list[Change]:
    """The change of every word that occurs; the words the cache helps most come first.

    `gain` (n,) is the change of log p at each position, in nats, `words` (n,) the words there.
    """
    gains = defaultdict(list)
    for i, nats in zip(words.tolist(), gain.tolist(), strict=True):
        gains[i].append(nats)
    found = [Change(names[i], sum(some), len(some)) for i, some in gains.items()]
    return sorted(found, key=lambda change: -change.total)


def extremes(found: Sequence[Change], n: int) -> tuple[list[Change], list[Change]]:
    """The `n` words helped most and the `n` hurt most, strongest first; no word is in both."""
    helped = [change for change in found if change.total > 0]
    hurt = [change for change in reversed(found) if change.total < 0]
    return helped[:n], hurt[:n]


def print_words(helped: Sequence[Change], hurt: Sequence[Change], part: str) -> None:
    """Print the table of --by-word; `part` says which part of valid.txt is missing, if any."""
    for what, some in (("helps", helped), ("hurts", hurt)):
        print(
            f"| words of valid.txt that the cache {what} most: log p with it minus log p "
            f"without{part}"
        )
        print("|        sum |     mean |   count | word")
        for word, total, count in some:
            print(f"| {total:10.2f} | {total / count:8.3f} | {count:7d} | {word}")


def draw_words(helped: Sequence[Change], hurt: Sequence[Change], part: str, path: str) -> None:
    """Draw the figure of --plot, after arXiv 1708.02182: hurt words left, helped words right.

    `part` is that of `print_words`. Raises ToolkitError if it cannot be drawn.
    """
    rows = max(len(helped), len(hurt), 1)
    figure = plotting.figure_class()(figsize=(9, 1.4 + 0.24 * rows), layout="constrained")
    figure.suptitle(f"Words of valid.txt, with the continuous cache and without{part}")
    # One scale makes the two sides comparable.
    axes = figure.subplots(1, 2, sharex=True)
    for ax, some, colour, what, unit in (
        (axes[0], hurt, "#c0392b", "hurts", "lost"),
        (axes[1], helped, "#2471a3", "helps", "gained"),
    ):
        totals = [abs(change.total) for change in some]
        ax.barh(range(len(some)), totals, color=colour)
        # A dollar sign would start a formula.
        labels = [f"{change.word} ({change.count})".replace("$", r"\$") for change in some]
        ax.set_yticks(range(len(some)), labels)
        ax.set_ylim(rows - 0.4, -0.6)
        ax.set_title(f"words the cache {what} most")
        ax.set_xlabel(f"nats {unit} over all occurrences (their number)")
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    plotting.save(figure, path, "--plot")
