"""dynamiceval.py compared with a loop over parameters with plain autograd."""

import contextlib
import math
import os
import re
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import TINY, full_disk
from references import pointer_losses
from test_training_step import Recorder

import checkpoint
import dynamiceval
import fast
from data import Corpus
from dynamic_evaluation import DynamicEvaluation
from fast.cuda_graphs import GraphedStep
from loss import TrainingLoss
from training import TrainingStep, evaluate
from utils import batchify

LINE = re.compile(r"\| End of dynamic evaluation \| (val|test) loss +(\S+) \| \1 ppl +(\S+)")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory, corpus_dir):
    """Model files of an LSTM with split softmax, a GRU and a QRNN, briefly trained."""
    import main

    folder = tmp_path_factory.mktemp("dynamic")
    with pytest.MonkeyPatch.context() as patch:
        for cell in ("LSTM", "GRU", "QRNN"):
            patch.setattr(main, "default_splits", lambda n, c=cell: [20] if c == "LSTM" else [])
            argv = ["--data", str(corpus_dir), *TINY, "--model", cell, "--epochs", "1", "--lr", "3"]
            main.main([*argv, "--save", str(folder / cell)])
    return folder


def copy_of(models, cell, tmp_path):
    return shutil.copy(models / cell, tmp_path / f"{cell}.pt")


def call(script, *argv):
    """Run dynamiceval.py: ([validation perplexity, test perplexity], output)."""
    status, out, err = script("dynamiceval", *argv, "--no-cuda")
    assert (status, err) == (0, "")
    found = LINE.findall(out)
    assert [part for part, _, _ in found] == ["val", "test"]
    return [float(ppl) for _, _, ppl in found], out


def losses_of(network, data, hidden):
    """Each word's loss (n,), the new state, the last layer's outputs, the probabilities."""
    model, criterion = network
    output, hidden, raw, _ = model(data[:-1], hidden, return_h=True)
    logprob = criterion.logprob(model.decoder.weight, model.decoder.bias, output)
    words = data[1:].flatten()
    detached = torch.utils._pytree.tree_map(torch.Tensor.detach, hidden)
    return -logprob[range(len(words)), words], detached, raw[-1], logprob.detach().exp()


def naive_rms(network, source, bptt):
    params = list(dict.fromkeys(p for module in network for p in module.parameters()))
    squares, segments, hidden = [torch.zeros_like(p) for p in params], 0, None
    for row in range(0, len(source) - 1, bptt):
        hidden = network[0].init_hidden(source.size(1)) if hidden is None else hidden
        losses, hidden, *_ = losses_of(network, source[row : row + bptt + 1].long(), hidden)
        for square, grad in zip(squares, torch.autograd.grad(losses.mean(), params), strict=True):
            square += grad * grad
        segments += 1
    return params, [(square / segments).sqrt() for square in squares], segments


def naive(network, source, bptt, params, rms, lr, lamb, epsilon, cache=None):
    """The perplexity of `source` (rows, 1); the parameters are restored at the end."""
    start = [p.detach().clone() for p in params]
    mean = sum(scale.mean() for scale in rms) / len(rms)
    total, hidden, outputs, probs = 0.0, network[0].init_hidden(1), [], []
    for row in range(0, len(source) - 1, bptt):
        losses, hidden, raw, p = losses_of(network, source[row : row + bptt + 1].long(), hidden)
        total += losses.sum().item()
        outputs.append(raw.detach().squeeze(1))
        probs.append(p)
        grads = torch.autograd.grad(losses.mean(), params)
        with torch.no_grad():
            for p, p0, scale, grad in zip(params, start, rms, grads, strict=True):
                pull = (scale / mean).clamp(max=1 / lamb if lamb else math.inf)
                p += lamb * pull * (p0 - p) - lr * grad / (scale + epsilon)
    if cache is not None:
        words = source[1:].flatten().long()
        total = sum(pointer_losses(torch.cat(outputs), words, torch.cat(probs), *cache))
    with torch.no_grad():
        for p, p0 in zip(params, start, strict=True):
            p.copy_(p0)
    return math.exp(total / (len(source) - 1))


@pytest.mark.parametrize("way", ["rms", "oldhyper", "sgd", "cache"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "QRNN"])
def test_it_is_the_loop_written_out(cell, way, models, script, corpus_dir, tmp_path):
    path = copy_of(models, cell, tmp_path)
    before = path.read_bytes()
    # 7 does not divide the lengths of the texts, so the last segments are shorter.
    flags = ["--data", corpus_dir, "--save", path, "--bptt", 7]
    lr, lamb, epsilon = (0.3, 0.05, 0) if way == "sgd" else (2e-3, 0.05, 1e-3)
    cache = (30, 0.5, 0.2) if way == "cache" else None
    flags += ["--lr", lr, "--lamb", lamb]
    flags += ["--sgd"] if way == "sgd" else ["--epsilon", epsilon, "--batch_size", 9]
    flags += ["--cache", "--window", 30, "--theta", 0.5, "--lambdasm", 0.2] if cache else []
    corpus = Corpus(corpus_dir, checkpoint.load(path).dictionary)
    rates = dict.fromkeys(("dropout", "dropouth", "dropouti", "dropoute", "wdrop"), 0.0)
    network = checkpoint.rebuild(checkpoint.load(path), CPU, **rates)
    params, rms, segments = naive_rms(network, batchify(corpus.train, 9), 7)
    if way == "sgd":
        rms = [torch.ones_like(p) for p in params]
    if way == "oldhyper":
        flags += ["--oldhyper", "--lr", lr * segments**0.5, "--lamb", lamb * len(params)]
        flags += ["--epsilon", epsilon * segments**0.5]
    expected = [
        naive(network, batchify(part, 1), 7, params, rms, lr, lamb, epsilon, cache)
        for part in (corpus.valid, corpus.test)
    ]
    ppl, _ = call(script, *flags)
    assert ppl == pytest.approx(expected, rel=1e-4, abs=0.006)
    static = evaluate(TrainingLoss(*network), batchify(corpus.test, 1), 10)
    assert abs(expected[1] - math.exp(static)) > 0.05  # learning has an effect
    assert path.read_bytes() == before


@pytest.mark.parametrize("cell", ["LSTM", "QRNN"])
def test_without_a_rate_and_a_pull_it_is_the_test_score(cell, models, script, corpus_dir, tmp_path):
    path = copy_of(models, cell, tmp_path)
    flags = ["--data", corpus_dir, "--save", path, "--lr", 0, "--lamb", 0, "--batch_size", 9]
    corpus = Corpus(corpus_dir, checkpoint.load(path).dictionary)
    network = checkpoint.rebuild(checkpoint.load(path), CPU)
    expected = math.exp(evaluate(TrainingLoss(*network), batchify(corpus.test, 1), 10))
    ppl, out = call(script, *flags)
    assert ppl[1] == pytest.approx(expected, abs=0.006)
    alone = re.findall(r"txt without dynamic evaluation \| loss +\S+ \| ppl +(\S+)\n", out)
    assert list(map(float, alone)) == pytest.approx(ppl, abs=0.011)


def test_the_settings_the_models_own_loss_and_what_is_partial(models, script, corpus_dir, tmp_path):
    path = copy_of(models, "LSTM", tmp_path)
    flags = ["--data", corpus_dir, "--save", path, "--bptt", 7, "--max-batches", 9, "--cache"]
    _, out = call(script, *flags, "--sgd", "--lr", 0.3, "--window", 30, "--grid")
    assert (
        "Dynamic evaluation: --batch_size 100 --bptt 7 --epsilon 2e-05 --grid --lamb 0.002 --lr "
        "0.3 --sgd\nCache: --cache --lambdasm 0.12785920428335693 --theta 0.66"
    ) in out
    corpus = Corpus(corpus_dir, checkpoint.load(path).dictionary)
    network = TrainingLoss(*checkpoint.rebuild(checkpoint.load(path), CPU))
    line = r"without dynamic evaluation and the cache \| loss +\S+ \| ppl +(\S+) \| partial: (\S+)%"
    for found, part in zip(re.findall(line, out), (corpus.valid, corpus.test), strict=True):
        loss = evaluate(network, batchify(part, 1)[: 7 * 9 + 1], 5)
        assert float(found[0]) == pytest.approx(math.exp(loss), abs=0.006)
        assert float(found[1]) == pytest.approx(100 * 63 / (len(part) - 1), abs=0.06)
    lines = [line for line in out.splitlines() if " ppl " in line]
    assert len(lines) == 25 + 4
    assert all("of the text" in line for line in lines)


@pytest.mark.parametrize(
    ("lr", "lamb", "edge"),
    [(5e-5, 2e-3, False), (1e-4, 2e-3, True), (5e-5, 1e-3, True), (5e-5, 1.0, True)],
)
def test_a_best_setting_at_the_grids_edge_is_said(lr, lamb, edge, monkeypatch, capsys):
    def lossy(network, optimizer, *_):
        group = optimizer.param_groups[0]
        return abs(math.log(group["lr"] / lr)) + abs(math.log(group["lamb"] / lamb)), 1

    monkeypatch.setattr(dynamiceval, "run", lossy)
    optimizer = DynamicEvaluation([torch.ones(2)], None, 5e-5, 1.0, 1.0)
    # Its numbers are those that --oldhyper has scaled, if it was given.
    args = Namespace(bptt=5, max_batches=None, oldhyper=edge)
    dynamiceval.tune(None, optimizer, torch.ones(9, 1), args)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
    assert optimizer.param_groups[0]["lamb"] == pytest.approx(lamb)
    out = capsys.readouterr().out
    assert ("at the grid's edge" in out) == edge
    rest = " --epsilon 1, without --oldhyper" if edge else ""
    assert f"| best: --lr {lr:.4g} --lamb {lamb:.4g}{rest}\n" in out


def test_statistics_are_collected_once(models, script, corpus_dir, tmp_path, monkeypatch):
    path = copy_of(models, "GRU", tmp_path)
    flags = ["--data", corpus_dir, "--save", path, "--batch_size", 9, "--max-batches", 20]
    collected = []
    init = dynamiceval.GradientStatistics.rms
    monkeypatch.setattr(
        dynamiceval.GradientStatistics, "rms", lambda *a: collected.append(1) or init(*a)
    )
    first, _ = call(script, *flags)
    assert call(script, *flags, "--lr", 5e-5)[0] == first
    assert len(collected) == 1
    # Other segments, weights, a damaged file, edited code: the statistics are collected again.
    call(script, *flags, "--bptt", 6)
    model = checkpoint.load(path)
    model.model["decoder.bias"] += 1
    checkpoint.save(path, model)
    call(script, *flags)
    (tmp_path / "GRU.pt.rms").write_bytes(b"nothing")
    call(script, *flags)
    monkeypatch.setattr(dynamiceval, "source_digest", lambda *parts: "edited")
    call(script, *flags)
    assert len(collected) == 5


def test_a_flipped_bit_in_the_statistics_is_refused_or_changes_nothing(
    models, script, corpus_dir, tmp_path
):
    path, rms = copy_of(models, "GRU", tmp_path), tmp_path / "GRU.pt.rms"
    call(script, "--data", corpus_dir, "--save", path, "--batch_size", 9, "--max-batches", 3)
    model, criterion = checkpoint.rebuild(checkpoint.load(path), CPU)
    params = list(TrainingLoss(model, criterion).parameters())
    content, held = rms.read_bytes(), torch.load(rms)
    expected, refused = dynamiceval.read_statistics(rms, held["key"], held["text"], params), []
    for place in range(0, len(content), 97):
        flipped = content[place] ^ 1 << place % 8
        rms.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        found = dynamiceval.read_statistics(rms, held["key"], held["text"], params)
        refused.append(found is None)
        assert found is None or found[1] == expected[1]
        assert found is None or all(map(torch.equal, found[0], expected[0]))
    assert 0.5 < sum(refused) / len(refused) < 1
    rms.write_bytes(content)
    wrong = [part.clone().fill_(math.nan) for part in held["rms"]]
    parts = {"rms": held["rms"][:-1], "segments": 0, "key": "other", "text": "other"}
    for rest in ({"rms": wrong}, *({name: part} for name, part in parts.items())):
        torch.save({**held, **rest}, tmp_path / "wrong")
        found = dynamiceval.read_statistics(tmp_path / "wrong", held["key"], held["text"], params)
        assert found is None


def test_train_txt_is_needed_for_new_statistics_alone(models, script, corpus_dir, tmp_path):
    path, folder = copy_of(models, "GRU", tmp_path), tmp_path / "held-out"
    flags = ["--save", path, "--max-batches", 9]
    pointer = [script("pointer", "--data", corpus_dir, *flags, "--bptt", 9, "--no-cuda")]
    by_sgd, _ = call(script, "--data", corpus_dir, *flags, "--sgd")
    shutil.copytree(corpus_dir, folder, ignore=shutil.ignore_patterns("train.txt", ".corpus*"))
    flags += ["--data", folder]
    pointer.append(script("pointer", *flags, "--bptt", 9, "--no-cuda"))
    assert pointer[0] == pointer[1]
    assert pointer[0][0] == 0
    assert call(script, *flags, "--sgd")[0] == by_sgd
    # No statistics, then those of other settings.
    refusal = f"{folder} has no train.txt to collect .* and {path}.rms has none for these weights"
    for _ in range(2):
        status, _, err = script("dynamiceval", *flags, "--bptt", 6)
        assert (status, re.search(refusal, err) is None) == (1, False)
        expected, _ = call(script, *flags, "--data", corpus_dir)
    found, out = call(script, *flags)
    assert found == expected
    assert f"{folder} has no train.txt: {path}.rms is used, and its text is not compared" in out
    for stage in ("main", "finetune"):
        status, _, err = script(stage, *flags, "--no-cuda")
        assert (status, f"the corpus folder {folder} has no train.txt: fetch" in err) == (1, True)
    assert not (folder / ".corpus-cache").exists()


@pytest.mark.parametrize("case", ["full disk", "pipe"])
def test_statistics_that_cannot_be_kept(case, models, script, corpus_dir, tmp_path):
    path, rms = copy_of(models, "GRU", tmp_path), tmp_path / "GRU.pt.rms"
    if case == "pipe":
        os.mkfifo(rms)
    with full_disk(4000) if case == "full disk" else contextlib.nullcontext():
        _, out = call(script, "--data", corpus_dir, "--save", path, "--max-batches", 3)
    kept = "The next run collects the statistics again: cannot write" not in out
    assert kept == (case == "pipe") == rms.is_file()


def test_the_grid_takes_no_setting_that_is_not_finite(models, script, corpus_dir, tmp_path):
    flags = ["--data", corpus_dir, "--save", copy_of(models, "GRU", tmp_path), "--sgd"]
    _, out = call(script, *flags, "--max-batches", 9, "--gridfast", "--lr", 1e36)
    tried = re.findall(r"\| lr (\S+) \| lamb \S+ \| val ppl +(\S+)", out)
    assert tried[0] == ("1e+36", "inf")
    assert "best: --lr 1e+36" not in out


def test_the_grid_is_no_worse_than_the_setting_given(models, script, corpus_dir, tmp_path):
    path = copy_of(models, "QRNN", tmp_path)
    flags = ["--data", corpus_dir, "--save", path, "--batch_size", 9, "--max-batches", 20]
    given, _ = call(script, *flags)
    tuned, out = call(script, *flags, "--grid")
    tried = [float(ppl) for ppl in re.findall(r"\| lamb \S+ \| val ppl +(\S+)", out)]
    assert len(tried) == 25
    assert tried[0] == given[0]
    assert tuned[0] == min(tried)
    best = re.search(r"\| best: (--lr \S+ --lamb \S+)", out)[1].split()
    assert call(script, *flags, *best)[0] == pytest.approx(tuned, abs=0.011)


@pytest.mark.parametrize("sgd", [False, True])
def test_recorded_and_replayed_it_is_the_same(sgd, models):
    """The recorder replaces CUDA graphs; in a graph the rate is a tensor on the device."""
    losses, weights = [], []
    source = torch.arange(200).remainder(60).unsqueeze(1).int()
    for recorded in (False, True):
        model, criterion = checkpoint.rebuild(checkpoint.load(models / "GRU"), CPU, wdrop=0.0)
        params = list(model.parameters())
        rms = None if sgd else [torch.full_like(p, 1e-3) for p in params]
        optimizer = DynamicEvaluation(params, rms, 0.1 if sgd else 1e-4, 0.01, 1e-4)
        network = TrainingLoss(model, criterion).eval()
        step = TrainingStep(network, optimizer, source, bptt=5, clip=0.0)
        fast.choose(network, optimizer, step)
        if recorded:
            step.__class__ = GraphedStep
            step.set_up(record=Recorder(step))
        while step.row < len(source) - 1:
            step.take(min(5, len(source) - 1 - step.row), 5)
        losses.append(step.total.item() / step.row)
        weights.append([p.detach().clone() for p in params])
    assert step._record.replayed > 30
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)
