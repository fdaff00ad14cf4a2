"""Matrix products with aligned rows: the same results, faster.

On a CPU a product takes up to a third longer if the result's rows do not begin on cache lines, as
with 1150 or 1550 columns of float32 (bench/alignment.py). On a GPU the fastest products require
rows of operands and results that begin at multiples of 16 bytes. Shapes stay unchanged: only the
row stride is rounded up.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def suits(tensor: Tensor) -> bool:
    """Whether products of `tensor` get rows aligned for a GPU; benchmarks replace this function."""
    return tensor.is_cuda


def row(columns: int, like: Tensor, dtype: torch.dtype | None = None) -> int:
    """The stride of aligned rows of `columns` elements, in elements.

    Rows are aligned at 64 bytes on the CPU, a cache line, and at 16 on a GPU.
    """
    line = 16 if suits(like) else 64 if like.device.type == "cpu" else 1
    elements = max(1, line // (dtype or like.dtype).itemsize)
    return -(-columns // elements) * elements


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor with aligned rows; device and default dtype are those of `like`."""
    columns = shape[-1]
    padded = (*shape[:-1], row(columns, like, dtype))
    return like.new_empty(padded, dtype=dtype)[..., :columns]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices, with aligned rows; on a GPU unaligned operands are copied first."""
    if suits(a):
        a, b = _operand(a), _operand(b)
    return torch.mm(a, b, out=empty((a.size(0), b.size(1)), a))


def dropout(weight: Tensor, p: float) -> Tensor:
    """`functional.dropout` of a matrix, in training; the result's rows are aligned."""
    return _AlignedDropout.apply(weight, p)


def _operand(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`matrix` itself if its rows or columns are aligned for a GPU, else an aligned copy."""
    if matrix.stride(0) == 1 < matrix.stride(1):
        return _operand(matrix.t(), dtype).t()
    dtype = dtype or matrix.dtype
    even = matrix.stride(1) == 1 and matrix.stride(0) * matrix.element_size() % 16 == 0
    if even and matrix.data_ptr() % 16 == 0 and matrix.dtype == dtype:
        return matrix
    return empty(matrix.shape, matrix, dtype).copy_(matrix)


class _AlignedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if suits(x):
            low = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
            x, weight = _operand(x, low or None), _operand(weight, low or None)
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


class _AlignedDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, p: float) -> Tensor:
        mask = torch.empty_like(weight, dtype=torch.bool).bernoulli_(1 - p)
        ctx.save_for_backward(mask)
        ctx.scale = 1 / (1 - p)
        out = empty(weight.shape, weight)
        return torch.addcmul(weight.new_zeros(()), weight, mask, value=ctx.scale, out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.ops.aten.native_dropout_backward(grad, mask, ctx.scale), None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear` of `x` (..., n_in): (..., n_out), with aligned rows.

    `weight` is (n_out, n_in), `bias` (n_out,). Under torch.compile, on a GPU with a bias, and on
    the CPU in narrower types than float32, it is `functional.linear` itself.
    """
    # On a GPU PyTorch's own product adds the bias itself; an aligned one needs another pass.
    plain = bias is not None
    if not suits(x):
        narrow = x.dtype not in (torch.float32, torch.float64)
        plain = x.device.type != "cpu" or narrow or torch.is_autocast_enabled("cpu")
    # torch.compile chooses the layout of its results itself.
    if plain or torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)
    y = _AlignedLinear.apply(x.reshape(-1, x.size(-1)), weight, bias)
    return y.view(*x.shape[:-1], y.size(1))


class Linear(nn.Linear):
    """`nn.Linear` with the same parameters, through `linear`."""

    def forward(self, input: Tensor, with_bias: bool = True) -> Tensor:
        """From (..., in_features) to (..., out_features); `with_bias=False` omits the bias."""
        return linear(input, self.weight, self.bias if with_bias else None)
