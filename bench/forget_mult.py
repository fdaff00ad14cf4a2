"""Time ForgetMult, forward and backward: the loop of small autograd nodes, and ours.

Run as `python bench/forget_mult.py` from the repository's root.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.common import in_turns, print_heading, spread
from qrnn.forget_mult import forget_mult, forget_mult_loop

SHAPES = [(70, 20, 1550), (200, 128, 1840), (4096, 1, 1550)]


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args(argv)
    print_heading(
        f"forward and backward, float32; median of {args.runs} interleaved runs; bytes moved are "
        "9 N numbers of 4 bytes, N = seq_len * batch * hidden"
    )
    print("| seq_len, batch, hidden | way | ms | fastest to slowest | GB/s | times the loop |")
    print("|---|---|---|---|---|---|")
    for shape in SHAPES:
        torch.manual_seed(0)
        f = torch.rand(shape, requires_grad=True)
        x = torch.randn(shape, requires_grad=True)
        h = torch.randn(shape[1:], requires_grad=True)
        grad = torch.randn(shape)

        def step(function, f=f, x=x, h=h, grad=grad):
            return torch.autograd.grad(function(f, x, h), (f, x, h), grad)

        torch.testing.assert_close(step(forget_mult), step(forget_mult_loop), atol=1e-4, rtol=1e-4)
        seconds = in_turns(
            {
                "loop of autograd nodes": lambda step=step: step(forget_mult_loop),
                "ours": lambda step=step: step(forget_mult),
            },
            args.runs,
        )
        base = statistics.median(seconds["loop of autograd nodes"])
        for way, times in seconds.items():
            middle = statistics.median(times)
            rate = 9 * 4 * f.numel() / middle / 1e9
            print(f"| {shape} | {way} | {spread(times, 1e-3)} | {rate:.1f} | {base / middle:.2f} |")


if __name__ == "__main__":
    main()
