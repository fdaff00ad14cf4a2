"""Where the time of a training step goes: operations by kind, then one by one.

Run as `python bench/profile_step.py "PTB QRNN"` from the repository's root; settings and sizes are
those of bench/train_step.py.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile

from bench.common import print_heading
from bench.train_step import CPU_COLUMNS, SETTINGS, ids, our_step
from run.device import keep_memory, select_device, set_precision

# The first kind with a word of an operation's or kernel's name.
KINDS = {
    "recurrent layers": ("rnn", "lstm", "gru", "qrnn", "forget_mult", "elemwiseforward"),
    "matrix products": ("mm", "gemm", "xmma", "cutlass", "addmm", "cublas", "nvjet"),
    "random numbers": ("bernoulli", "random", "dropout", "uniform", "distribution"),
    "norm and sums": ("norm", "sum", "reduce", "mean", "amax"),
    "optimiser": ("update", "fused_sgd", "fused_adam", "lerp", "foreach", "multi_tensor"),
    "softmax": ("cross_entropy", "exp", "gather", "scatter", "log"),
    "copies": ("copy", "cat", "memcpy", "memset", "index", "embedding", "contiguous", "fill"),
}


def kind_of(name: str) -> str:
    """Which kind of work an operation or kernel is."""
    lowered = name.lower()
    for kind, words in KINDS.items():
        if any(word in lowered for word in words):
            return kind
    return "element-wise and other"


def main(argv: list[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setting", nargs="?", default="PTB QRNN", choices=SETTINGS)
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--most", type=int, default=20, help="operations to list one by one")
    parser.add_argument("--no-cuda", action="store_true", help="stay on the CPU")
    args = parser.parse_args(argv)
    keep_memory()
    device = select_device(False if args.no_cuda else None)
    precision = set_precision(args.precision, device)
    setting = SETTINGS[args.setting]
    if device.type == "cpu":
        setting.batch = CPU_COLUMNS.get(args.setting, setting.batch)
    call, _ = our_step(setting, ids(setting, device), precision)
    for _ in range(2):
        call()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        for _ in range(args.steps):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    rows = profiler.key_averages()
    if device.type == "cuda":
        # The kernels alone: the operations that launched them list the same time again.
        rows = [row for row in rows if row.device_type != torch.autograd.DeviceType.CPU]
        rows = [row for row in rows if not row.is_user_annotation]
        times = [(row.key, row.self_device_time_total, row.count) for row in rows]
    else:
        times = [(row.key, row.self_cpu_time_total, row.count) for row in rows]
    times = [(name, us / args.steps / 1e3, count / args.steps) for name, us, count in times if us]
    times.sort(key=lambda row: -row[1])
    total = sum(ms for _, ms, _ in times)
    print_heading(
        f"{args.setting}, batch {setting.batch} x {setting.bptt}, {precision}, eager; "
        f"{args.steps} steps; time of the {device.type.upper()} in its operations",
        device,
    )
    kinds: dict[str, float] = defaultdict(float)
    for name, ms, _ in times:
        kinds[kind_of(name)] += ms
    print("| kind | ms a step | share |")
    print("|---|---|---|")
    for kind, ms in sorted(kinds.items(), key=lambda row: -row[1]):
        print(f"| {kind} | {ms:.2f} | {ms / total:.1%} |")
    print(f"| all | {total:.2f} | |")
    print("\n| operation | kind | calls a step | ms a step |")
    print("|---|---|---|---|")
    for name, ms, count in times[: args.most]:
        print(f"| {name[:70]} | {kind_of(name)} | {count:g} | {ms:.2f} |")


if __name__ == "__main__":
    main()
