"""Softmax cross-entropy and its gradient as one CUDA kernel, `cross_entropy.cu`."""

from pathlib import Path

import torch
from torch import Tensor

from qrnn import cuda

SOURCE = cuda.Source(
    Path(__file__).with_name("cross_entropy.cu"), ("cross_entropy",), "the softmax's CUDA kernels"
)
THREADS = 512  # of a block
BLOCKS = 2  # on each multiprocessor, at most
# The default limit of shared memory per block: bias gradients of 12,000 columns in float32.
MOST_SHARED = 48 << 10


def is_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `loss_and_gradient_` supports `dtype` on `device`, which needs a GPU and CuPy."""
    return (
        device.type == "cuda"
        and dtype in cuda.SCALARS
        and not SOURCE.problem(device.index, compile_options(dtype))
    )


def compile_options(dtype: torch.dtype) -> tuple[str, ...]:
    """Compiler options for logits of `dtype`."""
    return f"-DSCALAR={cuda.SCALARS[dtype]}", f"-DTHREADS={THREADS}"


def loss_and_gradient_(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    gradient: bool = True,
    bias_gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of each row of `logits + bias`; its gradient overwrites `logits`.

    `logits` (n, ntoken) may have any row stride, `targets` (n,) are int64, `bias` is (ntoken,).
    Without `gradient` the logits stay unchanged. Returns the losses (n,) in nats, in float64 for
    float64 logits and else float32. With `bias_gradient` it also returns the gradient's sum over
    rows (ntoken,).
    """
    rows, columns = logits.shape
    wide = cuda.wide(logits.dtype)
    if logits.stride(1) != 1 and columns > 1:
        raise ValueError(f"the columns of logits must be contiguous, not {logits.stride()}")
    targets = targets.contiguous()
    bias = None if bias is None else bias.to(wide).contiguous()
    losses = _empty((rows,), logits, wide)
    blocks = min(rows, BLOCKS * cuda.multiprocessors(logits.device))
    shared = 4 * (THREADS // 32) * wide.itemsize
    per_vector = 16 // logits.dtype.itemsize
    with_sums = shared + -(-columns // per_vector) * per_vector * wide.itemsize
    sums = None
    if bias_gradient and with_sums <= MOST_SHARED:
        shared, sums = with_sums, _empty((blocks, columns), logits, wide)
    if rows:
        tensors = [cuda.value(t) for t in (bias, targets, losses, sums)]
        arguments = [logits.data_ptr(), logits.stride(0), *tensors, rows, columns, int(gradient)]
        options = compile_options(logits.dtype)
        SOURCE.launch(
            "cross_entropy", options, logits.device, (blocks,), (THREADS,), arguments, shared
        )
    if not bias_gradient:
        return losses, None
    return losses, (logits if sums is None else sums).sum(dim=0, dtype=wide)


def _empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)
