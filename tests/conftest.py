"""Shared by several test files: a tiny corpus, and scripts run as a user would run them."""

import contextlib
import importlib
import os
import random
import resource
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_checks import Place
from shims import Canaries, Shim

import fast.qrnn
from fast import cross_entropy, linear
from qrnn import cuda, forget_mult, kernels
from run import program

ROOT = Path(__file__).resolve().parent.parent
# The full corpora, beside the repository; tests that need them are skipped without them.
CORPORA = ROOT.parent / "shared" / "data"

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc or /dev/full")

# The papers' cells. Tests of properties of every cell run over model.CELLS instead.
ORIGINAL_CELLS = ("LSTM", "GRU", "QRNN")

# A network small enough for a test, as flags.
TINY = (
    "--emsize 12 --nhid 16 --nlayers 2 --batch_size 8 --bptt 10 --no-cuda --seed 7 "
    "--dropout 0.1 --dropouth 0.1 --dropouti 0.1"
).split()


def put(*places, to):
    """A function that replaces the value at `places` in a file's content by `to`.

    `to` is the new value, or a function of the old one.
    """

    def damage(content):
        *way, last = places
        for place in way:
            content = content[place]
        content[last] = to(content[last]) if callable(to) else to

    return damage


@contextlib.contextmanager
def full_disk(size):
    """Files cannot grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    # Python 3.11 keeps a compiled module of which it could write a part.
    compiles, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = compiles
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """A corpus of 60 words in which each word has two possible successors within a line."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = [f"w{i}" for i in range(60)]
    for name, lines in (("train", 600), ("valid", 60), ("test", 40)):
        text = []
        for _ in range(lines):
            i = rng.randrange(60)
            line = []
            for _ in range(rng.randrange(4, 12)):
                line.append(words[i])
                i = (3 * i + rng.randrange(2)) % 60
            text.append(" ".join(line))
        (folder / f"{name}.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session", autouse=True)
def signals_as_in_a_terminal():
    """Reset the handlers: under nohup signals are ignored, and a run leaves them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Such small networks are slower on several threads, and much slower on a busy machine."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that the tests start


@pytest.fixture(scope="session")
def cpp_kernels(tmp_path_factory):
    """The CUDA kernels as C++, each compiled at its first use."""
    return Shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def shim(cpp_kernels, monkeypatch):
    """The CUDA kernels on CPU tensors; copies by `shim.place` and new tensors have canaries."""
    canaries = Canaries()

    def new_empty(like, *shape, dtype=None):
        return canaries.new_empty(like, *shape, dtype=dtype)

    cpp_kernels.launched.clear()
    monkeypatch.setattr(cuda, "kernel", cpp_kernels.kernel)
    monkeypatch.setattr(cuda, "current_stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(cross_entropy, "THREADS", 64)
    properties = SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    place = Place(canaries.copy, after=canaries.check)
    yield SimpleNamespace(launched=cpp_kernels.launched, place=place)
    canaries.check()


@pytest.fixture
def as_on_a_gpu(shim, monkeypatch):
    """The forms of a GPU on CPU tensors: kernels, and products with rows aligned for a GPU."""
    for place in (forget_mult, fast.qrnn):
        monkeypatch.setattr(place, "way_for", lambda *_: kernels)
    monkeypatch.setattr(linear, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(cross_entropy, "is_usable", lambda *_: True)


@pytest.fixture
def script(capfd):
    """Run a script in this process as from the command line: (exit status, stdout, stderr)."""

    def run(name, *argv):
        module = importlib.import_module(name)
        with pytest.raises(SystemExit) as exit_info:
            program.run(lambda: module.main([str(arg) for arg in argv]))
        out, err = capfd.readouterr()
        return exit_info.value.code, out, err

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory, corpus_dir):
    """A model file of each cell type, briefly trained on the tiny corpus, made once."""
    import main

    folder = tmp_path_factory.mktemp("trained")
    files = {}
    for cell in ORIGINAL_CELLS:
        files[cell] = folder / f"{cell}.pt"
        argv = ["--data", str(corpus_dir), "--model", cell, *TINY, "--epochs", "2", "--lr", "5"]
        main.main([*argv, "--save", str(files[cell])])
    return files
