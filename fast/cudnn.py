"""cuDNN's LSTM and GRU, at the cost of one copy for weights that change at every call."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from model import GRU, LSTM
from qrnn.check import cell_results
from weight_drop import WeightDrop


class _FromOneBuffer(nn.RNNBase):
    """The weights of a layer within a WeightDrop are copied to one buffer, which cuDNN requires.

    The dropped weight is a new tensor at every call, so PyTorch's own forward would move the
    Parameters to a new buffer each time, or warn and copy. Both copy as many bytes, and moved
    Parameters lose the addresses that a CUDA graph has recorded. Autocast is disabled here: for
    cuDNN it converts everything to float16, whatever dtype is set, and gradients as small as a
    language model's would lose most of their digits.
    """

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        # Without a dropped weight the Parameters stay in cuDNN's own buffer.
        dropped = "weight_hh_l0" not in self._parameters
        usable = hx is not None and input.dim() == 3 and torch.backends.cudnn.is_acceptable(input)
        if not (dropped and usable):
            return super().forward(input, hx)
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        with torch.autocast(input.device.type, enabled=False):
            weights = list(_OneBuffer.apply(*(getattr(self, name) for name in names)))
            arguments = {
                "input": input.to(weights[0].dtype),
                "hx": hx,
                "params": weights,
                "has_biases": True,
                "num_layers": 1,
                "dropout": 0.0,
                "train": self.training,
                "bidirectional": False,
                "batch_first": False,
            }
            if isinstance(self, nn.LSTM):
                output, h, c = torch.lstm(**arguments)
                return output, (h, c)
            return torch.gru(**arguments)


class FastLSTM(_FromOneBuffer, LSTM):
    """The cell LSTM within a WeightDrop, on a GPU."""


class FastGRU(_FromOneBuffer, GRU):
    """The cell GRU within a WeightDrop, on a GPU."""


class _OneBuffer(torch.autograd.Function):
    """Copies tensors end to end into one buffer, returned as views; gradients pass unchanged."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        buffer = torch.cat([tensor.flatten() for tensor in tensors])
        parts = buffer.split([tensor.numel() for tensor in tensors])
        return tuple(part.view_as(t) for part, t in zip(parts, tensors, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def compare(like: Tensor) -> Iterator[list[Tensor]]:
    """Outputs, states and gradients of FastLSTM and FastGRU, then of LSTM and GRU."""
    for kinds in ((FastLSTM, FastGRU), (LSTM, GRU)):
        cells = [WeightDrop(kind(8, 16, 0).to(like), ["weight_hh_l0"]) for kind in kinds]
        results = (cell_results(cell, like) for cell in cells)
        yield [part for parts in results for part in parts]
