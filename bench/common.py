"""What the benchmarks share: the heading, and timing in turns, fair on a drifting machine."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_heading(settings: str, device: torch.device | None = None) -> None:
    """Device, versions and settings: what a figure is worth nothing without."""
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
    """Seconds of every run of every way, taken in turn after one round that is not counted."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for run in range(runs + 1):
        for way, call in ways.items():
            start = time.perf_counter()
            call()
            if run:
                seconds[way].append(time.perf_counter() - start)
    return seconds


def spread(times: list[float], unit: float) -> str:
    """Median, then fastest to slowest, in units of `unit` seconds."""
    low, middle, high = min(times), statistics.median(times), max(times)
    return f"{middle / unit:.1f} | {low / unit:.1f} to {high / unit:.1f}"
