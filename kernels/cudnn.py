"""cuDNN's LSTM and GRU, at the cost of one copy for weights that change at every call."""

from typing import Any

import torch
from torch import Tensor, nn


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


def run_from_one_buffer(
    module: nn.LSTM | nn.GRU, input: Tensor, hidden: Any = None
) -> tuple[Tensor, Any]:
    """`module(input, hidden)` for one layer in one direction, its weights copied to one buffer.

    cuDNN requires one buffer. The dropped weight is a new tensor at every call, so `module` itself
    would move its Parameters to a new buffer each time, or warn and copy. Both copy as many bytes,
    and moved Parameters lose the addresses that a CUDA graph has recorded. Autocast is disabled
    here: for cuDNN it converts everything to float16, whatever dtype is set, and gradients as small
    as a language model's would lose most of their digits.
    """
    lstm = isinstance(module, nn.LSTM)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    with torch.autocast(input.device.type, enabled=False):
        weights = list(_OneBuffer.apply(*(getattr(module, name) for name in names)))
        input = input.to(weights[0].dtype)
        if hidden is None:
            zeros = input.new_zeros(1, input.size(1), module.hidden_size)
            hidden = (zeros, zeros) if lstm else zeros
        options = (weights, True, 1, 0.0, module.training, False, False)
        if lstm:
            output, h, c = torch.lstm(input, hidden, *options)
            return output, (h, c)
        return torch.gru(input, hidden, *options)


def suits(module: nn.Module, input: Any) -> bool:
    """Whether `run_from_one_buffer` can, and should, replace the call of `module`."""
    return (
        # A subclass may have its own forward, which must run.
        type(module).forward in (nn.LSTM.forward, nn.GRU.forward)
        and isinstance(input, Tensor)
        and input.is_cuda
        and input.dim() == 3
        and (module.num_layers, module.bidirectional, module.proj_size) == (1, False, 0)
        and module.bias
        and not module.batch_first
        and torch.backends.cudnn.is_acceptable(input)
    )
