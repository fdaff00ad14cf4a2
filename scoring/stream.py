"""Log-probabilities along one stream of tokens, with and without the continuous cache."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from continuous_cache import ContinuousCache
from loss import TrainingLoss
from model import Hidden
from utils import get_batch


class Piece(NamedTuple):
    """The model's results at n successive positions, of one stream or of several columns."""

    outputs: Tensor  # (n * columns, size): the last layer's raw outputs
    words: Tensor  # (n * columns,): the words that follow
    logprob: Tensor  # (n * columns,): log p of those words, in nats
    layers: Sequence[Tensor] = ()  # every layer's raw outputs, (n, columns, size)
    hidden: Hidden | None = None  # the state after these positions


@torch.inference_mode()
def pieces(
    network: TrainingLoss,
    source: Tensor,
    bptt: int,
    hidden: Hidden | None = None,
) -> Iterator[Piece]:
    """Run the network once over `source` (rows, columns), `bptt` rows at a time.

    The hidden state, first `hidden` or that of a text's start, is carried, so `bptt` changes only
    the size of the pieces. Together they hold every word but the first row's.
    """
    network.eval()
    model, criterion = network.model, network.criterion
    hidden = network.init_hidden(source.size(1)) if hidden is None else hidden
    for i in range(0, source.size(0) - 1, bptt):
        data, words = get_batch(source, i, bptt)
        output, hidden, raw, _ = model(data, hidden, return_h=True)
        logprob = criterion.target_logprob(model.decoder.weight, model.decoder.bias, output, words)
        yield Piece(raw[-1].flatten(0, 1), words, logprob, raw, hidden)


def with_cache(piece: Piece, cache: ContinuousCache, lambdasm: float) -> tuple[Tensor, Tensor]:
    """`log p` (n,) of the words under the mixture with `cache`, and where the cache is in use (n,).

    There `p = lambdasm * p_cache + (1 - lambdasm) * p_model`; elsewhere p is the model's alone. The
    piece is added to the cache.
    """
    p_cache, in_use = cache.target_prob(piece.outputs, piece.words)
    # In logarithms, so that the result is finite for words of tiny model probability.
    mixture = torch.logaddexp((lambdasm * p_cache).log(), piece.logprob + math.log1p(-lambdasm))
    return torch.where(in_use, mixture, piece.logprob), in_use
