"""Time the optimiser's update at PTB's size on a GPU, as one kernel and as PyTorch's operations.

Run as `python bench/update.py` from the repository's root. The floor is one pass at the bandwidth
of a copy measured in the same run: parameters and gradients read and parameters written, and with
averaging the averages read and written too.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.common import copy_bandwidth, on_gpu, print_heading, spread
from bench.train_step import SETTINGS, without
from cli.device import keep_memory, select_device
from kernels import cuda
from kernels import update as kernel
from model import RNNModel
from nt_asgd import NTASGD


def way(optimizer: NTASGD, use_kernel: bool) -> Callable[[int], None]:
    """An update as a recorded step makes it: every number that changes is on the device."""
    device = optimizer.param_groups[0]["params"][0].device
    # PyTorch's operations scale the gradients in place; a scale of 1 leaves them unchanged.
    scale, weight = torch.ones((), device=device), torch.full((), 1e-3, device=device)

    def call(_: int) -> None:
        with without([] if use_kernel else ["update"]):
            optimizer.step(gradient_scale=scale, averaging_weight=weight)

    return call


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args(argv)
    keep_memory()
    device = select_device(None)
    if device.type != "cuda":
        sys.exit("bench/update.py needs a GPU")
    bandwidth = copy_bandwidth(device)
    print_heading(
        f"float32, gradients clipped, weight decay, rate and averaging weight on the device; "
        f"median of {args.runs} runs in turn; a large copy moves {bandwidth / 1e9:.1f} GB/s",
        device,
    )
    print("| parameters | averaging | way | us | fastest to slowest | of the floor | times ours |")
    print("|---|---|---|---|---|---|---|")
    for name in ("PTB QRNN", "PTB LSTM"):
        setting = SETTINGS[name]
        torch.manual_seed(0)
        sizes = (setting.ntoken, setting.emsize, setting.nhid, setting.nlayers)
        params = list(RNNModel(setting.cell, *sizes, tie_weights=True).to(device).parameters())
        for p in params:
            p.grad = torch.randn_like(p).mul_(1e-4)
        if not kernel.suits(params):
            sys.exit(f"the update's CUDA kernel is not there: {cuda.requirement()}")
        count = sum(p.numel() for p in params)
        for averaging in (False, True):
            optimizer = NTASGD(params, torch.full((), 1e-6, device=device), 1.2e-6)
            if averaging:
                optimizer.start_averaging()
            ways = {"ours": way(optimizer, True), "PyTorch's operations": way(optimizer, False)}
            seconds = on_gpu(ways, 1, args.runs)
            floor = (5 if averaging else 3) * 4 * count / bandwidth
            ours = statistics.median(seconds["ours"])
            for which, times in seconds.items():
                middle = statistics.median(times)
                print(
                    f"| {name}, {count:,} | {'yes' if averaging else 'no'} | {which} | "
                    f"{spread(times, 1e-6)} | {middle / floor:.2f} | {middle / ours:.2f} |"
                )


if __name__ == "__main__":
    main()
