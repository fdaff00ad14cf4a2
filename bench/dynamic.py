"""Time the update of dynamic evaluation at PTB's size, beside a loop over parameters.

Run as `python bench/dynamic.py` from the repository's root: on the GPU if there is one. The floor
is one pass at the bandwidth of a copy measured in the same run: weights, their start, root mean
squares and gradients read, and weights written.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.common import copy_bandwidth, in_turns, on_gpu, print_heading, spread
from fast.dynamic_evaluation import FastDynamicEvaluation
from model import RNNModel
from run.device import keep_memory, select_device

LR, LAMB, EPSILON = 5e-5, 2e-3, 2e-5


@torch.no_grad()
def loop(params: list[Tensor], starts: list[Tensor], rms: list[Tensor], mean: float) -> None:
    """The formula as one writes it, parameter by parameter."""
    for p, start, scale in zip(params, starts, rms, strict=True):
        pull = (LAMB * scale / mean).clamp(max=1.0)
        p += pull * (start - p) - LR * p.grad / (scale + EPSILON)


@torch.no_grad()
def foreach(params: list[Tensor], starts: list[Tensor], rms: list[Tensor], mean: float) -> None:
    """The same with operations on all parameters at once."""
    pulls = torch._foreach_mul(rms, LAMB / mean)
    torch._foreach_clamp_max_(pulls, 1.0)
    torch._foreach_lerp_(params, starts, pulls)
    divisors = torch._foreach_add(rms, EPSILON)
    torch._foreach_addcdiv_(params, [p.grad for p in params], divisors, value=-LR)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--no-cuda", action="store_true", help="stay on the CPU")
    args = parser.parse_args(argv)
    keep_memory()
    device = select_device(False if args.no_cuda else None)
    torch.manual_seed(0)
    model = RNNModel("LSTM", 10_000, 400, 1150, 3, tie_weights=True).to(device)
    params = list(model.parameters())
    rms = [torch.rand_like(p).mul_(1e-3) for p in params]
    for p in params:
        p.grad = torch.randn_like(p).mul_(1e-4)
    optimizer = FastDynamicEvaluation(params, rms, LR, LAMB, EPSILON)
    starts = [optimizer.state[p]["start"] for p in params]
    mean = torch.stack([scale.mean() for scale in rms]).mean().item()
    ways = {
        "DynamicEvaluation, one pass": optimizer.step,
        "all parameters at once": lambda: foreach(params, starts, rms, mean),
        "a loop over parameters": lambda: loop(params, starts, rms, mean),
    }
    count = sum(p.numel() for p in params)
    floor = 5 * 4 * count / copy_bandwidth(device)
    print_heading(
        f"the update of dynamic evaluation, PTB LSTM, {count:,} parameters, median of {args.runs} "
        f"runs in turn; the floor of one pass is {floor * 1e3:.2f} ms",
        device,
    )
    if device.type == "cuda":
        seconds = on_gpu(
            {way: lambda k, call=call: call() for way, call in ways.items()}, 1, args.runs
        )
    else:
        seconds = in_turns(ways, args.runs)
    ours = statistics.median(seconds["DynamicEvaluation, one pass"])
    print("| way | ms | fastest to slowest | of the floor | times ours |")
    print("|---|---|---|---|---|")
    for way, times in seconds.items():
        middle = statistics.median(times)
        print(f"| {way} | {spread(times, 1e-3)} | {middle / floor:.2f} | {middle / ours:.2f} |")


if __name__ == "__main__":
    main()
