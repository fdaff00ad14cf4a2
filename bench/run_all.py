"""Run the benchmarks, each into a file of its own, and end with a table of decisions.

Run as `python bench/run_all.py` from the repository's root. A task that has finished at this commit
on this device is not run again, so the same command continues a run that was cut. On a GPU the
tests marked `gpu` run first, and small tests of the kernels under compute-sanitizer, because the
time of a wrong kernel is worthless. The exit status is 1 if a task failed, was cut or is missing.
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

from bench.decisions import decisions
from cli import metrics
from files.writing import writing
from qrnn import kernels

ROOT = Path(__file__).resolve().parent.parent
# Short enough for a queue that ends jobs after ten minutes.
GPU_MINUTES = 9.0


@dataclass
class Task:
    """A command to run; `gpu` if it needs one, `needs` the program that it calls."""

    command: str
    gpu: bool = False
    needs: str = ""


# Tests of every kernel, without the large shapes, which take too long under the sanitizer, and
# without graphs, whose capture needs the caching that SEPARATE switches off.
CHECKED = (
    "((forget_mult or test_layer) and (shape1 or shape2) or bidirectional or expanded or update or "
    "cross_entropy) and not in_a_graph"
)
# One allocation per tensor: in PyTorch's shared blocks an access past a tensor's end is valid.
SEPARATE = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1"
PYTEST = "python -m pytest -m gpu -q -rs"
STEP = "python bench/train_step.py --only"
TASKS = {
    "tests-kernels": Task(f"{PYTEST} tests/test_kernel_gpu.py", gpu=True),
    "tests-steps": Task(f"{PYTEST} --ignore tests/test_kernel_gpu.py", gpu=True),
    "sanitizer": Task(
        # Libraries query the driver for features that it may lack: no error of the kernels.
        f"{SEPARATE} compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 "
        f"python -m pytest -q tests/test_kernel_gpu.py -k '{CHECKED}'",
        gpu=True,
        needs="compute-sanitizer",
    ),
    "alignment": Task("python bench/alignment.py"),
    "forget_mult": Task("python bench/forget_mult.py"),
    "qrnn_layer": Task("python bench/qrnn_layer.py"),
    "cross_entropy": Task("python bench/cross_entropy.py", gpu=True),
    "update": Task("python bench/update.py", gpu=True),
    "train_step-ptb-qrnn": Task(f"{STEP} 'PTB QRNN'"),
    "train_step-ptb-lstm": Task(f"{STEP} 'PTB LSTM'"),
    "profile_step": Task("python bench/profile_step.py"),
    "train_step-wt2-qrnn": Task(f"{STEP} 'WT2 QRNN'"),
    "train_step-wt2-lstm": Task(f"{STEP} 'WT2 LSTM'"),
    "train_step-wt103-qrnn": Task(f"{STEP} 'WT103 QRNN'"),
    "pointer": Task("python bench/pointer.py"),
    "dynamic": Task("python bench/dynamic.py"),
    "corpus": Task("python bench/corpus.py"),
    "big_corpus": Task("python bench/big_corpus.py"),
}


def run(task: Task, seconds: float | None) -> tuple[str, str]:
    """A task's output, and its failure in words, "" if it succeeded."""
    words = [sys.executable if word == "python" else word for word in shlex.split(task.command)]
    # Unbuffered, so that a task that is cut keeps its output.
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile() as output:
        # In its own process group, so that its child processes end with it.
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


def head(task: Task) -> str:
    """How a task's file begins: the same for the same command, device and commit."""
    device = "a CPU"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"# `{task.command}`\n\nOn {device}, commit {metrics.commit() or 'not known'}: "


def read(folder: Path, name: str) -> str:
    """A task's file; empty where there is none."""
    file = folder / f"{name}.md"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def attempt(task: Task, left: float | None) -> tuple[str, str]:
    """Run a task if its program is there and time is left; return its output and any failure."""
    if task.needs and shutil.which(task.needs) is None:
        return "", f"not run: {task.needs} is not installed"
    if left is not None and left <= 0:
        return "", "not run: the time is up"
    return run(task, left)


def main(argv: list[str] | None = None) -> int:
    """Run the tasks; returns the exit status."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        # An exit, unlike a signal, also ends the running task.
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: results/gpu or cpu")
    parser.add_argument("--only", nargs="+", choices=TASKS, metavar="NAME", help=", ".join(TASKS))
    parser.add_argument(
        "--minutes", type=float, default=GPU_MINUTES if cuda else None, metavar="M",
        help="end after M minutes; the default is 9 on a GPU",
    )  # fmt: skip
    args = parser.parse_args(argv)
    out = args.out or ROOT / "results" / ("gpu" if cuda else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    failures = []
    if cuda and not kernels.available():
        failures.append(f"the tests of the QRNN's kernels are skipped: {kernels.requirement()}")
    # Tasks that failed before run last: they must not take the time of the others.
    for name in sorted(TASKS, key=lambda name: f"{head(TASKS[name])}failed" in read(out, name)):
        task = TASKS[name]
        if name not in (args.only or TASKS) or (task.gpu and not cuda):
            continue
        file = out / f"{name}.md"
        whole = f"{head(task)}whole\n"
        if not args.only and read(out, name).startswith(whole):
            continue
        output, end = attempt(task, None if deadline is None else deadline - time.monotonic())
        if end:
            failures.append(f"{name}: {end}")
        print(f"# `{task.command}`\n\n{output}\n{end}", flush=True)
        # A task that did not run keeps its old file.
        if output or not file.exists():
            with writing(file, "--out") as stream:
                stream.write(f"{head(task)}{end or 'whole'}\n\n{output}".encode())
    # Only figures of this device and commit can be compared.
    texts = {name: read(out, name) for name in TASKS}
    table = decisions({n: text for n, text in texts.items() if text.startswith(head(TASKS[n]))})
    with writing(out / "decisions.md", "--out") as stream:
        stream.write("\n".join([table, *(f"- {failure}" for failure in failures), ""]).encode())
    print("\n".join([table, *failures]))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
