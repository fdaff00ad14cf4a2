"""Run the benchmarks one after the other and keep their tables in one file, as they come.

`python bench/run_all.py --out FILE` from the repository's root. On a GPU the tests marked `gpu`
come first, and small ones of the kernels under compute-sanitizer: the time of a kernel that is
wrong is worth nothing. FILE is whole after every benchmark, so a run that is cut keeps what it has;
`--minutes M` ends it after M minutes. The exit status is 1 if anything failed, was cut or is not
there.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from cli import metrics
from files.writing import writing
from qrnn import kernels

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Task:
    """A command to run; `gpu` if it makes no sense without one, `needs` a program it calls."""

    command: str
    gpu: bool = False
    needs: str = ""


# Tests of every kernel, without the large shapes: under the sanitizer an access takes far longer.
CHECKED = (
    "(forget_mult or test_layer) and (shape1 or shape2) or bidirectional or expanded or update"
)
# Each tensor an allocation of its own: within PyTorch's blocks, what lies past a tensor is allowed.
SEPARATE = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1"
TASKS = {
    "tests": Task("python -m pytest -m gpu -q -rs", gpu=True),
    "sanitizer": Task(
        # Libraries ask the driver for what it may not have; that is no error of ours.
        f"{SEPARATE} compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 "
        f"python -m pytest -q tests/test_kernel_gpu.py -k '{CHECKED}'",
        gpu=True,
        needs="compute-sanitizer",
    ),
    "forget_mult": Task("python bench/forget_mult.py"),
    "qrnn_layer": Task("python bench/qrnn_layer.py"),
    "train_step": Task("python bench/train_step.py"),
    "profile_step": Task("python bench/profile_step.py"),
    "alignment": Task("python bench/alignment.py"),
    "corpus": Task("python bench/corpus.py"),
    "pointer": Task("python bench/pointer.py"),
    "dynamic": Task("python bench/dynamic.py"),
    "update": Task("python bench/update.py", gpu=True),
    "big_corpus": Task("python bench/big_corpus.py"),
}


def run(task: Task, seconds: float | None) -> tuple[str, str]:
    """A task's output, and what ended it: "" if it went well, else in words."""
    words = [sys.executable if word == "python" else word for word in shlex.split(task.command)]
    # What it printed stays when it is cut.
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile() as output:
        # A group of its own, so that what it has started ends with it.
        process = subprocess.Popen(
            words,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=unbuffered,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
            end = f"failed with exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            end = f"cut off after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return output.read().decode("utf-8", "replace"), end


def report(sections: list[str], failures: list[str]) -> str:
    """The file: where it ran, what went wrong, then every section."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        device = "a CPU"
    head = [f"# Benchmarks on {device}", "", f"Commit {metrics.commit() or 'not known'}."]
    head += ["", *(f"- {failure}" for failure in failures)] if failures else []
    return "\n".join([*head, "", *sections])


def main(argv: list[str] | None = None) -> int:
    """Run the tasks; returns the exit status."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        # So that what it has started ends with it.
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the tables in this file")
    parser.add_argument("--only", nargs="+", choices=TASKS, metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("--minutes", type=float, metavar="M", help="end after M minutes")
    args = parser.parse_args(argv)
    if args.only is None:
        args.only = [n for n, task in TASKS.items() if not task.gpu or torch.cuda.is_available()]
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    sections, failures = [], []
    if torch.cuda.is_available() and not kernels.available():
        failures.append(f"the tests of the QRNN's kernels are skipped: {kernels.requirement()}")
    for name, task in TASKS.items():
        if name not in args.only:
            continue
        left = None if deadline is None else deadline - time.monotonic()
        if task.needs and shutil.which(task.needs) is None:
            output, end = "", f"not run: {task.needs} is not installed"
        elif left is not None and left <= 0:
            output, end = "", "not run: the time is up"
        else:
            output, end = run(task, left)
        if end:
            failures.append(f"`{task.command}` {end}")
        sections.append(f"## `{task.command}`\n\n{output}{f'**{end}**' if end else ''}\n")
        print(sections[-1], flush=True)
        if args.out is not None:
            with writing(args.out, "--out") as file:
                file.write(report(sections, failures).encode())
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
