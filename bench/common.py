"""Shared by benchmarks: the heading, and timing in turns, fair if the machine's speed drifts."""

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


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read_stage(folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics file in its --logdir; none if there is none yet."""
    path = folder / metrics.NAME
    return metrics.read(path) if path.exists() else []


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
    print()


def in_turns(ways: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each run of each variant, run in turn after one uncounted round."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for run in range(runs + 1):
        for way, call in ways.items():
            start = time.perf_counter()
            call()
            if run:
                seconds[way].append(time.perf_counter() - start)
    return seconds


def on_gpu(
    ways: Mapping[str, Callable[[int], object]], sets: int, runs: int
) -> dict[str, list[float]]:
    """Seconds of device time of each variant, in turn: `call(k)` works on the k-th set of inputs.

    Each variant is captured in a CUDA graph that goes through all sets again and again for at least
    a millisecond, which excludes the host's time and keeps inputs out of the caches. A replay's
    time is divided by its number of calls.
    """
    graphs = {}
    for way, call in ways.items():
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
        graphs[way] = graph, calls
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for run in range(runs + 1):
        for way, (graph, calls) in graphs.items():
            took = _replay_seconds(graph)
            if run:
                seconds[way].append(took / calls)
    return seconds


def _captured(call: Callable[[int], object], sets: int, calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for k in range(calls):
            call(k % sets)
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
    if device.type == "cuda":
        times = on_gpu({"copy": lambda k: target.copy_(source)}, 1, runs)["copy"]
    else:
        times = in_turns({"copy": lambda: target.copy_(source)}, runs)["copy"]
    return 2 * source.numel() * source.element_size() / min(times)


def input_sets(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs of `nbytes` fill the GPU's L2 cache twice.

    Count only the inputs: the results of all sets share their memory.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, 2 * cache // nbytes + 1)


def spread(times: list[float], unit: float) -> str:
    """Median, then fastest to slowest, in units of `unit` seconds."""
    low, middle, high = min(times), statistics.median(times), max(times)
    return f"{middle / unit:.1f} | {low / unit:.1f} to {high / unit:.1f}"
