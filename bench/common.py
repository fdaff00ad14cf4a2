"""Shared by benchmarks: flags, headings, tables, and timing in turn, fair if the speed drifts."""

import argparse
import collections
import functools
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qrnn import forget_mult
from run import metrics
from run.device import keep_memory, select_device


def build_parser(description: str) -> argparse.ArgumentParser:
    """A benchmark's command line, with the flags that all have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--no-cuda", action="store_true", help="stay on the CPU")
    return parser


def prepare(args: argparse.Namespace) -> torch.device:
    """The device to run on; memory is kept between operations, as the toolkit's scripts do."""
    keep_memory()
    return select_device(False if args.no_cuda else None)


def cpu_name() -> str:
    """The processor's name, as far as the system knows it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none if there is no such file."""
    return metrics.read(path) if path.exists() else []


def read_stage(folder: Path) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """The lines of the metrics file in a stage's --logdir, and the line of each epoch by number.

    Of an epoch that was repeated after a kill, the last line counts.
    """
    lines = read_lines(folder / metrics.NAME)
    return lines, {line["epoch"]: line for line in lines if line.get("kind") == "epoch"}


def table_head(*columns: str) -> list[str]:
    """The first two lines of a table."""
    return [table_row(*columns), "|" + "---|" * len(columns)]


def table_row(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def print_heading(settings: str, device: torch.device | None = None) -> None:
    """Print device, versions and settings, without which a figure means nothing."""
    if device is not None and device.type == "cuda":
        print(f"device {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}")
    print(
        f"cpu {cpu_name()}, {torch.get_num_threads()} threads; "
        f"{platform.system()} {platform.machine()}"
    )
    print(f"python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}")
    print(settings)


def print_head(*columns: str) -> None:
    """Print an empty line and the head of a table."""
    print("", *table_head(*columns), sep="\n")


def print_row(*cells: object) -> None:
    """Print a line of a table at once, so that a run that is cut short keeps it."""
    print(table_row(*cells), flush=True)


def spread(times: list[float], unit: float, digits: int = 1) -> tuple[str, str]:
    """Two cells, in units of `unit` seconds: the median, and from the fastest to the slowest."""
    low, middle, high = (
        f"{time / unit:.{digits}f}" for time in (min(times), statistics.median(times), max(times))
    )
    return middle, f"{low} to {high}"


def in_turns(timers: Mapping[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """The seconds that each variant's timer returns, run in turn after one uncounted round.

    After SIGINT they are those of the rounds that have ended, if there are any.
    """
    rounds: list[dict[str, float]] = []
    try:
        for _ in range(runs + 1):
            rounds.append({way: timer() for way, timer in timers.items()})
    except KeyboardInterrupt:
        if len(rounds) < 2:
            raise
        print(f"cut short after {len(rounds) - 1} of {runs} rounds")
    return {way: [seconds[way] for seconds in rounds[1:]] for way in timers}


def host_seconds(call: Callable[[], object]) -> float:
    """Seconds that a call takes on the host."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    ways: Mapping[str, Callable[[int], object]], device: torch.device, runs: int, sets: int = 1
) -> dict[str, list[float]]:
    """Seconds of each run of each variant, in turn: `call(k)` works on the k-th set of inputs.

    On a GPU it is device time: each variant is captured in a CUDA graph that goes through all sets
    again and again for at least a millisecond, which excludes the host's time and keeps inputs
    and results out of the caches. A replay's time is divided by its number of calls.
    """
    if device.type == "cuda":
        timers = {way: _graph_timer(call, sets) for way, call in ways.items()}
    else:
        firsts = {way: functools.partial(call, 0) for way, call in ways.items()}
        timers = {way: functools.partial(host_seconds, first) for way, first in firsts.items()}
    return in_turns(timers, runs)


def _graph_timer(call: Callable[[int], object], sets: int) -> Callable[[], float]:
    """A function that replays a recording and returns the device's seconds for one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for k in range(sets):
            call(k)
    torch.cuda.current_stream().wait_stream(side)
    calls = sets
    graph = _captured(call, sets, calls)
    once = _replay_seconds(graph)
    if once < 1e-3:
        calls *= math.ceil(1e-3 / once)
        graph = _captured(call, sets, calls)
    return lambda: _replay_seconds(graph) / calls


def _captured(call: Callable[[int], object], sets: int, calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # A result's memory is used again only after all sets, when it is no longer in the cache.
    results = collections.deque(maxlen=sets)
    with torch.cuda.graph(graph):
        for k in range(calls):
            results.append(call(k % sets))
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Keeps the device busy while the host queues the timed replay.
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def need_kernels(device: torch.device) -> None:
    """On a GPU, compile the QRNN's kernels; exit if there are none, as the times would mislead."""
    if device.type == "cuda":
        way = forget_mult.way_for(torch.empty(0, device=device))
        if not way.__name__.endswith("kernels"):
            sys.exit("the QRNN's CUDA kernels are not used")


def copy_bandwidth(device: torch.device, runs: int = 10) -> float:
    """Bytes a second, read and written, of a copy far larger than any cache."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device).normal_()
    target = torch.empty_like(source)
    times = measure({"copy": lambda k: target.copy_(source)}, device, runs)["copy"]
    return 2 * source.numel() * source.element_size() / min(times)
