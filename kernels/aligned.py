"""Matrix products on the CPU whose results have aligned rows: the same numbers, sooner.

Where rows of a result do not begin on cache lines, as with 1150 or 1550 columns of float32, the
product takes up to a third longer (bench/alignment.py). The sizes stay what they are; only the
distance from row to row is rounded up.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_LINE = 64  # bytes


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices on the CPU, its rows a whole number of cache lines apart."""
    columns = b.size(1)
    per_line = _LINE // a.element_size()
    row = -(-columns // per_line) * per_line
    return torch.mm(a, b, out=a.new_empty(a.size(0), row)[:, :columns])


class _AlignedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = matmul(x, weight.t())
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            matmul(grad, weight) if need_x else None,
            matmul(grad.t(), x) if need_weight else None,
            grad.sum(dim=0) if need_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear` of `x` (..., n_in): (..., n_out), with aligned rows on the CPU.

    `weight` is (n_out, n_in), `bias` (n_out,). On a GPU, under autocast or torch.compile, and in
    narrower types than float32 it is `functional.linear` itself.
    """
    narrow = x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu")
    # A compiler lays out its results itself.
    if x.device.type != "cpu" or narrow or torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)
    y = _AlignedLinear.apply(x.reshape(-1, x.size(-1)), weight, bias)
    return y.view(*x.shape[:-1], y.size(1))


class Linear(nn.Linear):
    """`nn.Linear` with the same parameters, through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """From (..., in_features) to (..., out_features)."""
        return linear(input, self.weight, self.bias)
