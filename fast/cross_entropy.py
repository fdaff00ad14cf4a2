"""Softmax cross-entropy and its gradient as one CUDA kernel, `cross_entropy.cu`."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from qrnn import cuda

SOURCE = Path(__file__).with_name("cross_entropy.cu")
THREADS = 512  # of a block
BLOCKS = 2  # on each multiprocessor, at most
# The default limit of shared memory per block: bias gradients of 12,000 columns in float32.
MOST_SHARED = 48 << 10


@functools.cache
def is_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `loss_and_gradient_` works on `device`, which needs a GPU and CuPy.

    The kernel is compiled now, since a CUDA graph cannot record that.
    """
    if device.type != "cuda":
        return False
    try:
        cuda.kernel(SOURCE, "cross_entropy", compile_options(dtype), device)
    except RuntimeError:
        return False
    return True


def compile_options(dtype: torch.dtype) -> tuple[str, ...]:
    """Compiler options for logits of `dtype`."""
    return f"-DSCALAR={cuda.SCALARS[dtype]}", f"-DTHREADS={THREADS}"


def loss_and_gradient_(
    logits: Tensor, targets: Tensor, bias: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of each row of `logits + bias`; with `gradient` that overwrites `logits`.

    `logits` are (n, ntoken) in rows that begin at multiples of 16 bytes, `targets` (n,) int64,
    `bias` (ntoken,). Returns the losses (n,) in nats, in float64 for float64 logits and else
    float32, and with `gradient` the gradient's sum over rows (ntoken,).
    """
    rows, columns = logits.shape
    wide = cuda.wide(logits.dtype)
    per_vector = 16 // logits.itemsize
    bias = bias.to(wide).contiguous()
    if bias.data_ptr() % 16:
        bias = bias.clone()
    losses = logits.new_empty(rows, dtype=wide)
    multiprocessors = torch.cuda.get_device_properties(logits.device).multi_processor_count
    blocks = min(rows, BLOCKS * multiprocessors)
    shared = 4 * (THREADS // 32) * wide.itemsize
    with_sums = shared + -(-columns // per_vector) * per_vector * wide.itemsize
    sums = None
    if gradient and with_sums <= MOST_SHARED:
        shared, sums = with_sums, logits.new_empty(blocks, columns, dtype=wide)
    cuda.launch(
        SOURCE,
        "cross_entropy",
        compile_options(logits.dtype),
        logits.device,
        grid=blocks,
        block=THREADS,
        arguments=(
            *(logits, logits.stride(0), bias, targets.contiguous(), losses, sums),
            *(rows, columns, int(gradient)),
        ),
        shared=shared,
    )
    if not gradient:
        return losses, None
    return losses, (logits if sums is None else sums).sum(dim=0, dtype=wide)
