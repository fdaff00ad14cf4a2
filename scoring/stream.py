"""Log-probabilities along one stream of tokens, with and without the continuous cache."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from continuous_cache import ContinuousCache
from loss import TrainingLoss
from model import Hidden
from utils import get_batch


class Step(NamedTuple):
    """The network's results at n successive positions of a text in columns."""

    output: Tensor  # (n * columns, size): the last layer's, for the criterion
    layers: list[Tensor]  # each layer's raw outputs, (n, columns, size)
    words: Tensor  # (n * columns,): the words that follow
    hidden: Hidden  # the state after the last position


class Piece(NamedTuple):
    """The model's results at successive positions of a stream."""

    outputs: Tensor  # (n, size): the last layer's raw outputs
    words: Tensor  # (n,): the words that follow
    logprob: Tensor  # (n,): log p of those words, in nats


@torch.inference_mode()
def steps(
    network: TrainingLoss,
    source: Tensor,
    bptt: int,
    hidden: Hidden | None = None,
    max_batches: int | None = None,
) -> Iterator[Step]:
    """Run the network once over `source` (rows, columns), `bptt` rows at a time.

    The hidden state, at first `hidden` or that of a text's start, is carried, so `bptt` changes
    only the size of the steps. Together they hold every word but the first row's. `max_batches`
    stops early.
    """
    network.eval()
    if hidden is None:
        hidden = network.init_hidden(source.size(1))
    for chunk, i in enumerate(range(0, source.size(0) - 1, bptt)):
        if chunk == max_batches:
            break
        data, words = get_batch(source, i, bptt)
        output, hidden, raw, _ = network.model(data, hidden, return_h=True)
        yield Step(output, raw, words, hidden)


def target_logprob(network: TrainingLoss, step: Step) -> Tensor:
    """`log p` (n * columns,) of a step's words, in nats."""
    decoder = network.model.decoder
    return network.criterion.target_logprob(decoder.weight, decoder.bias, step.output, step.words)


@torch.inference_mode()
def pieces(
    network: TrainingLoss, source: Tensor, bptt: int, max_batches: int | None = None
) -> Iterator[Piece]:
    """The steps of one stream, `source` (rows, 1)."""
    for step in steps(network, source, bptt, max_batches=max_batches):
        outputs = step.layers[-1].squeeze(1)
        yield Piece(outputs, step.words, target_logprob(network, step))


def joined(parts: Iterable[Piece]) -> Piece:
    """All pieces as one."""
    return Piece(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def mixture(logprob: Tensor, p_cache: Tensor, lambdasm: float) -> Tensor:
    """`log(lambdasm * p_cache + (1 - lambdasm) * exp(logprob))`, in nats, for any shape.

    Computed with logarithms, so that the result is finite for words of tiny model probability.
    """
    log_lambda = math.log(lambdasm) if lambdasm else -math.inf
    return torch.logaddexp(p_cache.log() + log_lambda, logprob + math.log1p(-lambdasm))


def with_cache(piece: Piece, cache: ContinuousCache, lambdasm: float) -> tuple[Tensor, Tensor]:
    """`log p` (n,) of the words under the mixture with `cache`, and where the cache is in use (n,).

    Where it is not, p is the model's alone. The piece is added to the cache.
    """
    p_cache, in_use = cache.target_prob(piece.outputs, piece.words)
    return torch.where(in_use, mixture(piece.logprob, p_cache, lambdasm), piece.logprob), in_use
