"""How the tokens of a vocabulary make up text: words, characters, bytes, pieces."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from data import EOS, Dictionary
from utils import ToolkitError

KINDS = ("words", "characters", "bytes", "pieces", "joined")
_MARKERS = ("@@", "\u2581", "##")


@dataclass(frozen=True)
class Spelling:
    """What the tokens are: `kind` is one of KINDS, or "" if the vocabulary does not show it.

    `marker` is that of pieces: `@@` ends a piece that is joined to the next, `##` begins one that
    is joined to the last, and U+2581 stands for a space. `note` says all this to a reader.
    """

    kind: str
    marker: str
    note: str

    @classmethod
    def of(cls, dictionary: Dictionary, given: str | None = None) -> "Spelling":
        """The kind that is `given`, or recorded, or that the vocabulary shows.

        Raises ToolkitError for pieces without a marker.
        """
        words = [word for word in dictionary.idx2word if not re.fullmatch("<.+>", word)]
        marked = {marker: sum(_has(marker, word) for word in words) for marker in _MARKERS}
        marker = max(_MARKERS, key=marked.__getitem__)
        kind = given or dictionary.tokens_are
        why = "as --tokens-are says" if kind else "as the vocabulary shows"
        kind = kind or _shown(dictionary, words, marked[marker])
        if not kind:
            return cls("", "", f"unclear: bits/char needs one of --tokens-are {' '.join(KINDS)}")
        if kind != "pieces":
            marks = kind == "characters" and any(len(word) > 1 for word in words)
            return cls(kind, "", f"{kind}{', some of several code points' * marks}, {why}")
        if marked[marker]:
            return cls(kind, marker, f"pieces with the marker {marker}, {why}")
        raise ToolkitError(
            "no word of the vocabulary has a marker of pieces (@@ at its end, \u2581 or ## at its "
            "front): give another --tokens-are"
        )

    @property
    def unit(self) -> str:
        """What `size` counts."""
        return "byte" if self.kind == "bytes" else "char"

    def line(self, words: Sequence[str]) -> str:
        """The words of a line as text, with spaces if the kind is unknown.

        A marker that joins nothing, such as a `@@` at the end, is text.
        """
        if self.kind == "bytes" and all(map(str.isdigit, words)):
            return bytes(map(int, words)).decode("utf-8", "replace")
        if self.marker == "\u2581":
            return "".join(words).replace(self.marker, " ").removeprefix(" ")
        if self.kind in ("characters", "bytes", "joined"):
            return "".join(words)
        text = " ".join(words)
        glue = {"": "", "@@": "@@ ", "##": " ##"}[self.marker]
        return text.replace(glue, "") if glue else text

    def size(self, word: str, before: str) -> int | None:
        """The characters, or bytes, that a word adds to its line after `before`, "" at the start.

        The end of a line, <eos>, is one. None if the kind is unknown.
        """
        if not self.kind:
            return None
        if word == EOS or self.kind in ("characters", "bytes"):
            return 1
        text = [before] if before else []
        return len(self.line([*text, word])) - len(self.line(text))


def _has(marker: str, word: str) -> bool:
    place = word.endswith(marker) if marker == "@@" else word.startswith(marker)
    return place and (marker == "\u2581" or len(word) > len(marker))


def _shown(dictionary: Dictionary, words: list[str], marked: int) -> str:
    """The kind that a vocabulary shows, "" if none is clear."""
    if all(re.fullmatch("[0-9]{1,3}", word) and int(word) < 256 for word in words):
        return ""
    if all(map(_is_character, words)):
        return "characters"
    # A corpus of words has few by chance, a vocabulary of pieces a fifth or more.
    if marked > 0.05 * len(words):
        return "pieces"
    counts = [dictionary.counter[dictionary.word2idx[word]] or 1 for word in words]
    single = sum(n for n, word in zip(counts, words, strict=True) if _is_character(word))
    # English text, with its punctuation, has about a fifth; Chinese words, which are not joined by
    # spaces, have a half, and characters with a written-out space more.
    return "" if single > sum(counts) / 3 else "words"


def _is_character(word: str) -> bool:
    """Whether a word is one character as a reader sees it: a code point with its marks."""
    return all(unicodedata.category(point)[0] == "M" for point in word[1:])
