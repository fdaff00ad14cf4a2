"""A text as the tokens of a model's vocabulary, and sums over scored tokens."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from data import EOS, Dictionary
from scoring.spelling import Spelling
from utils import ToolkitError, bits, perplexity


@dataclass(slots=True)
class Token:
    """A token of the text.

    `chars` is None where the kind of the tokens is not known. `logprob` is in nats, None where the
    token is not scored; `entropy`, if it was asked for, is that of the prediction, in bits.
    """

    word: str
    id: int
    line: int | str  # counted from 1, or the line's own id
    number: int  # its place in the line, counted from 1
    chars: int | None
    unknown: bool = False
    logprob: float | None = None
    entropy: float | None = None

    @property
    def bits(self) -> float | None:
        """The surprisal, `-log2 p`."""
        return None if self.logprob is None else bits(-self.logprob)


@dataclass
class Summary:
    """Sums over the scored tokens, by kind: `eos`, `unk` (read as <unk>) and other words.

    `unknown` counts the words outside the vocabulary; `logprobs` are in nats.
    """

    unk_id: int | None
    unit: str = "char"
    chars: int = 0
    unknown: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    logprobs: Counter[str] = field(default_factory=Counter)

    def add(self, tokens: Iterable[Token]) -> "Summary":
        """Add those of `tokens` that are scored, and return the summary."""
        for token in tokens:
            if token.logprob is None:
                continue
            kind = "eos" if token.word == EOS else "unk" if token.id == self.unk_id else "words"
            self.counts[kind] += 1
            self.logprobs[kind] += token.logprob
            self.unknown += token.unknown
            self.chars += token.chars or 0
        return self

    def numbers(self, chars: int | None = None) -> dict[str, float | None]:
        """The reported numbers by name; None if nothing was scored or a number is infinite.

        `chars`, if given, replaces the characters of the tokens.
        """
        tokens, logprob = self.counts.total(), sum(self.logprobs.values())
        loss = -logprob / tokens if tokens else math.nan
        chars = chars or self.chars
        values = {
            "tokens": tokens,
            f"{self.unit}s": chars or math.nan,
            "unknown": self.unknown,
            "logprob": logprob,
            "loss": loss,
            "ppl": perplexity(loss),
            "bits_per_token": bits(loss),
            f"bits_per_{self.unit}": bits(-logprob) / chars if chars else math.nan,
        }
        return _finite(values)

    def conventions(self, words: int | None = None) -> dict[str, float | None]:
        """Perplexities by other conventions, and the number of tokens in the mean of each.

        `ppl1` is SRILM's: <eos> is in the sum and not in the count. With `words`, the number of
        words of the original text, also the perplexity a word.
        """
        counts, logprobs = self.counts, self.logprobs
        known = logprobs["words"] + logprobs["eos"]
        cases = {
            "ppl_without_unk": (known, counts["words"] + counts["eos"]),
            "ppl_without_eos": (
                logprobs["words"] + logprobs["unk"],
                counts.total() - counts["eos"],
            ),
            "ppl1": (known, counts["words"]),
        }
        if words is not None:
            cases["ppl_per_word"] = (sum(logprobs.values()), words)
        values: dict[str, float] = {}
        for name, (logprob, count) in cases.items():
            values[name] = perplexity(-logprob / count) if count else math.nan
            values[name.replace("ppl", "tokens", 1)] = count
        return _finite(values)


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


class Reader:
    """Reads lines of text as tokens of a model's vocabulary; every line ends in one <eos>.

    A word that the vocabulary lacks gets the id of <unk>. With `ids` the first field of each line
    is its id, which is no token. `tokens` counts the tokens read, `outside` the words that the
    vocabulary lacks. Raises ToolkitError if the vocabulary lacks <eos>.
    """

    def __init__(self, dictionary: Dictionary, spelling: Spelling, ids: bool = False) -> None:
        if EOS not in dictionary.word2idx:
            raise ToolkitError(
                f"the model's vocabulary has no {EOS}: it cannot score lines of text"
            )
        self.dictionary = dictionary
        self.spelling = spelling
        self.ids = ids
        self.tokens = 0
        self.outside: Counter[str] = Counter()

    def blocks(self, lines: Iterable[str], size: float) -> Iterator[list[Token]]:
        """The tokens of successive whole lines, in lists of `size` tokens or a few more.

        Raises ToolkitError for a word that needs an <unk> which the vocabulary lacks, and with
        `ids` for an empty line.
        """
        block: list[Token] = []
        for number, line in enumerate(lines, start=1):
            block += self._line(line, number)
            if len(block) >= size:
                yield block
                block = []
        if block:
            yield block

    def _line(self, text: str, name: int | str) -> Iterator[Token]:
        known, unknown = self.dictionary.word2idx, self.dictionary.word2idx.get(self.dictionary.unk)
        words = text.split()
        if self.ids:
            if not words:
                raise ToolkitError(f"line {name} of the text is empty: --ids needs an id there")
            name = words.pop(0)
        before = ""
        for number, word in enumerate(words, start=1):
            size, outside = self.spelling.size(word, before), word not in known
            if outside:
                self.outside[word] += 1
                if unknown is None:
                    raise ToolkitError(
                        f"{word!r} in line {name} is outside the model's vocabulary, which has no "
                        f"{self.dictionary.unk} to take its place: write the text as the model's "
                        "corpus is written"
                    )
            yield Token(word, known.get(word, unknown), name, number, size, outside)
            before = word
        yield Token(EOS, known[EOS], name, len(words) + 1, self.spelling.size(EOS, before))
        self.tokens += len(words) + 1


def by_line(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens of each line in turn."""
    line: list[Token] = []
    for token in tokens:
        if line and token.number == 1:
            yield line
            line = []
        line.append(token)
    yield line


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def shown(value: float | None, places: int) -> str:
    """A number for a reader, with so many decimal places; - where there is none."""
    return "-" if value is None else f"{value:.{places}f}"
