"""Does zero padding to aligned rows pay? Rows of 1150 or 1550 float32 are no multiple of 16 bytes.

Run as `python bench/alignment.py` from the repository's root: on the GPU if there is one, else on
the CPU. Times the three products of a layer (forward, input's gradient, weight's gradient) at the
published widths, and at the next multiples of 4, 8, 16 and 64.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.common import in_turns, on_gpu, print_heading
from run.device import has_bf16, keep_memory, select_device, set_precision

# Rows, inputs and outputs for a unit of hidden width, by layer: a middle one of each cell.
LAYERS = {"LSTM 1150": (1150, 4), "QRNN 1550": (1550, 3)}
ROWS = 70 * 20


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--no-cuda", action="store_true", help="stay on the CPU")
    args = parser.parse_args(argv)
    keep_memory()
    device = select_device(False if args.no_cuda else None)
    print_heading(f"{ROWS} rows; median of {args.runs} runs in turn", device)
    print("| layer | precision | width | ms | x the published width |")
    print("|---|---|---|---|---|")
    for precision in ["fp32"] + ["tf32"] * (device.type == "cuda") + ["bf16"] * has_bf16(device):
        set_precision(precision, device)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for name, (width, parts) in LAYERS.items():
            widths = sorted({width, *(-(-width // to) * to for to in (4, 8, 16, 64))})
            calls = {}
            for n in widths:
                x, weight, grad = (
                    torch.randn(size, device=device).to(dtype)
                    for size in ((ROWS, n), (parts * n, n), (ROWS, parts * n))
                )

                def products(k: int = 0, x=x, weight=weight, grad=grad) -> None:
                    torch.mm(x, weight.t())
                    torch.mm(grad, weight)
                    torch.mm(grad.t(), x)

                calls[n] = products
            if device.type == "cuda":
                seconds = on_gpu(calls, 1, args.runs)
            else:
                seconds = in_turns(calls, args.runs)
            base = statistics.median(seconds[width])
            for n, times in seconds.items():
                middle = statistics.median(times)
                ratio = middle / base
                print(f"| {name} | {precision} | {n} | {middle * 1e3:.3f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
