"""Run by test_changing.py in a copy of the tree with the patches of docs/changing.md applied.

python tests/changed.py CORPUS FOLDER
"""

import importlib
import itertools
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest
import torch
from conftest import TINY, assert_same
from test_training_step import make, test_replayed_steps_are_the_eager_ones, train

import checkpoint
import finetune
import generate
import main
import pointer
import training
from run.signals import Stopped
from utils import ToolkitError

CORPUS, FOLDER = sys.argv[1:]
DRAW = training.draw_seq_len


def call(script, path, *flags, stop_at=None):
    """Run a script, with a SIGTERM at batch `stop_at`; return the training state in its file."""
    drawn = []

    def draw(*args):
        drawn.append(1)
        if len(drawn) == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return DRAW(*args)

    training.draw_seq_len = draw
    try:
        script.main([str(flag) for flag in (*flags, "--save", path)])
    except Stopped:
        assert stop_at
    return checkpoint.load(path).training


torch.set_num_threads(1)
common = ["--data", CORPUS, "--model", "MOGRIFIER:rounds=3", "--max-batches", 12]
new = [*common, *TINY, "--gamma", 0.5, "--lr", 5, "--epochs", 3]
whole, cut, plain = (Path(FOLDER) / name for name in ("whole.pt", "cut.pt", "plain.pt"))
expected = call(main, whole, *new, "--rotate")
assert expected["optimizer"]["param_groups"][0]["lr"] == 0
assert call(main, cut, *new, "--rotate", stop_at=17)["position"]["batches"] == 5
# The run's own command with --resume resumes it.
assert_same(expected, call(main, cut, *new, "--rotate", "--resume", cut), but=("args",))

# Each change has an effect, and a resumed run does not ignore any of them.
assert call(main, plain, *new, stop_at=17)["data"] == expected["data"]
with pytest.raises(ToolkitError, match="the text does not go on as it did"):
    call(main, plain, *new, "--rotate", "--resume", plain)
unrotated = call(main, plain, "--resume", plain, "--max-batches", 12)
lighter = call(main, plain, *new, "--gamma", 0)
for part, name in (
    ("model", "encoder.weight"),
    ("model", "rnns.0.module.gate_x.weight"),
    ("criterion", "prior.weight"),
):
    weights = [state[part][name] for state in (expected, unrotated, lighter)]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(weights)), name

assert call(finetune, whole, *common, "--epochs", 1)["args"]["gamma"] == 0.5
rebuilt, _ = checkpoint.rebuild(checkpoint.load(whole), torch.device("cpu"))
assert rebuilt.rnns[0].module.rounds == 3
call(pointer, whole, "--data", CORPUS, "--window", 20)
generate.main(["--checkpoint", str(whole), "--outf", "-", "--words", "9", "--no-cuda"])
importlib.import_module("accuracy").main(["--save", str(whole), "--data", CORPUS, "--no-cuda"])

# CUDA graphs, also with a penalty that changes between epochs.
test_replayed_steps_are_the_eager_ones("MOGRIFIER", "sgd")
eager, graphed = make("MOGRIFIER"), make("MOGRIFIER", graphs=True)
for step in (eager, graphed):
    train(step, (1, 2))
    step.network.gamma = 5.0
assert train(graphed, (2,)) == pytest.approx(train(eager, (2,)), rel=1e-5)
