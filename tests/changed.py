"""Run by test_changing.py in a copy of the tree with the patches of docs/changing.md applied.

python tests/changed.py CORPUS FOLDER
"""

import importlib
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest
import torch
from conftest import TINY
from test_training_step import Tape, make, test_replayed_steps_are_the_eager_ones, train

import checkpoint
import main

CORPUS, FOLDER = sys.argv[1:]


def call(script, name, *flags):
    """Run a script; the training state in its file, if there is one."""
    path = Path(FOLDER) / name
    script.main([str(flag) for flag in (*flags, "--data", CORPUS, "--save", path)])
    return checkpoint.load(path).training if path.exists() else None


torch.set_num_threads(1)
new = ["--model", "MOGRIFIER:rounds=3", *TINY, "--gamma", 0.5, "--lr", 5, "--epochs", 3]
call(main, "none.pt", *new, "--rotate", "--rehearse")

# Each change has an effect.
short = ["--max-batches", 12]
states = [
    call(main, "whole.pt", *new, *short, "--rotate"),
    call(main, "unrotated.pt", *new, *short),
    call(main, "lighter.pt", *new, *short, "--rotate", "--gamma", 0),
]
assert states[0]["optimizer"]["param_groups"][0]["lr"] == 0
for part, name in (
    ("model", "encoder.weight"),
    ("model", "rnns.0.module.gate_x.weight"),
    ("criterion", "prior.weight"),
):
    weights = [state[part][name] for state in states]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(weights)), name
call(importlib.import_module("accuracy"), "whole.pt", "--no-cuda")

# The mixture keeps one block of rows in memory.
criterion = importlib.import_module("mixture").MixtureOfSoftmaxes(4)
rows = torch.randn(1000, 4, requires_grad=True), torch.arange(1000) % 50
with Tape() as tape:
    criterion(torch.randn(50, 4), torch.zeros(50), *rows).backward()
assert max(t.numel() for *_, t in tape.calls if isinstance(t, torch.Tensor)) <= 3 * 128 * 50

# CUDA graphs, also with a penalty that changes between epochs.
test_replayed_steps_are_the_eager_ones("MOGRIFIER", "sgd")
eager, graphed = make("MOGRIFIER"), make("MOGRIFIER", graphs=True)
for step in (eager, graphed):
    train(step, (1, 2))
    step.network.gamma = 5.0
assert train(graphed, (2,)) == pytest.approx(train(eager, (2,)), rel=1e-5)
