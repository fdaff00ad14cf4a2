"""Log-probabilities along one stream of tokens, with and without the continuous cache."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from continuous_cache import ContinuousCache
from model import RNNModel
from splitcross import SplitCrossEntropyLoss
from utils import get_batch


class Piece(NamedTuple):
    """What the model says of some successive positions of a stream."""

    outputs: Tensor  # (n, size): the last layer's raw outputs
    words: Tensor  # (n,): the words that follow
    logprob: Tensor  # (n,): log p of those words, in nats


@torch.inference_mode()
def pieces(
    model: RNNModel,
    criterion: SplitCrossEntropyLoss,
    source: Tensor,
    bptt: int,
    max_batches: int | None = None,
) -> Iterator[Piece]:
    """Run the model once over `source` (rows, 1), `bptt` positions at a time.

    The hidden state is carried, so `bptt` changes nothing but the size of the pieces. Together they
    hold the `rows - 1` words that have one before them. `max_batches` stops early.
    """
    model.eval()
    hidden = model.init_hidden(1)
    for chunk, i in enumerate(range(0, source.size(0) - 1, bptt)):
        if chunk == max_batches:
            break
        data, words = get_batch(source, i, bptt)
        output, hidden, raw, _ = model(data, hidden, return_h=True)
        logprob = criterion.target_logprob(model.decoder.weight, model.decoder.bias, output, words)
        yield Piece(raw[-1].squeeze(1), words, logprob)


def joined(parts: Iterable[Piece]) -> Piece:
    """All pieces as one."""
    return Piece(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def mixture(logprob: Tensor, p_cache: Tensor, lambdasm: float) -> Tensor:
    """`log(lambdasm * p_cache + (1 - lambdasm) * exp(logprob))`, in nats, for any shape.

    In the logarithm, so that a word to which the model gives next to nothing stays finite.
    """
    log_lambda = math.log(lambdasm) if lambdasm else -math.inf
    return torch.logaddexp(p_cache.log() + log_lambda, logprob + math.log1p(-lambdasm))


def with_cache(piece: Piece, cache: ContinuousCache, lambdasm: float) -> tuple[Tensor, Tensor]:
    """`log p` (n,) of the words under the mixture with `cache`, and where that speaks (n,).

    Where it does not speak yet, the vocabulary's softmax counts alone. The cache remembers the
    piece.
    """
    p_cache, speaks = cache.target_prob(piece.outputs, piece.words)
    return torch.where(speaks, mixture(piece.logprob, p_cache, lambdasm), piece.logprob), speaks
