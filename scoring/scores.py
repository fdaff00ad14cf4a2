"""Surprisals and hidden states of a text, for score.py and in Python (docs/in-python.md)."""

import io
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from continuous_cache import ContinuousCache
from data import EOS, Dictionary
from loss import TrainingLoss
from model import Hidden
from scoring.spelling import Spelling
from scoring.stream import pieces, with_cache
from scoring.tokens import Reader, Token, by_line
from utils import bits

CHUNK = 1000


def surprisals(network: TrainingLoss, dictionary: Dictionary, text: str) -> list[Token]:
    """The tokens of `text`, with the surprisal of each as `token.bits`; each line ends in <eos>.

    The values are those of score.py: the first token is scored after one <eos>. Raises
    ToolkitError for words that a vocabulary without <unk> lacks.
    """
    tokens = _read(dictionary, text)
    scorer = Scorer(network, first=dictionary.word2idx[EOS])
    return [token for block in scorer.stream([tokens]) for token in block]


def hidden_states(network: TrainingLoss, dictionary: Dictionary, text: str) -> list[Tensor]:
    """The output of each layer after each token of `text`: (tokens, size), the first layer first.

    The tokens are those of `surprisals`; one <eos> is read before them.
    """
    first = dictionary.word2idx[EOS]
    return states_of(network, [first, *(token.id for token in _read(dictionary, text))], skip=1)


def states_of(
    network: TrainingLoss, ids: Sequence[int], skip: int = 0, bptt: int = CHUNK
) -> list[Tensor]:
    """The output of each layer after each of `ids` except the first `skip`: (n - skip, size)."""
    # The last word is the one that nothing follows.
    source = torch.tensor([*ids, ids[-1]], device=network.device).unsqueeze(1)
    runs = pieces(network, source, bptt)
    parts = [[layer.squeeze(1).cpu() for layer in piece.layers] for piece in runs]
    return [torch.cat(layer)[skip:] for layer in zip(*parts, strict=True)]


def _read(dictionary: Dictionary, text: str) -> list[Token]:
    reader = Reader(dictionary, Spelling.of(dictionary))
    # Any system's ends of lines, as score.py reads them.
    lines = io.StringIO(text, newline=None)
    return [token for block in reader.blocks(lines, math.inf) for token in block]


@dataclass
class Scorer:
    """Fills in the log p of tokens.

    `first` is read before a text; if it is None, a text's first token is an input only. `new_cache`
    makes the continuous cache, mixed in with the weight `lambdasm`; `used` counts the tokens at
    which it was in use. `entropy` asks for that of each prediction. `bptt` positions are computed
    at a time. `tick` gets the number of tokens done.
    """

    network: TrainingLoss
    first: int | None
    bptt: int = CHUNK
    new_cache: Callable[[], ContinuousCache] | None = None
    lambdasm: float = 0.0
    entropy: bool = False
    tick: Callable[[int], None] = lambda tokens: None
    used: int = 0

    def stream(self, blocks: Iterable[list[Token]]) -> Iterator[list[Token]]:
        """Each block of a text, once it is scored; the hidden state is carried through all."""
        cache = self.new_cache() if self.new_cache else None
        before, hidden = ([] if self.first is None else [self.first]), None
        for tokens in blocks:
            ids = [*before, *(token.id for token in tokens)]
            numbers, hidden = self._run([ids], hidden, cache)
            self._fill_in(tokens[1 - len(before) :], numbers[:, 0])
            before = ids[-1:]
            yield tokens

    def independent(self, tokens: list[Token]) -> list[Token]:
        """The tokens, each line scored on its own: lines of one length together, equal ones once.

        With the cache every line is a batch of its own. `first` must be a word.
        """
        texts = [tuple(token.id for token in line) for line in by_line(tokens)]
        times, by_length = Counter(texts), defaultdict(list)
        for text in times:
            by_length[len(text)].append(text)
        results = {}
        for length, group in by_length.items():
            size = 1 if self.new_cache else max(1, self.bptt // length)
            for start in range(0, len(group), size):
                part = group[start : start + size]
                cache = self.new_cache() if self.new_cache else None
                before = self.used
                numbers, _ = self._run([(self.first, *text) for text in part], None, cache)
                # A line that is there several times counts as often where the cache was in use.
                self.used += (self.used - before) * (times[part[0]] - 1)
                results.update(zip(part, numbers.unbind(1), strict=True))
        for line, text in zip(by_line(tokens), texts, strict=True):
            self._fill_in(line, results[text])
        return tokens

    @torch.inference_mode()
    def _run(
        self, rows: Sequence[Sequence[int]], hidden: Hidden | None, cache: ContinuousCache | None
    ) -> tuple[Tensor, Hidden | None]:
        """log p and entropy (n - 1, columns, 2) of every id after the first of each row (n,).

        The entropy is 0 unless it was asked for. Also returns the state at the end.
        """
        source, columns = torch.tensor(rows).t(), len(rows)
        # One tensor for all: a small result a piece between large ones that are freed would keep
        # the allocator from using their memory again.
        numbers = torch.zeros(len(source) - 1, columns, 2, dtype=torch.float64)
        at, network = 0, self.network
        each = max(1, self.bptt // columns)
        decoder, criterion = network.model.decoder, network.criterion
        for piece in pieces(network, source.to(network.device), each, hidden=hidden):
            hidden, logprob, n = piece.hidden, piece.logprob, len(piece.words) // columns
            if cache is not None:
                logprob, in_use = with_cache(piece, cache, self.lambdasm)
                self.used += int(in_use.sum())
            numbers[at : at + n, :, 0] = logprob.view(n, columns)
            if self.entropy:
                every = criterion.logprob(decoder.weight, decoder.bias, piece.outputs)
                # A probability of 0 adds nothing.
                terms = every.exp().mul_(every.clamp_(min=-1e4))
                numbers[at : at + n, :, 1] = -terms.sum(1).view(n, columns)
            self.tick(len(logprob))
            at += n
        return numbers, hidden

    def _fill_in(self, tokens: Sequence[Token], numbers: Tensor) -> None:
        for token, (logprob, entropy) in zip(tokens, numbers.tolist(), strict=True):
            token.logprob = logprob
            if self.entropy:
                token.entropy = bits(entropy)
