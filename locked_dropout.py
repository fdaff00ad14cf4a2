"""Locked (variational) dropout: one mask for a whole sequence.

"Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182, section 4.2.
"""

import torch
from torch import Tensor, nn


class LockedDropout(nn.Module):
    """Drop the same features at every time step of a sequence."""

    def forward(self, x: Tensor, dropout: float = 0.5) -> Tensor:
        """Return `x` (seq_len, batch, size) times one mask of shape (1, batch, size).

        The mask holds 0 with probability `dropout` and 1 / (1 - dropout) otherwise, drawn afresh at
        each call. In evaluation, or with `dropout` 0, `x` itself is returned.
        """
        if not self.training or not dropout:
            return x
        mask = torch.empty(1, x.size(1), x.size(2), dtype=x.dtype, device=x.device)
        mask.bernoulli_(1 - dropout).div_(1 - dropout)
        return x * mask
