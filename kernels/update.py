"""The step of NT-ASGD (nt_asgd.py) as one CUDA kernel, `update.cu`: one pass over memory.

Algorithm 1 of "Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels import cuda

_SCALARS = {torch.float64: "double", torch.float32: "float"}
SOURCE = cuda.Source(
    Path(__file__).with_name("update.cu"), ("update",), "the optimiser's CUDA kernels"
)
THREADS = 256  # of a block
BLOCKS = 4  # on each multiprocessor, at most
ROWS = 64  # parameters a launch
CHUNK_BYTES = 32 * THREADS
# The kernel's Table has 2 KB: a launch takes at most 4 KB of arguments in all. CuPy 13 and 14 pass
# a numpy.ndarray of one element by value: class CNumpyArray in cupy/cuda/function.pyx gives the
# address of its data to cuLaunchKernel, which reads as many bytes as the kernel's parameter has.
# CuPy 13 refuses a scalar of the same dtype (numpy.void).
_ROW = np.dtype([(name, np.int64) for name in ("p", "gradient", "average", "count")])
TABLE = np.dtype([("rows", _ROW, ROWS)])


def suits(params: Sequence[Tensor]) -> bool:
    """Whether `update` supports `params`: contiguous, float32 or float64, on one GPU with CuPy."""
    first = params[0]
    return (
        first.is_cuda
        and first.dtype in _SCALARS
        and all(p.dtype == first.dtype and p.device == first.device for p in params)
        and all(p.is_contiguous() for p in params)
        and SOURCE.loads(first.device.index, compile_options(first.dtype))
    )


def compile_options(dtype: torch.dtype) -> tuple[str, ...]:
    """Compiler options for parameters of `dtype`."""
    return (
        f"-DSCALAR={_SCALARS[dtype]}",
        f"-DROWS={ROWS}",
        f"-DCHUNK={_chunk(dtype)}",
        f"-DTHREADS={THREADS}",
    )


def update(
    params: Sequence[Tensor],
    averages: Sequence[Tensor] | None,
    lr: float | Tensor,
    decay: float,
    scale: float | Tensor = 1.0,
    weight: float | Tensor = 0.0,
) -> None:
    """`p -= lr * (scale * gradient + decay * p)`, then `average += weight * (p - average)`.

    `params` are parameters that `suits` accepts; one without a gradient keeps its value. `averages`
    has a tensor of the same shape for each parameter, or is None. `lr`, `scale` and `weight` may be
    tensors of one element: the kernel reads them on the device as float32, so a recorded CUDA graph
    takes their new values.
    """
    device, dtype = params[0].device, params[0].dtype
    grads = [None if p.grad is None else p.grad.contiguous() for p in params]
    means = [None] * len(params) if averages is None else averages
    rows = [
        (*map(cuda.value, tensors), tensors[0].numel())
        for tensors in zip(params, grads, means, strict=True)
        if tensors[0].numel() and (tensors[1] is not None or tensors[2] is not None)
    ]
    # The kernel takes each number as a pair and uses the tensor if there is one.
    numbers = [
        (x.to(device, torch.float32), 0.0) if isinstance(x, Tensor) else (None, float(x))
        for x in (lr, scale, weight)
    ]
    factors = [cuda.value(x) for pair in numbers for x in pair]
    for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS]
        table = np.zeros(1, TABLE)
        table["rows"][0, : len(part)] = part
        chunks = sum(-(-count // _chunk(dtype)) for *_, count in part)
        grid = (min(chunks, BLOCKS * cuda.multiprocessors(device)),)
        arguments = (table, len(part), *factors, float(decay))
        SOURCE.launch("update", compile_options(dtype), device, grid, (THREADS,), arguments)
    # Lets autograd refuse a backward pass through parameters that have changed since.
    for tensor in (*params, *(averages or ())):
        torch.autograd.graph.increment_version(tensor)


def _chunk(dtype: torch.dtype) -> int:
    """Elements of one chunk, which a block of threads processes at a time."""
    return CHUNK_BYTES // dtype.itemsize
