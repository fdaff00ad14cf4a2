"""Time the QRNN: its recurrence ForgetMult, a layer's element-wise part, a layer beside an LSTM.

Run as `python bench/qrnn_layer.py` from the repository's root: on the GPU if there is one, else, at
fewer shapes, on the CPU.
"""

import functools
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from bench import common
from bench.common import print_head, print_row, spread
from qrnn import ForgetMult, QRNNLayer, definition
from qrnn.forget_mult import pool
from run.device import set_precision

try:  # flash-linear-attention, the package fla-core
    from fla.ops.hgrn import fused_recurrent_hgrn
except ImportError:
    fused_recurrent_hgrn = None

forget_mult = ForgetMult()
# (seq_len, batch, hidden)
RECURRENCES = [(70, 20, 1550), (140, 60, 2500), (200, 128, 1840), (4096, 1, 1550)]
LAYERS = {
    "cuda": [(70, 20, 1550), (140, 60, 2500), (200, 128, 1840), (4096, 4, 1024)],
    "cpu": [(70, 20, 400), (70, 20, 1550)],
}
# Also tf32: PyTorch's default is tf32 for an LSTM and float32 for a QRNN's matrix products.
PRECISIONS = {"cuda": ["fp32", "tf32"], "cpu": ["fp32"]}
# The tensors that the kernels move. ForgetMult: forward reads f and x and writes h, backward reads
# f, x and the gradient and writes two. A layer's: forward reads Z, F, O and writes h, backward
# reads Z, F, O and a gradient and writes three. One state in eight is written and read again.
FORGET_MULT_TENSORS, POOL_TENSORS = 8.25, 11.25

# The inputs of a function, and the gradient of its result.
Case = tuple[Sequence[Tensor], Tensor]


def case_numbers(nbytes: int, device: torch.device) -> range:
    """The numbers of as many cases of `nbytes` as fill the GPU's L2 cache twice; one on a CPU."""
    if device.type != "cuda":
        return range(1)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return range(max(2, 2 * cache // nbytes + 1))


def gradients(function: Callable[..., Tensor], cases: Sequence[Case], k: int) -> Any:
    """Forward and backward of a function on the k-th case."""
    inputs, grad = cases[k]
    return torch.autograd.grad(function(*inputs), inputs, grad)


def agreeing(
    functions: dict[str, Callable[..., Tensor]], cases: Sequence[Case]
) -> dict[str, Callable[[int], Any]]:
    """`gradients` of each function, after a check that they are the same."""
    calls = {way: functools.partial(gradients, f, cases) for way, f in functions.items()}
    expected, *others = (call(0) for call in calls.values())
    for other in others:
        torch.testing.assert_close(other, expected, atol=1e-4, rtol=1e-4)
    return calls


def hgrn(cases: Sequence[Case]) -> Callable[[int], Any]:
    """`gradients` of flash-linear-attention's recurrence, with respect to its own inputs.

    It takes f * x and log(1 - f), each (1, seq_len, batch * hidden), which are made here, untimed.
    """

    def recurrence(x: Tensor, g: Tensor) -> Tensor:
        return fused_recurrent_hgrn(x, g)[0]

    own = []
    for (f, x), grad in cases:
        inputs = [(f * x).flatten(1)[None].detach(), (1 - f).log().flatten(1)[None].detach()]
        own.append(([part.requires_grad_() for part in inputs], grad.flatten(1)[None]))
    (f, x), _ = cases[0]
    torch.testing.assert_close(
        recurrence(*own[0][0]).view_as(x), forget_mult(f, x), atol=1e-4, rtol=1e-4
    )
    return functools.partial(gradients, recurrence, own)


def time_recurrences(runs: int, bandwidth: float, device: torch.device) -> None:
    """Print the table of ForgetMult."""
    columns = ["us", "fastest to slowest", "MB", "of the copy", "x slowest"]
    print_head("seq_len, batch, hidden", "way", *columns)
    for shape in RECURRENCES:
        cases = []
        # f, x and the incoming gradient.
        for _ in case_numbers(3 * 4 * math.prod(shape), device):
            f = torch.rand(shape, device=device, requires_grad=True)
            x = torch.randn(shape, device=device, requires_grad=True)
            cases.append(((f, x), torch.randn(shape, device=device)))
        functions = {"ours": forget_mult}
        if device.type == "cuda":
            functions["PyTorch operations"] = functools.partial(forget_mult, use_cuda=False)
        # The nodes of 4,096 steps are too many for a graph.
        if device.type != "cuda" or shape[0] < 4096:
            functions["loop of autograd nodes"] = definition.forget_mult
        calls = agreeing(functions, cases)
        if device.type == "cuda" and fused_recurrent_hgrn is not None:
            calls["fused_recurrent_hgrn"] = hgrn(cases)
        seconds = common.measure(calls, device, runs, len(cases))
        slowest = max(statistics.median(times) for times in seconds.values())
        moved = FORGET_MULT_TENSORS * 4 * math.prod(shape)
        for way, times in seconds.items():
            middle = statistics.median(times)
            share = f"{moved / middle / bandwidth:.0%}"
            ratio = f"{slowest / middle:.2f}"
            print_row(shape, way, *spread(times, 1e-6), f"{moved / 1e6:.0f}", share, ratio)


def unfused(y: Tensor) -> Tensor:
    """A layer's element-wise part in separate operations, ForgetMult being one of them."""
    z, f, o = y.chunk(3, dim=2)
    return o.sigmoid() * forget_mult(f.sigmoid(), z.tanh())


def time_pools(runs: int, bandwidth: float, device: torch.device) -> None:
    """Print the table of a layer's element-wise part, which follows its linear map."""
    columns = ["us", "fastest to slowest", "of the copy"]
    print_head("seq_len, batch, hidden", "element-wise part", *columns)
    for shape in LAYERS[device.type]:
        seq_len, batch, hidden = shape
        cases = []
        # Z, F, O and the incoming gradient.
        for _ in case_numbers(4 * 4 * math.prod(shape), device):
            y = torch.randn(seq_len, batch, 3 * hidden, device=device, requires_grad=True)
            cases.append(((y,), torch.randn(shape, device=device)))
        calls = agreeing({"fused": lambda y: pool(y)[0], "unfused": unfused}, cases)
        moved = POOL_TENSORS * 4 * math.prod(shape)
        for way, times in common.measure(calls, device, runs, len(cases)).items():
            share = moved / statistics.median(times) / bandwidth
            print_row(shape, way, *spread(times, 1e-6), f"{share:.0%}")


def time_layers(runs: int, device: torch.device) -> None:
    """Print the table of a layer with as many inputs as outputs."""
    print_head("seq_len, batch, hidden", "layer", "ms", "fastest to slowest", "x nn.LSTM")
    for precision, shape in itertools.product(PRECISIONS[device.type], LAYERS[device.type]):
        set_precision(precision, device)
        size = shape[2]
        layers = {
            "QRNN, window 1": QRNNLayer(size, size),
            "QRNN, window 2": QRNNLayer(size, size, window=2),
            "nn.LSTM": nn.LSTM(size, size),
        }
        x = torch.randn(shape, device=device, requires_grad=True)
        grad = torch.randn(shape, device=device)

        def step(layer: nn.Module, k: int, x: Tensor = x, grad: Tensor = grad) -> None:
            torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], grad)

        calls = {way: functools.partial(step, layer.to(device)) for way, layer in layers.items()}
        seconds = common.measure(calls, device, runs)
        base = statistics.median(seconds["nn.LSTM"])
        for way, times in seconds.items():
            ratio = base / statistics.median(times)
            print_row(shape, f"{way}, {precision}", *spread(times, 1e-3), f"{ratio:.2f}")


def main(argv: list[str] | None = None) -> None:
    """Print the three tables."""
    args = common.build_parser(__doc__).parse_args(argv)
    device = common.prepare(args)
    common.need_kernels(device)
    bandwidth = common.copy_bandwidth(device)
    common.print_heading(
        f"forward and backward, float32, no initial state, no zoneout; median of {args.runs} runs "
        f"in turn; our kernels move {FORGET_MULT_TENSORS} N and, for a layer's element-wise part, "
        f"{POOL_TENSORS} N numbers of 4 bytes; a large copy moves {bandwidth / 1e9:.1f} GB/s",
        device,
    )
    if device.type == "cuda" and fused_recurrent_hgrn is None:
        print("not beside flash-linear-attention's recurrence: the package fla-core is missing")
    time_recurrences(args.runs, bandwidth, device)
    time_pools(args.runs, bandwidth, device)
    time_layers(args.runs, device)


if __name__ == "__main__":
    main()
