"""Time a training step at the published sizes, beside plain nn.LSTM and its matrix products.

Run as `python bench/train_step.py` from the repository's root: on the GPU if there is one, else,
with fewer columns, on the CPU. A step is forward, loss, backward, clipping and update.

The floor is the step's matrix products alone, each as large as it can be, measured in the same run
and precision: an LSTM's recurrent products, which must go step by step, count as one of all steps.
On a CPU the products are those of fast/linear.py, as in a step.
"""

import argparse
import functools
import gc
import itertools
import statistics
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import fast
from bench import common
from cli.flags import dropouts
from cli.presets import COMMANDS
from fast import linear
from locked_dropout import LockedDropout
from loss import TrainingLoss
from main import build_parser
from model import make_network
from nt_asgd import NTASGD
from run.device import has_bf16, set_precision
from splitcross import default_splits
from training import TrainingStep

# By name: the row in cli/presets.py, the words of the corpus, and the columns of a batch on a CPU
# if there are fewer. PTB, on which the ratios are claimed, is at its full size on the CPU too.
SETTINGS = {
    "PTB LSTM": ("ptb-lstm", 10_000, None),
    "PTB QRNN": ("ptb-qrnn", 10_000, None),
    "WT2 LSTM": ("wt2-lstm", 33_278, 8),
    "WT2 QRNN": ("wt2-qrnn", 33_278, 8),
    "WT103 QRNN": ("wt103", 267_735, 2),
}
# Modules of fast/ that a row can leave out.
FORMS = ("weight_drop", "linear", "splitcross", "nt_asgd", "step", "qrnn")
# An operation or kernel is of the first kind that has a part of its name; the last has the rest.
KINDS = {
    "recurrent layers": ("rnn", "lstm", "gru", "qrnn", "elemwiseforward"),
    "matrix products": ("mm", "gemm", "xmma", "cutlass", "addmm", "cublas", "nvjet"),
    "random numbers": ("bernoulli", "random", "dropout", "uniform", "distribution"),
    "norm and sums": ("norm", "sum", "reduce", "mean", "amax"),
    "optimiser": ("update", "fused_sgd", "fused_adam", "lerp", "foreach", "multi_tensor"),
    "softmax": ("cross_entropy", "exp", "gather", "scatter", "log"),
    "copies": ("copy", "cat", "memcpy", "memset", "index", "embedding", "contiguous", "fill"),
    "element-wise and other": ("",),
}


def precisions_of(device: torch.device) -> list[str]:
    """The precisions of matrix products that a device has."""
    return ["fp32"] + ["tf32"] * (device.type == "cuda") + ["bf16"] * has_bf16(device)


def setting_of(name: str, device: torch.device) -> argparse.Namespace:
    """The flags of a published command, and `ntoken`, the number of words; smaller on a CPU."""
    row, ntoken, columns = SETTINGS[name]
    words = COMMANDS[row]["main"].split()
    if columns and device.type == "cpu":
        words += ["--batch_size", str(columns)]
    return argparse.Namespace(**vars(build_parser().parse_args(words)), ntoken=ntoken)


def layer_sizes(setting: argparse.Namespace) -> list[tuple[int, int]]:
    """Input and output size of every layer."""
    hidden = [setting.nhid] * (setting.nlayers - 1)
    return list(itertools.pairwise([setting.emsize, *hidden, setting.emsize]))


class PlainLSTM(nn.Module):
    """The LSTM as written with PyTorch alone: functional dropout on the weights, cross-entropy."""

    def __init__(self, setting: argparse.Namespace) -> None:
        super().__init__()
        self.setting = setting
        self.encoder = nn.Embedding(setting.ntoken, setting.emsize)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        self.bias = nn.Parameter(torch.zeros(setting.ntoken))
        self.layers = nn.ModuleList(nn.LSTM(*size) for size in layer_sizes(setting))
        self.lockdrop = LockedDropout()

    def forward(self, data: Tensor, targets: Tensor, hidden: list) -> tuple[Tensor, list]:
        """The loss with AR and TAR, and the new hidden state."""
        setting = self.setting
        embedded = self.encoder.weight * functional.dropout(
            self.encoder.weight.new_ones(self.encoder.weight.size(0), 1), setting.dropoute
        )
        output = self.lockdrop(functional.embedding(data, embedded), setting.dropouti)
        states = []
        for i, layer in enumerate(self.layers):
            flat = [
                layer.weight_ih_l0,
                functional.dropout(layer.weight_hh_l0, setting.wdrop),
                layer.bias_ih_l0,
                layer.bias_hh_l0,
            ]
            with warnings.catch_warnings():
                # On a GPU PyTorch warns that it copies these weights at every call.
                warnings.simplefilter("ignore")
                raw, h, c = torch.lstm(output, hidden[i], flat, True, 1, 0.0, True, False, False)
            states.append((h.detach(), c.detach()))
            last = i == len(self.layers) - 1
            output = self.lockdrop(raw, setting.dropout if last else setting.dropouth)
        logits = functional.linear(output.flatten(0, 1), self.encoder.weight, self.bias)
        loss = functional.cross_entropy(logits, targets) + setting.alpha * output.pow(2).mean()
        return loss + setting.beta * (raw[1:] - raw[:-1]).pow(2).mean(), states


def plain_step(setting: argparse.Namespace, source: Tensor) -> Callable[[], None]:
    """Its step with clip_grad_norm_ and torch.optim.SGD."""
    model = PlainLSTM(setting).to(source.device)
    optimizer = torch.optim.SGD(model.parameters(), setting.lr, weight_decay=setting.wdecay)
    sizes = [(1, setting.batch_size, size) for _, size in layer_sizes(setting)]
    hidden = [tuple(torch.zeros(2, *size, device=source.device)) for size in sizes]

    def step() -> None:
        nonlocal hidden
        optimizer.zero_grad(set_to_none=True)
        text = source[: setting.bptt + 1].long()
        loss, hidden = model(text[:-1], text[1:].flatten(), hidden)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
        optimizer.step()

    return step


def our_step(
    setting: argparse.Namespace,
    source: Tensor,
    precision: str,
    *,
    graphs: bool = False,
    plain: bool = False,
    leave_out: Collection[str] = (),
) -> tuple[Callable[[], None], TrainingStep]:
    """A step as in main.py: the call, and the TrainingStep that it calls."""
    torch.manual_seed(0)
    model, criterion = make_network(
        default_splits(setting.ntoken),
        rnn_type=setting.model,
        ntoken=setting.ntoken,
        ninp=setting.emsize,
        nhid=setting.nhid,
        nlayers=setting.nlayers,
        tie_weights=True,
        **dropouts(setting),
    )
    bf16 = precision == "bf16"
    network = TrainingLoss(model, criterion, alpha=setting.alpha, beta=setting.beta, bf16=bf16)
    network.to(source.device)
    if setting.optimizer == "adam":
        optimizer = torch.optim.Adam(network.parameters(), setting.lr, fused=True)
    else:
        optimizer = NTASGD(network.parameters(), setting.lr, setting.wdecay)
    step = TrainingStep(network, optimizer, source, bptt=setting.bptt, clip=setting.clip)
    lines = fast.choose(network, optimizer, step, plain=plain, bf16=bf16, leave_out=leave_out)
    lines += [fast.record_steps(step)] if graphs else []
    for problem in filter(None, lines[1:]):
        print(problem)

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

    product = torch.mm if device.type == "cuda" else linear.matmul

    def run() -> None:
        for x, weight, grad in operands:
            product(x, weight.t())
            product(grad, weight)
            product(grad.t(), x)

    return run


def counts(setting: argparse.Namespace, step: TrainingStep) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of each forward product; the softmax's depend on the targets."""
    rows = setting.bptt * setting.batch_size
    result = []
    for i, (n_in, n_out) in enumerate(layer_sizes(setting)):
        if setting.model == "QRNN":
            result.append((rows, n_in * (2 if i == 0 else 1), 3 * n_out))
        else:
            result += [(rows, n_in, 4 * n_out), (rows, n_out, 4 * n_out)]
    splits = step.network.criterion.splits[1:]
    if not splits:
        return [*result, (rows, setting.emsize, setting.ntoken)]
    targets = step.source[1 : setting.bptt + 1].flatten()
    result.append((rows, setting.emsize, splits[0] + len(splits)))
    for start, end in itertools.pairwise([*splits, setting.ntoken]):
        inside = int(((targets >= start) & (targets < end)).sum())
        if inside:
            result.append((inside, setting.emsize, end - start))
    return result


def ids(setting: argparse.Namespace, device: torch.device) -> Tensor:
    """Word ids (bptt + 1, batch), frequent ones more often, as in a text sorted by frequency."""
    torch.manual_seed(1)
    uniform = torch.rand(setting.bptt + 1, setting.batch_size)
    # Zipf's law: the logarithm of the rank is uniform.
    return (setting.ntoken**uniform - 1).int().clamp(max=setting.ntoken - 1).to(device)


def step_seconds(call: Callable[[], None], precision: str, device: torch.device) -> float:
    """Seconds of a step on host and device: of one on a CPU, the mean of 20 on a GPU."""
    set_precision(precision, device)
    count = 20 if device.type == "cuda" else 1

    def steps() -> None:
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return common.host_seconds(steps) / count


def peak_memory(call: Callable[[], None]) -> float:
    """Peak megabytes that one more step allocates on a GPU beyond those in use before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def ways_of(
    setting: argparse.Namespace, device: torch.device, left_out: Collection[str]
) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """The timed variants: name, precision and call."""
    source = ids(setting, device)
    cuda = device.type == "cuda"
    usual = "tf32" if cuda else "fp32"
    for precision in precisions_of(device):
        set_precision(precision, device)
        call, step = our_step(setting, source, precision)
        yield f"eager {precision}", precision, call
        yield f"plain {precision}", precision, our_step(setting, source, precision, plain=True)[0]
        graphs = cuda and len(step.network.criterion.splits) == 1
        if graphs:
            call, graphed = our_step(setting, source, precision, graphs=True)
            yield f"{recorded(call, graphed)} {precision}", precision, call
        for name in left_out if precision == usual else ():
            call, _ = our_step(setting, source, precision, graphs=graphs, leave_out=[name])
            way = "graphs" if graphs else "eager"
            yield f"{way} {precision} without {name}", precision, call
        sizes = counts(setting, step)
        yield f"products {precision}", precision, products(sizes, device, precision)
        if cuda:
            # Rows of 1550 floats leave out the fastest kernels.
            wider = [(rows, -(-k // 16) * 16, -(-m // 16) * 16) for rows, k, m in sizes]
            yield f"products aligned {precision}", precision, products(wider, device, precision)
    if setting.model == "LSTM":
        yield f"plain nn.LSTM {usual}", usual, plain_step(setting, source)


def print_setting(name: str, device: torch.device, runs: int, left_out: Collection[str]) -> None:
    """Time a setting's variants, and print their rows."""
    setting = setting_of(name, device)
    ways = {way: rest for way, *rest in ways_of(setting, device, left_out)}
    timers = {
        way: functools.partial(step_seconds, call, precision, device)
        for way, (precision, call) in ways.items()
    }
    seconds = common.in_turns(timers, runs)
    for way, times in seconds.items():
        precision, call = ways[way]
        set_precision(precision, device)
        middle = statistics.median(times)
        share = statistics.median(seconds[f"products {precision}"]) / middle
        eager_on_gpu = device.type == "cuda" and not way.startswith("graphs")
        common.print_row(
            f"{name}, batch {setting.batch_size} x {setting.bptt}",
            way,
            *common.spread(times, 1e-3, digits=2),
            f"{setting.bptt * setting.batch_size / middle:,.0f}",
            f"{share:.0%}",
            f"{peak_memory(call):.0f}" if eager_on_gpu else "",
        )


def profile_setting(name: str, precision: str, device: torch.device, steps: int) -> None:
    """Print where the time of a setting's steps goes: by kind, then operation by operation."""
    set_precision(precision, device)
    setting, cuda = setting_of(name, device), device.type == "cuda"
    call, _ = our_step(setting, ids(setting, device), precision)
    for _ in range(2):
        call()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        for _ in range(steps):
            call()
        if cuda:
            torch.cuda.synchronize()
    found, kinds = [], dict.fromkeys(KINDS, 0.0)
    for row in profiler.key_averages():
        # On a GPU the kernels alone: the operations that launched them list the same time again.
        if cuda and (row.device_type == DeviceType.CPU or row.is_user_annotation):
            continue
        us = row.self_device_time_total if cuda else row.self_cpu_time_total
        kind = next(k for k, words in KINDS.items() if any(w in row.key.lower() for w in words))
        kinds[kind] += us / steps / 1e3
        found.append((us / steps / 1e3, row.key[:70], kind, f"{row.count / steps:g}"))
    total = sum(kinds.values())
    common.print_heading(
        f"{name}, batch {setting.batch_size} x {setting.bptt}, {precision}, eager; {steps} steps; "
        f"time of the {device.type.upper()} in its operations",
        device,
    )
    common.print_head("kind", "ms a step", "share")
    for kind, ms in sorted(kinds.items(), key=lambda row: -row[1]):
        common.print_row(kind, f"{ms:.2f}", f"{ms / total:.1%}")
    common.print_row("all", f"{total:.2f}", "")
    common.print_head("operation", "kind", "calls a step", "ms a step")
    for ms, *cells in sorted(found, reverse=True)[:20]:
        common.print_row(*cells, f"{ms:.2f}")


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = common.build_parser(__doc__)
    parser.add_argument("--only", choices=SETTINGS, help="one setting")
    parser.add_argument(
        "--without", nargs="*", choices=FORMS, default=(), metavar="NAME",
        help=f"also a step without each of these forms of fast/: {', '.join(FORMS)}",
    )  # fmt: skip
    parser.add_argument(
        "--profile", action="store_true", help="print where the time of a step goes instead"
    )
    args = parser.parse_args(argv)
    names = [args.only] if args.only else list(SETTINGS)
    device = common.prepare(args)
    common.need_kernels(device)
    if args.profile:
        for name, precision in itertools.product(names, precisions_of(device)):
            profile_setting(name, precision, device, args.runs)
        return
    common.print_heading(
        f"a training step of bptt tokens and all columns; median of {args.runs} runs in turn; "
        "memory is the peak of a step's temporary tensors on a GPU (without the graphs' pool)",
        device,
    )
    common.print_head(
        "setting", "way", "ms a step", "fastest to slowest", "tokens/s", "products' share", "MB"
    )
    for name in names:
        print_setting(name, device, args.runs, args.without)
        gc.collect()


if __name__ == "__main__":
    main()
