"""Time the softmax's cross-entropy with its gradient on a GPU, as one kernel and as operations.

Run as `python bench/cross_entropy.py` from the repository's root. Every way begins with the product
that makes the logits. The floor is that product, and the logits read and written once at the
bandwidth of a copy, both measured in the same run.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional

from bench.common import copy_bandwidth, input_sets, on_gpu, print_heading, spread
from fast import cross_entropy, linear
from fast.splitcross import _one_kernel, _operations
from qrnn import cuda
from run.device import keep_memory, select_device, set_precision

WANTED = {"gradient": True, "bias_gradient": True}
# Rows, vocabulary and embedding of a step: PTB, WikiText-2.
SHAPES = [(1400, 10_000, 400), (2800, 33_278, 400)]


def plain(inputs: Tensor, matrix: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the logits and of the bias through autograd."""
    logits = functional.linear(inputs, matrix, bias.to(inputs.dtype)).float().requires_grad_()
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient, gradient.sum(dim=0)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args(argv)
    keep_memory()
    device = select_device(None)
    if device.type != "cuda":
        sys.exit("bench/cross_entropy.py needs a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    if not cross_entropy.is_usable(device, torch.float32):
        sys.exit(f"the softmax's CUDA kernel is not there: {cuda.requirement()}")
    bandwidth = copy_bandwidth(device)
    print_heading(
        f"loss, gradient of the logits and of the bias; median of {args.runs} runs in turn; a "
        f"large copy moves {bandwidth / 1e9:.1f} GB/s",
        device,
    )
    print("| rows, vocabulary, precision | way | us | fastest to slowest | of the floor |")
    print("|---|---|---|---|---|")
    for (rows, ntoken, size), precision in ((s, p) for s in SHAPES for p in ("tf32", "bf16")):
        set_precision(precision, device)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        matrix = torch.randn(ntoken, size, device=device).mul_(0.1).to(dtype)
        bias = torch.zeros(ntoken, device=device)
        sets = [
            (torch.randn(rows, size, device=device).to(dtype),
             torch.randint(ntoken, (rows,), device=device))
            for _ in range(input_sets(rows * size * dtype.itemsize, device))
        ]  # fmt: skip
        ways = {
            "product": lambda x, t, m=matrix: linear.matmul(x, m.t()),
            "one kernel": lambda x, t, m=matrix, b=bias: _one_kernel(x, m, b, t, **WANTED),
            "operations": lambda x, t, m=matrix, b=bias: _operations(x, m, b, t, **WANTED),
            "cross_entropy, autograd": lambda x, t, m=matrix, b=bias: plain(x, m, b, t),
        }
        calls = {name: lambda k, way=way, sets=sets: way(*sets[k]) for name, way in ways.items()}
        seconds = on_gpu(calls, len(sets), args.runs)
        moved = 2 * rows * ntoken * dtype.itemsize
        floor = statistics.median(seconds["product"]) + moved / bandwidth
        for name, times in seconds.items():
            share = statistics.median(times) / floor
            what = f"{rows}, {ntoken}, {precision}"
            print(f"| {what} | {name} | {spread(times, 1e-6)} | {share:.2f} |")


if __name__ == "__main__":
    main()
