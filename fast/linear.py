"""nn.Linear through matrix products with aligned rows: the same results, faster.

On a CPU a product takes up to a third longer if the result's rows do not begin on cache lines, as
with 1150 or 1550 columns of float32 (`bench/parts.py alignment`). On a GPU the fastest products
require rows of operands and results that begin at multiples of 16 bytes. In bfloat16 on a CPU the
left operand must be row-major, with rows that begin on cache lines. Shapes stay unchanged: only the
row stride is rounded up. On AMD's CPUs with AVX-512 products in float32 are oneDNN's, in half the
time of MKL's, which PyTorch uses.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qrnn.check import numbers


class FastLinear(nn.Linear):
    """nn.Linear with aligned rows, where such a product is faster."""

    def forward(self, input: Tensor, with_bias: bool = True) -> Tensor:
        """From (..., in_features) to (..., out_features); `with_bias=False` omits the bias."""
        bias = self.bias if with_bias else None
        if not _pays(input, bias):
            return functional.linear(input, self.weight, bias)
        rows = input.reshape(-1, input.size(-1))
        y = _AlignedLinear.apply(rows, self.weight, bias)
        return y.view(*input.shape[:-1], y.size(1))


def _on_gpu(tensor: Tensor) -> bool:
    """Whether rows are aligned for a GPU; tests replace this function."""
    return tensor.is_cuda


def _pays(x: Tensor, bias: Tensor | None) -> bool:
    # torch.compile chooses the layout of its results itself.
    if torch.compiler.is_compiling():
        return False
    if _on_gpu(x):
        # PyTorch's own product adds the bias itself; an aligned one would need another pass.
        return bias is None
    wide = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return wide or in_bfloat16(x)


def in_bfloat16(tensor: Tensor) -> bool:
    """Whether products of `tensor` are in bfloat16 on a CPU, and not traced by torch.compile."""
    return (
        tensor.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and tensor.dtype != torch.float64
        and not torch.compiler.is_compiling()
    )


def empty(shape: tuple[int, int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised matrix with aligned rows; device and default dtype are those of `like`.

    Rows are aligned at 64 bytes on the CPU, a cache line, and at 16 on a GPU.
    """
    rows, columns = shape
    line = (16 if _on_gpu(like) else 64) // (dtype or like.dtype).itemsize
    return like.new_empty(rows, -(-columns // line) * line, dtype=dtype)[:, :columns]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices, with aligned rows; on a GPU unaligned operands are copied first.

    The rows are not aligned in bfloat16 on a CPU (see `low_rows`), nor if MKL is slow.
    """
    if _on_gpu(a):
        a, b = _operand(a), _operand(b)
    elif a.dtype == torch.bfloat16:
        return a @ b
    elif uses_onednn(a) and a.size(1):
        return _onednn(a, b)
    return torch.mm(a, b, out=empty((a.size(0), b.size(1)), a))


def uses_onednn(like: Tensor) -> bool:
    """Whether `matmul` of matrices like this one is oneDNN's, which cannot add to a matrix."""
    return like.dtype == torch.float32 and not _on_gpu(like) and _mkl_is_slow()


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices in float32 on a CPU, by oneDNN."""
    rows, inner, columns = *a.shape, b.size(1)
    # oneDNN copies a left operand that is transposed: the other one and the result may be smaller.
    swap = a.stride(0) == 1 and columns * (rows + inner) < rows * inner
    left, right = (b.t(), a) if swap else (a, b.t())
    product = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return transposed(product) if swap else product


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether the CPU is AMD's and has AVX-512, which MKL uses on Intel's CPUs only."""
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8")
    return amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _operand(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`matrix` itself if its rows or columns are aligned for a GPU, else an aligned copy."""
    if matrix.stride(0) == 1 < matrix.stride(1):
        return _operand(matrix.t(), dtype).t()
    dtype = dtype or matrix.dtype
    even = matrix.stride(1) == 1 and matrix.stride(0) * matrix.element_size() % 16 == 0
    if even and matrix.data_ptr() % 16 == 0 and matrix.dtype == dtype:
        return matrix
    return empty(matrix.shape, matrix, dtype).copy_(matrix)


def low_rows(matrix: Tensor) -> Tensor:
    """`matrix` in bfloat16, for the left side of a product: its rows begin on cache lines.

    oneDNN's product with AMX reads such rows beyond their ends, so the rest must be zeros: memory
    may hold nan.
    """
    result = empty(matrix.shape, matrix, torch.bfloat16)
    rows, columns = matrix.shape
    rest = result.stride(0) - columns
    result.as_strided((rows, rest), result.stride(), columns).zero_()
    return result.copy_(matrix)


def transposed(matrix: Tensor) -> Tensor:
    """`matrix.t()`, contiguous, on a CPU: copied block by block it takes a quarter of the time."""
    result = matrix.new_empty(matrix.size(1), matrix.size(0))
    for rows, columns in zip(matrix.split(128), result.split(128, dim=1), strict=True):
        columns.copy_(rows.t())
    return result


class _AlignedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _on_gpu(x):
            low = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
            x, weight = _operand(x, low or None), _operand(weight, low or None)
        elif in_bfloat16(x):
            x, weight = low_rows(x), weight.to(torch.bfloat16)
            if bias is not None:
                ctx.save_for_backward(x, weight)
                return torch.addmm(bias.to(torch.bfloat16), x, weight.t())
        ctx.save_for_backward(x, weight)
        y = matmul(x, weight.t())
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        low = grad.dtype == torch.bfloat16 and not _on_gpu(grad)
        columns = transposed if low else torch.t
        return (
            matmul(grad, weight) if need_x else None,
            matmul(columns(grad), x) if need_weight else None,
            grad.sum(dim=0) if need_bias else None,
        )


def compare(like: Tensor) -> Iterator[list[Tensor]]:
    """Outputs and gradients of FastLinear, then of nn.Linear."""
    for kind in (FastLinear, nn.Linear):
        layer = kind(33, 50).to(like)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(numbers(*p.shape, like=p))
        x = numbers(7, 3, 33, like=like, phase=1.0).requires_grad_()
        y = layer(x)
        y_later = layer(x, with_bias=False) + layer.bias if kind is FastLinear else layer(x)
        grads = torch.autograd.grad((y * y_later).sum(), [x, *layer.parameters()])
        yield [y, y_later, *grads]
