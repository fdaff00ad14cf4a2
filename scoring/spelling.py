"""How the tokens of a vocabulary make up text: words, characters, bytes, pieces."""

import re
import unicodedata
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
        kind, why = given or dictionary.tokens_are, "as --tokens-are says"
        if not kind:
            kind, why = _shown(dictionary, words, marked[marker]), "as the vocabulary shows"
        if not kind:
            return cls("", "", f"unclear: bits/char needs one of --tokens-are {' '.join(KINDS)}")
        if kind != "pieces":
            return cls(kind, "", f"{kind}, {why}")
        if not marked[marker]:
            raise ToolkitError(
                "no word of the vocabulary has a marker of pieces (@@ at its end, \u2581 or ## at "
                "its front): give another --tokens-are"
            )
        return cls(kind, marker, f"pieces with the marker {marker}, {why}")

    @property
    def unit(self) -> str:
        """What `size` counts."""
        return "byte" if self.kind == "bytes" else "char"

    def size(self, word: str, before: str) -> int | None:
        """The characters, or bytes, that a word adds to its line after `before`, "" at the start.

        A space between the two is counted. The end of a line, <eos>, is one; a `@@` before it joins
        nothing and counts as text. None if the kind is unknown.
        """
        if not self.kind:
            return None
        if self.kind in ("characters", "bytes"):
            return 1
        if word == EOS:
            return 1 + 2 * (self.marker == "@@" and _has("@@", before))
        if self.marker == "\u2581":
            return len(word) - (not before and word.startswith(self.marker))
        glued = {"": False, "@@": _has("@@", before), "##": _has("##", word)}[self.marker]
        space = bool(before) and not glued and self.kind != "joined"
        return len(word) - 2 * (bool(self.marker) and _has(self.marker, word)) + space


def _has(marker: str, word: str) -> bool:
    place = word.endswith(marker) if marker == "@@" else word.startswith(marker)
    return place and (marker == "\u2581" or len(word) > len(marker))


def _shown(dictionary: Dictionary, words: list[str], marked: int) -> str:
    """The kind that a vocabulary shows, "" if none is clear."""
    if all(word.isascii() and word.isdigit() and int(word) < 256 for word in words):
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
