"""Shared by several test files: a tiny corpus, and scripts run as a user would run them."""

import contextlib
import importlib
import os
import random
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch

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


def flat(value, name=""):
    """Every tensor and plain value within dictionaries, lists and tuples, with its path."""
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(part, f"{name}.{key}")
    else:
        yield name, value


def assert_same(first, second, but=()):
    """Two training states are equal, bit for bit, except for the fields in `but`."""
    first, second = (
        dict(flat({k: v for k, v in s.items() if k not in but})) for s in (first, second)
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        other = second[name]
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name


@contextlib.contextmanager
def full_disk(size):
    """Files cannot grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
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
