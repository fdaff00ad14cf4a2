"""Time a whole training step at the published sizes, beside plain nn.LSTM and its matrix products.

Run as `python bench/train_step.py` from the repository's root: on the GPU if there is one, else,
with fewer columns, on the CPU. A step is forward, loss, backward, clipping and update.

The floor is the step's matrix products alone, each as large as it can be, measured in the same run
and precision: an LSTM's recurrent products, which must go step by step, count as one of all steps.
"""

import argparse
import gc
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import fast
from bench.common import in_turns, need_kernels, print_heading
from locked_dropout import LockedDropout
from loss import TrainingLoss
from model import make_network
from nt_asgd import NTASGD
from run.device import has_bf16, keep_memory, select_device, set_precision
from splitcross import default_splits
from training import TrainingStep


@dataclass
class Setting:
    """A published model and batch: dropouts are output, between layers, input, words, weights."""

    cell: str
    ntoken: int
    emsize: int
    nhid: int
    nlayers: int
    batch: int
    bptt: int
    rates: tuple[float, float, float, float, float]
    adam: bool = False

    def sizes(self) -> list[tuple[int, int]]:
        """Input and output size of every layer."""
        sizes = [self.emsize] + [self.nhid] * (self.nlayers - 1) + [self.emsize]
        return list(itertools.pairwise(sizes))


SETTINGS = {
    "PTB LSTM": Setting("LSTM", 10_000, 400, 1150, 3, 20, 70, (0.4, 0.25, 0.4, 0.1, 0.5)),
    "PTB QRNN": Setting("QRNN", 10_000, 400, 1550, 4, 20, 70, (0.4, 0.3, 0.4, 0.1, 0.1)),
    "WT2 LSTM": Setting("LSTM", 33_278, 400, 1150, 3, 80, 70, (0.4, 0.2, 0.65, 0.1, 0.5)),
    "WT2 QRNN": Setting("QRNN", 33_278, 400, 1550, 4, 40, 70, (0.4, 0.2, 0.4, 0.1, 0.1)),
    "WT103 QRNN": Setting(
        "QRNN", 267_735, 400, 2500, 4, 60, 140, (0.1, 0.1, 0.1, 0.0, 0.0), adam=True
    ),
}
# Modules of fast/ that a row can leave out.
FORMS = ("weight_drop", "linear", "splitcross", "nt_asgd", "step", "qrnn")
# PTB, on which the ratios are claimed, is at its full size on the CPU too.
CPU_COLUMNS = {"WT2 LSTM": 8, "WT2 QRNN": 8, "WT103 QRNN": 2}


class PlainLSTM(nn.Module):
    """The LSTM as written with PyTorch alone: functional dropout on the weights, cross-entropy."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.rates = setting.rates
        self.encoder = nn.Embedding(setting.ntoken, setting.emsize)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        self.bias = nn.Parameter(torch.zeros(setting.ntoken))
        self.layers = nn.ModuleList(nn.LSTM(*size) for size in setting.sizes())
        self.lockdrop = LockedDropout()

    def forward(self, data: Tensor, targets: Tensor, hidden: list) -> tuple[Tensor, list]:
        """The loss with AR and TAR, and the new hidden state."""
        last, between, first, words, weights = self.rates
        embedded = self.encoder.weight * functional.dropout(
            self.encoder.weight.new_ones(self.encoder.weight.size(0), 1), words
        )
        output = self.lockdrop(functional.embedding(data, embedded), first)
        states = []
        for i, layer in enumerate(self.layers):
            flat = [
                layer.weight_ih_l0,
                functional.dropout(layer.weight_hh_l0, weights),
                layer.bias_ih_l0,
                layer.bias_hh_l0,
            ]
            with warnings.catch_warnings():
                # On a GPU PyTorch warns that it copies these weights at every call.
                warnings.simplefilter("ignore")
                raw, h, c = torch.lstm(output, hidden[i], flat, True, 1, 0.0, True, False, False)
            states.append((h.detach(), c.detach()))
            output = self.lockdrop(raw, last if i == len(self.layers) - 1 else between)
        logits = functional.linear(output.flatten(0, 1), self.encoder.weight, self.bias)
        loss = functional.cross_entropy(logits, targets)
        return loss + 2 * output.pow(2).mean() + (raw[1:] - raw[:-1]).pow(2).mean(), states


def plain_step(setting: Setting, source: Tensor) -> Callable[[], None]:
    """Its step with clip_grad_norm_ and torch.optim.SGD."""
    model = PlainLSTM(setting).to(source.device)
    optimizer = torch.optim.SGD(model.parameters(), 30.0, weight_decay=1.2e-6)
    zeros = [source.new_zeros(1, setting.batch, n, dtype=torch.float32) for _, n in setting.sizes()]
    hidden = [(z, z) for z in zeros]

    def step() -> None:
        nonlocal hidden
        optimizer.zero_grad(set_to_none=True)
        text = source[: setting.bptt + 1].long()
        loss, hidden = model(text[:-1], text[1:].flatten(), hidden)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()

    return step


def our_step(
    setting: Setting,
    source: Tensor,
    precision: str,
    *,
    graphs: bool = False,
    plain: bool = False,
    leave_out: Collection[str] = (),
) -> tuple[Callable[[], None], TrainingStep]:
    """A step as main.py makes it: the call, and the TrainingStep that it calls."""
    torch.manual_seed(0)
    names = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")
    model, criterion = make_network(
        default_splits(setting.ntoken),
        rnn_type=setting.cell,
        ntoken=setting.ntoken,
        ninp=setting.emsize,
        nhid=setting.nhid,
        nlayers=setting.nlayers,
        tie_weights=True,
        **dict(zip(names, setting.rates, strict=True)),
    )
    penalties = {} if setting.adam else {"alpha": 2.0, "beta": 1.0}
    network = TrainingLoss(model, criterion, **penalties, bf16=precision == "bf16")
    network.to(source.device)
    if setting.adam:
        optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    else:
        optimizer = NTASGD(network.parameters(), 30.0, 1.2e-6)
    step = TrainingStep(network, optimizer, source, bptt=setting.bptt, clip=0.25)
    bf16 = network.bf16
    lines = fast.choose(network, optimizer, step, plain=plain, bf16=bf16, leave_out=leave_out)
    lines += [fast.record_steps(step)] if graphs else []
    print(*filter(None, lines[1:]), sep="\n", end="")

    def take() -> None:
        step.row = 0
        step.take(setting.bptt, setting.bptt)

    return take, step


def recorded(call: Callable[[], None], step: TrainingStep) -> str:
    """How a step with CUDA graphs really runs: "graphs", unless its recording failed."""
    for _ in range(3):  # eager, recorded, replayed
        call()
    return "graphs" if getattr(step, "_replays", None) else "eager (recording failed)"


def products(
    sizes: list[tuple[int, int, int]], device: torch.device, precision: str
) -> Callable[[], None]:
    """The step's matrix products: forward, the input's gradient and the weight's gradient."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    operands = [
        [torch.randn(size, device=device).to(dtype) for size in ((n, k), (m, k), (n, m))]
        for n, k, m in sizes
    ]

    def run() -> None:
        for x, weight, grad in operands:
            torch.mm(x, weight.t())
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)

    return run


def counts(setting: Setting, step: TrainingStep) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of each forward product; the softmax's depend on the targets."""
    rows = setting.bptt * setting.batch
    result = []
    for i, (n_in, n_out) in enumerate(setting.sizes()):
        if setting.cell == "QRNN":
            result.append((rows, n_in * (2 if i == 0 else 1), 3 * n_out))
        else:
            result += [(rows, n_in, 4 * n_out), (rows, n_out, 4 * n_out)]
    splits = step.network.criterion.splits[1:]
    if not splits:
        return [*result, (rows, setting.emsize, setting.ntoken)]
    targets = step.source[1 : setting.bptt + 1].flatten()
    result.append((rows, setting.emsize, splits[0] + len(splits)))
    for start, end in zip(splits, [*splits[1:], setting.ntoken], strict=True):
        inside = int(((targets >= start) & (targets < end)).sum())
        if inside:
            result.append((inside, setting.emsize, end - start))
    return result


def ids(setting: Setting, device: torch.device) -> Tensor:
    """Word ids (bptt + 1, batch), frequent ones more often, as in a text sorted by frequency."""
    torch.manual_seed(1)
    uniform = torch.rand(setting.bptt + 1, setting.batch)
    # Zipf's law: the logarithm of the rank is uniform.
    return (setting.ntoken**uniform - 1).int().clamp(max=setting.ntoken - 1).to(device)


def on_gpu(ways: dict[str, Callable[[], None]], runs: int) -> dict[str, list[float]]:
    """Seconds per step of each variant, on host and device: `runs` rounds of 20 steps."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for call in ways.values():
        for _ in range(3):  # eager, recorded, replayed
            call()
    for _ in range(runs):
        for way, call in ways.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                call()
            torch.cuda.synchronize()
            seconds[way].append((time.perf_counter() - start) / 20)
    return seconds


def peak_memory(call: Callable[[], None], device: torch.device) -> float:
    """Peak megabytes that one more step allocates beyond those in use before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest / 1e6


def ways_of(
    setting: Setting, device: torch.device, left_out: Collection[str]
) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """The timed variants: name, precision and call."""
    source = ids(setting, device)
    cuda = device.type == "cuda"
    precisions = ["fp32"] + ["tf32"] * cuda + ["bf16"] * has_bf16(device)
    for precision in precisions:
        set_precision(precision, device)
        call, step = our_step(setting, source, precision)
        yield f"eager {precision}", precision, call
        yield f"plain {precision}", precision, our_step(setting, source, precision, plain=True)[0]
        graphs = cuda and len(step.network.criterion.splits) == 1
        if graphs:
            call, graphed = our_step(setting, source, precision, graphs=True)
            yield f"{recorded(call, graphed)} {precision}", precision, call
        for name in left_out if precision == ("tf32" if cuda else "fp32") else ():
            call, _ = our_step(setting, source, precision, graphs=graphs, leave_out=[name])
            way = "graphs" if graphs else "eager"
            yield f"{way} {precision} without {name}", precision, call
        sizes = counts(setting, step)
        yield f"products {precision}", precision, products(sizes, device, precision)
        if cuda:
            # Rows of 1550 floats leave out the fastest kernels.
            wider = [(rows, -(-k // 16) * 16, -(-m // 16) * 16) for rows, k, m in sizes]
            yield f"products aligned {precision}", precision, products(wider, device, precision)
    if setting.cell == "LSTM":
        precision = "tf32" if cuda else "fp32"
        yield f"plain nn.LSTM {precision}", precision, plain_step(setting, source)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-cuda", action="store_true", help="stay on the CPU")
    parser.add_argument("--only", choices=SETTINGS, help="one setting")
    parser.add_argument(
        "--without", nargs="*", choices=FORMS, default=(), metavar="NAME",
        help=f"also a step without each of these forms of fast/: {', '.join(FORMS)}",
    )  # fmt: skip
    args = parser.parse_args(argv)
    keep_memory()
    device = select_device(False if args.no_cuda else None)
    need_kernels(device)
    print_heading(
        f"a training step of bptt tokens and all columns; median of {args.runs} runs in turn; "
        "memory is the peak of a step's temporary tensors (without the graphs' pool)",
        device,
    )
    print("| setting | way | ms a step | fastest to slowest | tokens/s | products' share | MB |")
    print("|---|---|---|---|---|---|---|")
    for name, setting in SETTINGS.items():
        if args.only not in (None, name):
            continue
        if device.type == "cpu":
            setting.batch = CPU_COLUMNS.get(name, setting.batch)
        rows = ways_of(setting, device, args.without)
        ways = {way: (precision, call) for way, precision, call in rows}

        def timed(precision: str, call: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                set_precision(precision, device)
                call()

            return run

        calls = {way: timed(*rest) for way, rest in ways.items()}
        seconds = (on_gpu if device.type == "cuda" else in_turns)(calls, args.runs)
        tokens = setting.bptt * setting.batch
        for way, times in seconds.items():
            precision = ways[way][0]
            middle = statistics.median(times)
            memory = "" if way.startswith("graphs") else f"{peak_memory(calls[way], device):.0f}"
            share = statistics.median(seconds[f"products {precision}"]) / middle
            print(
                f"| {name}, batch {setting.batch} x {setting.bptt} | {way} | {middle * 1e3:.2f} | "
                f"{min(times) * 1e3:.2f} to {max(times) * 1e3:.2f} | {tokens / middle:,.0f} | "
                f"{share:.0%} | {memory} |",
                flush=True,
            )
        del ways, calls
        gc.collect()


if __name__ == "__main__":
    main()
