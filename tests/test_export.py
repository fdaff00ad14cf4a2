"""tools/export.py: TorchScript and ONNX against score.py, and what is refused."""

import ast
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ORIGINAL_CELLS
from torch import nn

import checkpoint
import model
from data import Dictionary
from scoring.scores import surprisals

WORDS = ["<eos>", *(f"w{n}" for n in range(29))]
TEXTS = ("w1 w2 w3 w4 w5 w6", "w7 w7 w28 w9 w1 w1", "w20 w2 w21 w9 w9 w3")


def model_file(path, cell="LSTM", words=WORDS, **config):
    """Write a model file with random weights."""
    torch.manual_seed(0)
    config = {"tie_weights": True, "splits": [], **config}
    config |= {"rnn_type": cell, "ntoken": len(words), "ninp": 6, "nhid": 9, "nlayers": 3}
    parts = model.make_network(**config)
    for p in (p for part in parts for p in part.parameters()):
        nn.init.normal_(p, std=0.7)
    network, criterion = map(checkpoint.snapshot, parts)
    vocabulary = checkpoint.vocabulary_of(Dictionary.from_words(words))
    rest = {"args": {}, "stage": "test", "epoch": 0, "valid_loss": math.inf}
    checkpoint.save(path, checkpoint.Checkpoint(config, network, criterion, vocabulary, **rest))


def loaded(path):
    """What was written, as a function of tensors."""
    if path.suffix == ".ts":
        return torch.jit.load(path)
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    names = [part.name for part in session.get_inputs()]
    assert names == ["words", *(f"state_{n}" for n in range(1, len(names)))]

    def run(*inputs):
        found = session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})
        return map(torch.from_numpy, found)

    return run


@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")
@pytest.mark.parametrize("kind", ["ts", "onnx"])
@pytest.mark.parametrize(
    ("tie", "splits", "wdrop"), [(True, [], 0.5), (False, [], 0.0), (True, [8, 20], 0.0)]
)
@pytest.mark.parametrize("cell", ORIGINAL_CELLS)
def test_it_gives_the_scores_of_score_py(cell, tie, splits, wdrop, kind, script, tmp_path):
    path, out = tmp_path / "m.pt", tmp_path / f"m.{kind}"
    model_file(path, cell, tie_weights=tie, splits=splits, wdrop=wdrop)
    if kind == "onnx":
        pytest.importorskip("onnx")
    status, report, err = script("tools.export", path, out, *["--onnx"] * (kind == "onnx"))
    assert (status, err) == (0, "")
    sizes = ast.literal_eval(report[report.index("has ") + 4 :])
    assert (tmp_path / f"m.{kind}.vocab").read_text().split("\n") == [*WORDS, ""]
    tokens = [surprisals(*checkpoint.open_model(path), text) for text in TEXTS]
    ids = torch.tensor([[0, *(token.id for token in column)] for column in tokens]).t()
    run, state = loaded(out), [torch.zeros(1, len(TEXTS), size) for _, _, size in sizes]
    row = 0
    for part in ids[:-1].split([1, 4, 2]):
        logprob, *state = run(part, *state)
        assert logprob.shape == (len(part), len(TEXTS), len(WORDS))
        for found in logprob:
            row += 1
            expected = [column[row - 1].logprob for column in tokens]
            assert found[range(3), ids[row]].tolist() == pytest.approx(expected, abs=1e-5)
    assert row == 7


def test_it_runs_without_this_code(script, tmp_path):
    path = tmp_path / "m.pt"
    model_file(path, wdrop=0.5)
    assert script("tools.export", path, tmp_path / "m.ts")[0] == 0
    code = (
        "import sys, torch\n"
        "words = open('m.ts.vocab').read().split()\n"
        "ids = torch.tensor([words.index(w) for w in sys.argv[1:]]).unsqueeze(1)\n"
        "state = [torch.zeros(1, 1, n) for n in (9, 9, 9, 9, 6, 6)]\n"
        "logprob, *state = torch.jit.load('m.ts')(ids[:-1], *state)\n"
        "print(logprob.squeeze(1).gather(1, ids[1:]).sum().item(), 'model' in sys.modules)\n"
    )
    command = [sys.executable, "-I", "-c", code, "<eos>", *TEXTS[0].split(), "<eos>"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    found, ours = done.stdout.split()
    argv = ["--checkpoint", path, "--no-cuda", "--plain", "--json", "--text", TEXTS[0]]
    expected = json.loads(script("score", *argv)[1])["logprob"]
    assert (float(found), ours) == (pytest.approx(expected, abs=1e-5), "False")


class Loop(model.GRU):
    """A GRU that is called step by step, in a loop that a trace unrolls."""

    def forward(self, x, state):
        outputs = []
        for step in x:
            output, state = super().forward(step.unsqueeze(0), state)
            outputs.append(output)
        return torch.cat(outputs), state


class Ones(model.GRU):
    """A GRU whose state starts at one."""

    def initial_state(self, bsz):
        return super().initial_state(bsz) + 1


@pytest.mark.parametrize("case", [Loop, Ones, "onnx", "input", "vocabulary", "folder"])
def test_what_is_refused(case, script, tmp_path, monkeypatch):
    path, out = tmp_path / "m.vocab", tmp_path / "m.ts"
    if isinstance(case, type):
        monkeypatch.setitem(model.CELLS, "Own", case)
    model_file(path, "Own" if isinstance(case, type) else "GRU", wdrop=0.0)
    out.write_text("old")
    before = path.read_bytes()
    monkeypatch.setitem(sys.modules, "onnx", None)
    target = {"input": path, "vocabulary": tmp_path / "m", "folder": tmp_path / "no" / "m.ts"}
    argv = [path, target.get(case, out), *["--onnx"] * (case == "onnx")]
    sentence = {
        Loop: "cannot be exported",
        Ones: "another length or batch gives another log p",
        "onnx": "--onnx needs the package onnx",
        "folder": "there is no folder",
    }.get(case, "it is an input")
    status, _, err = script("tools.export", *argv)
    assert (status, len(err.splitlines()), sentence in err) == (1, 1, True), err
    assert (path.read_bytes(), out.read_text()) == (before, "old")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.ts", "m.vocab"]
