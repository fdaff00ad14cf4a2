"""Time a QRNN layer, forward and backward: its element-wise part, and all of it beside an LSTM.

Run as `python bench/qrnn_layer.py` from the repository's root: on the GPU if there is one, else, at
fewer shapes, on the CPU.
"""

import argparse
import itertools
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.common import (
    copy_bandwidth,
    in_turns,
    input_sets,
    need_kernels,
    on_gpu,
    print_heading,
    spread,
)
from qrnn import QRNNLayer
from qrnn.forget_mult import forget_mult, pool
from run.device import keep_memory, select_device, set_precision

SHAPES = {
    "cuda": [(70, 20, 1550), (140, 60, 2500), (200, 128, 1840), (4096, 4, 1024)],
    "cpu": [(70, 20, 400), (70, 20, 1550)],
}
WINDOWS = {
    "cuda": [(70, 20, 400, 1550), (140, 60, 400, 2500), (140, 60, 2500, 2500)],
    "cpu": [(70, 20, 400, 1550)],
}
# Also tf32: PyTorch's default is tf32 for an LSTM and float32 for a QRNN's matrix products.
PRECISIONS = {"cuda": ["fp32", "tf32"], "cpu": ["fp32"]}
# Fused: forward reads Z, F, O and writes h; backward reads Z, F, O and a gradient and writes three;
# one state in eight steps is written and read again.
TENSORS = 11.25


def unfused(y: Tensor, hidden: int) -> Tensor:
    """The element-wise part in separate operations, ForgetMult being one of them."""
    z, f, o = y.split(hidden, dim=2)
    return o.sigmoid() * forget_mult(f.sigmoid(), z.tanh())


def side_by_side(padded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The linear map of window 2 as the layer does it: `padded` is (seq_len + 1, batch, n_in)."""
    return functional.linear(torch.cat([padded[1:], padded[:-1]], dim=2), weight, bias)


def two_products(padded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same without the concatenation, as a product with each half of the weight."""
    now, before = weight.chunk(2, dim=1)
    y = functional.linear(padded[1:], now, bias).flatten(0, 1)
    return torch.addmm(y, padded[:-1].flatten(0, 1), before.t()).view(*padded[1:].shape[:2], -1)


def main(argv: list[str] | None = None) -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-cuda", action="store_true", help="stay on the CPU")
    args = parser.parse_args(argv)
    keep_memory()  # as the scripts do
    device = select_device(False if args.no_cuda else None)
    need_kernels(device)
    bandwidth = copy_bandwidth(device)

    def measure(calls, sets):
        if device.type == "cuda":
            return on_gpu(calls, sets, args.runs)
        turns = {way: lambda call=call: call(0) for way, call in calls.items()}
        return in_turns(turns, args.runs)

    print_heading(
        f"forward and backward, float32, no zoneout; median of {args.runs} runs in turn; the fused "
        f"element-wise part moves {TENSORS} N numbers of 4 bytes; a large copy moves "
        f"{bandwidth / 1e9:.1f} GB/s",
        device,
    )
    print("| seq_len, batch, hidden | element-wise part | us | fastest to slowest | of the copy |")
    print("|---|---|---|---|---|")
    for shape in SHAPES[device.type]:
        seq_len, batch, hidden = shape
        moved = int(TENSORS * 4 * seq_len * batch * hidden)
        # Z, F, O and the incoming gradient.
        count = input_sets(4 * 4 * math.prod(shape), device)
        ys = [
            torch.randn(seq_len, batch, 3 * hidden, device=device, requires_grad=True)
            for _ in range(count)
        ]
        grads = [torch.randn(shape, device=device) for _ in range(count)]
        ways = {
            "fused": lambda y: pool(y)[0],
            "unfused": lambda y, hidden=hidden: unfused(y, hidden),
        }
        calls = {
            way: lambda k, f=f, ys=ys, grads=grads: torch.autograd.grad(f(ys[k]), ys[k], grads[k])
            for way, f in ways.items()
        }
        torch.testing.assert_close(calls["fused"](0), calls["unfused"](0), atol=1e-4, rtol=1e-4)
        for way, times in measure(calls, count).items():
            share = moved / statistics.median(times) / bandwidth
            print(f"| {shape} | {way} | {spread(times, 1e-6)} | {share:.0%} |")

    print()
    print("| seq_len, batch, hidden | layer | ms | fastest to slowest | x nn.LSTM |")
    print("|---|---|---|---|---|")
    for precision, shape in itertools.product(PRECISIONS[device.type], SHAPES[device.type]):
        set_precision(precision, device)
        hidden = shape[2]
        x = torch.randn(shape, device=device, requires_grad=True)
        grad = torch.randn(shape, device=device)
        layers = {
            "QRNN, window 1": QRNNLayer(hidden, hidden).to(device),
            "QRNN, window 2": QRNNLayer(hidden, hidden, window=2).to(device),
            "nn.LSTM": nn.LSTM(hidden, hidden).to(device),
        }

        def step(layer, x=x, grad=grad):
            return torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], grad)

        calls = {name: lambda k, layer=layer: step(layer) for name, layer in layers.items()}
        seconds = measure(calls, 1)
        base = statistics.median(seconds["nn.LSTM"])
        for name, times in seconds.items():
            ratio = base / statistics.median(times)
            print(f"| {shape} | {name}, {precision} | {spread(times, 1e-3)} | {ratio:.2f} |")

    print()
    print("| seq_len, batch, input, hidden | window 2 | ms | fastest to slowest | x side by side |")
    print("|---|---|---|---|---|")
    for precision, sizes in itertools.product(PRECISIONS[device.type], WINDOWS[device.type]):
        set_precision("fp32", device)  # to compare the two ways
        seq_len, batch, n_in, hidden = sizes
        padded = torch.randn(seq_len + 1, batch, n_in, device=device, requires_grad=True)
        weight = torch.randn(3 * hidden, 2 * n_in, device=device, requires_grad=True)
        bias = torch.randn(3 * hidden, device=device, requires_grad=True)
        grad = torch.randn(seq_len, batch, 3 * hidden, device=device)
        inputs = (padded, weight, bias)
        calls = {
            way.__name__.replace("_", " "): lambda k, way=way, inputs=inputs, grad=grad: (
                torch.autograd.grad(way(*inputs), inputs, grad)
            )
            for way in (side_by_side, two_products)
        }
        for one, other in zip(calls["side by side"](0), calls["two products"](0), strict=True):
            torch.testing.assert_close(one, other, atol=2e-2, rtol=1e-3)
        set_precision(precision, device)
        seconds = measure(calls, 1)
        base = statistics.median(seconds["side by side"])
        for name, times in seconds.items():
            ratio = statistics.median(times) / base
            print(f"| {sizes} | {name}, {precision} | {spread(times, 1e-3)} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
