"""Time ForgetMult, forward and backward, against other ways to compute it.

Run as `python bench/forget_mult.py` from the repository's root: on the GPU if there is one, else on
the CPU.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.common import (
    copy_bandwidth,
    in_turns,
    input_sets,
    need_kernels,
    on_gpu,
    print_heading,
    spread,
)
from qrnn import cuda, definition
from qrnn.forget_mult import forget_mult
from run.device import keep_memory, select_device

SHAPES = [(70, 20, 1550), (140, 60, 2500), (200, 128, 1840), (4096, 1, 1550)]
# The tensors that our kernels move: forward reads f and x and writes h, backward reads f, x and the
# gradient and writes two; one state in eight steps is written and read again.
TENSORS = 8.25

# One thread per column, without prefetching: the state goes through memory at every step, and each
# step's loads wait for the step before, as in the first kernels for this recurrence.
NAIVE = r"""
extern "C" __global__ void forward(const float* f, const float* x, float* h,
                                   long long steps, long long columns) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= columns) return;
    for (long long t = 0; t < steps; ++t) {
        long long at = t * columns + i;
        h[at + columns] = f[at] * x[at] + (1.0f - f[at]) * h[at];
    }
}
extern "C" __global__ void backward(const float* f, const float* x, const float* h,
                                    const float* grad, float* running, float* grad_f, float* grad_x,
                                    long long steps, long long columns) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= columns) return;
    running[i] = 0.0f;
    for (long long t = steps - 1; t >= 0; --t) {
        long long at = t * columns + i;
        running[i] += grad[at];
        grad_f[at] = running[i] * (x[at] - h[at]);
        grad_x[at] = running[i] * f[at];
        running[i] *= 1.0f - f[at];
    }
}
"""


def naive_kernels() -> Callable[[Tensor, Tensor, Tensor], object]:
    """The serial kernels as a function of f, x and the incoming gradient."""
    import cupy

    module = cupy.RawModule(code=NAIVE, backend="nvrtc")
    forward, backward = module.get_function("forward"), module.get_function("backward")

    def step(f: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        steps, columns = f.size(0), f[0].numel()
        h = torch.empty(steps + 1, *f.shape[1:], device=f.device)
        h[0].zero_()
        grad_f, grad_x, running = torch.empty_like(f), torch.empty_like(f), torch.empty_like(f[0])
        size = (steps, columns)
        grid = ((columns + 255) // 256,)
        with cuda.on_stream(torch.cuda.current_stream().cuda_stream):
            tensors = [t.data_ptr() for t in (f, x, h)]
            forward(grid, (256,), (*tensors, *size))
            tensors += [t.data_ptr() for t in (grad, running, grad_f, grad_x)]
            backward(grid, (256,), (*tensors, *size))
        return grad_f, grad_x

    return step


def both_ways(function: Callable[..., Tensor], f: Tensor, x: Tensor, grad: Tensor) -> object:
    """Forward and backward of `function`."""
    return torch.autograd.grad(function(f, x), (f, x), grad)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-cuda", action="store_true", help="stay on the CPU")
    args = parser.parse_args(argv)
    keep_memory()  # as the scripts do
    device = select_device(False if args.no_cuda else None)
    need_kernels(device)
    bandwidth = copy_bandwidth(device)
    print_heading(
        f"forward and backward, float32, no initial state; median of {args.runs} runs in turn; "
        f"bytes that our kernels move: {TENSORS} N numbers of 4 bytes; a large copy moves "
        f"{bandwidth / 1e9:.1f} GB/s",
        device,
    )
    print(
        "| seq_len, batch, hidden | way | us | fastest to slowest | MB | of the copy | x slowest |"
    )
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        moved = int(TENSORS * 4 * shape[0] * shape[1] * shape[2])
        sets = []
        # f, x and the incoming gradient.
        for seed in range(input_sets(3 * 4 * math.prod(shape), device)):
            torch.manual_seed(seed)
            f = torch.rand(shape, device=device, requires_grad=True)
            x = torch.randn(shape, device=device, requires_grad=True)
            sets.append((f, x, torch.randn(shape, device=device)))
        ways = {"ours": forget_mult}
        if device.type == "cuda":
            ways["PyTorch operations"] = lambda f, x: forget_mult(f, x, use_cuda=False)
        calls = {
            way: lambda k, function=function, sets=sets: both_ways(function, *sets[k])
            for way, function in ways.items()
        }
        if device.type == "cuda":
            naive = naive_kernels()
            calls["naive serial kernel"] = lambda k, naive=naive, sets=sets: naive(*sets[k])
        loop = lambda k, sets=sets: both_ways(definition.forget_mult, *sets[k])  # noqa: E731
        expected = loop(0)
        # The nodes of 4,096 steps are too many for a graph.
        if device.type != "cuda" or shape[0] < 4096:
            calls["loop of autograd nodes"] = loop
        for call in calls.values():
            torch.testing.assert_close(call(0), expected, atol=1e-4, rtol=1e-4)
        if device.type == "cuda":
            seconds = on_gpu(calls, len(sets), args.runs)
        else:
            turns = {way: lambda call=call: call(0) for way, call in calls.items()}
            seconds = in_turns(turns, args.runs)
        slowest = max(statistics.median(times) for times in seconds.values())
        for way, times in seconds.items():
            middle = statistics.median(times)
            share = f"{moved / middle / bandwidth:.0%} | {slowest / middle:.2f}"
            print(f"| {shape} | {way} | {spread(times, 1e-6)} | {moved / 1e6:.0f} | {share} |")


if __name__ == "__main__":
    main()
