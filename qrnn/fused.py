"""The recurrence of definition.py as one autograd node, in PyTorch's operations.

A loop of small autograd nodes takes two to four times as long. The gradients are written by hand.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qrnn import definition


def forget_mult(
    f: Tensor, x: Tensor, hidden_init: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """As definition.forget_mult."""
    if reverse:
        return forget_mult(f.flip(0), x.flip(0), hidden_init).flip(0)
    return _ForgetMult.apply(f, x, hidden_init)


pool = functools.partial(definition.pool, recurrence=forget_mult)


class _ForgetMult(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, x: Tensor, hidden_init: Tensor | None) -> Tensor:
        states = x.new_empty(len(x) + 1, *x.shape[1:])
        states[0] = 0 if hidden_init is None else hidden_init
        # Indexing a tensor at every step would cost as much as the step itself.
        rows = states.unbind()
        for h, x_t, f_t, out in zip(rows[:-1], x.unbind(), f.unbind(), rows[1:], strict=True):
            torch.lerp(h, x_t, f_t, out=out)
        ctx.save_for_backward(f, x, states)
        return states[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        f, x, states = ctx.saved_tensors
        # A copy, because the incoming gradient may be expanded and must not change.
        grad = torch.empty_like(x, memory_format=torch.contiguous_format).copy_(grad_output)
        keep = 1 - f
        rows, keeps = grad.unbind(), keep.unbind()
        for t in range(len(rows) - 2, -1, -1):
            rows[t].addcmul_(keeps[t + 1], rows[t + 1])
        grad_init = keeps[0] * rows[0] if ctx.needs_input_grad[2] else None
        # Reuses the memory of `keep`: new memory costs more than the arithmetic.
        grad_f = torch.sub(x, states[:-1], out=keep).mul_(grad)
        return grad_f, grad.mul_(f), grad_init
