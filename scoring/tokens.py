"""A text as the tokens of a model's vocabulary, and sums over scored tokens."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data import EOS, UNK, Dictionary
from utils import ToolkitError, bits, perplexity


@dataclass
class Token:
    """A token of the text; `logprob` is in nats, None where it is not scored."""

    word: str
    line: int  # counted from 1
    chars: int
    unknown: bool = False
    logprob: float | None = None


@dataclass
class Summary:
    """Sums over scored tokens; `logprob` in nats, `unknown` counts words outside the vocabulary."""

    tokens: int
    chars: int
    unknown: int
    logprob: float

    @classmethod
    def of(cls, tokens: Iterable[Token]) -> "Summary":
        """Sum up those of `tokens` that are scored."""
        scored = [token for token in tokens if token.logprob is not None]
        return cls(
            len(scored),
            sum(token.chars for token in scored),
            sum(token.unknown for token in scored),
            math.fsum(token.logprob for token in scored),
        )

    def numbers(self) -> dict[str, float | None]:
        """The reported numbers by name; None if nothing was scored or a number is infinite."""
        loss = -self.logprob / self.tokens if self.tokens else math.nan
        values = {
            "tokens": self.tokens,
            "chars": self.chars,
            "unknown": self.unknown,
            "logprob": self.logprob,
            "loss": loss,
            "ppl": perplexity(loss),
            "bits_per_token": bits(loss),
            "bits_per_char": bits(-self.logprob) / self.chars if self.chars else math.nan,
        }
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def is_character_level(dictionary: Dictionary) -> bool:
    """Whether each word is a character, or a byte as a decimal number; <...> are ignored."""
    words = [word for word in dictionary.idx2word if not re.fullmatch("<.*>", word)]
    single = all(len(word) == 1 for word in words)
    return single or all(re.fullmatch("[0-9]{1,3}", word) and int(word) < 256 for word in words)


def tokenize(text: str, dictionary: Dictionary) -> tuple[list[Token], Tensor]:
    """The tokens of `text` and their ids (n,); every line ends in one <eos>.

    A word that the vocabulary lacks gets the id of <unk>. Raises ToolkitError if the vocabulary
    lacks the <unk> that such a word needs, or <eos>.
    """
    if EOS not in dictionary.word2idx:
        raise ToolkitError(f"the model's vocabulary has no {EOS}: it cannot score lines of text")
    characters = is_character_level(dictionary)
    known = dictionary.word2idx
    unknown_id = known.get(UNK, -1)
    tokens, ids = [], []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        for position, word in enumerate(line.split()):
            chars = 1 if characters else len(word) + (position > 0)
            tokens.append(Token(word, number, chars, word not in known))
            ids.append(known.get(word, unknown_id))
        tokens.append(Token(EOS, number, 1))
        ids.append(known[EOS])
    outside = [token.word for token in tokens if token.unknown]
    if outside and unknown_id < 0:
        examples = ", ".join(map(repr, list(dict.fromkeys(outside))[:3]))
        raise ToolkitError(
            f"{counted(len(outside), 'token')} of {len(tokens)} "
            f"({counted(len(set(outside)), 'distinct word')}, such as {examples}) are outside the "
            f"model's vocabulary, which has no {UNK} to take their place: write the text as the "
            "model's corpus is written"
        )
    return tokens, torch.tensor(ids)


def by_line(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens of each line in turn."""
    line: list[Token] = []
    for token in tokens:
        if line and token.line != line[0].line:
            yield line
            line = []
        line.append(token)
    yield line


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
