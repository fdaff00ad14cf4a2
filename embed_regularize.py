"""Embedding dropout: whole words are dropped from a batch.

"Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182, section 4.3; first in
"A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", arXiv 1512.05287.
"""

import torch
from torch import Tensor, nn


def embedded_dropout(
    embed: nn.Embedding, words: Tensor, dropout: float = 0.1, scale: Tensor | None = None
) -> Tensor:
    """Look up `words` (seq_len, batch), whole rows of `embed` dropped: (seq_len, batch, emsize).

    A dropped word is zero wherever it occurs in `words`; others are scaled by 1 / (1 - dropout).
    `scale` (ntoken, 1) or (ntoken, emsize) multiplies the embedding matrix further, as in the
    original. Equal to looking up in `mask * embed.weight`, but only rows in use are touched.
    """
    output = embed(words)
    if dropout:
        weight = embed.weight
        mask = torch.empty(weight.size(0), 1, dtype=weight.dtype, device=weight.device)
        mask.bernoulli_(1 - dropout).div_(1 - dropout)
        output = output * mask[words]
    if scale is not None:
        output = output * scale[words]
    return output
