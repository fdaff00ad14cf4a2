"""continuous_cache.py and pointer.py compared with per-token evaluation over the vocabulary."""

import math
import re
from argparse import Namespace

import pytest
import references
import torch
from conftest import ORIGINAL_CELLS

import continuous_cache
import pointer
from continuous_cache import ContinuousCache
from data import Corpus
from loss import TrainingLoss
from model import RNNModel
from scoring.search import Setting
from splitcross import SplitCrossEntropyLoss


@pytest.mark.parametrize("from_start", [False, True])
@pytest.mark.parametrize("window", [1, 5, 30, 200])
@pytest.mark.parametrize("chunk", [1, 4, 57, 120])
def test_target_prob(window, chunk, from_start, monkeypatch):
    monkeypatch.setattr(continuous_cache, "_BLOCK", 16)
    torch.manual_seed(0)
    outputs, words = torch.randn(120, 5), torch.randint(6, (120,))
    # At lambda 1 the mixture is the cache alone. Where the cache is not yet in use, or lacks the
    # word, the reference would be log 0, hence the 1e-30.
    nothing = torch.full((120, 6), 1e-30)
    losses = references.pointer_losses(outputs, words, nothing, window, 0.8, 1.0 - 1e-9, from_start)
    cache = ContinuousCache(window, 0.8, from_start)
    parts = [
        cache.target_prob(h, w)
        for h, w in zip(outputs.split(chunk), words.split(chunk), strict=True)
    ]
    probs = torch.cat([p for p, _ in parts])
    in_use = torch.cat([s for _, s in parts])
    assert in_use.tolist() == [t > (0 if from_start else window) for t in range(120)]
    assert (probs[~in_use] == 0).all()
    expected = torch.tensor(losses).neg().exp()
    torch.testing.assert_close(probs[in_use], expected[in_use], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rnn_type", ORIGINAL_CELLS)
@pytest.mark.parametrize("splits", [(), (10, 25)])
@pytest.mark.parametrize("from_start", [False, True])
def test_evaluate(rnn_type, splits, from_start):
    torch.manual_seed(0)
    model = RNNModel(rnn_type, 40, 6, 9, 2, wdrop=0.5, tie_weights=True)
    criterion = SplitCrossEntropyLoss(6, splits)
    torch.nn.init.normal_(model.encoder.weight, std=2)
    source = torch.randint(40, (77, 1))
    model.eval()
    with torch.no_grad():
        output, _, raw, _ = model(source[:-1], model.init_hidden(1), return_h=True)
        vocabulary = criterion.logprob(model.decoder.weight, model.decoder.bias, output).exp()
    words = source[1:].flatten()
    for window in (1, 20, 75, 500):
        args = (raw[-1].squeeze(1), words, vocabulary, window, 3.0, 0.3, from_start)
        losses = references.pointer_losses(*args)
        # Some chunks have one token, also at the end; the original fails on those.
        for bptt, batches in (*((n, None) for n in (1, 2, 25, 75, 76, 5000)), (25, 2)):
            scored = losses[: bptt * batches] if batches else losses
            expected = sum(scored) / len(scored)
            args = Namespace(bptt=bptt, max_batches=batches, cache_from_start=from_start)
            setting = Setting(window, 3.0, 0.3, math.nan)
            network = TrainingLoss(model, criterion)
            loss = pointer.evaluate(network, source, setting, args, "the text")
            assert loss == pytest.approx(expected, abs=1e-5), (window, bptt)


def test_memory_is_of_the_window_not_of_the_stream():
    cache = ContinuousCache(10, 1.0)
    for _ in range(5):
        cache.target_prob(torch.randn(300, 4), torch.randint(9, (300,)))
    held = [t for t in vars(cache).values() if isinstance(t, torch.Tensor)]
    assert len(held) == 2
    assert all(t.untyped_storage().nbytes() <= 10 * 4 * 8 for t in held)


def test_large_scores_do_not_overflow():
    cache = ContinuousCache(5, 100.0, from_start=True)
    probs, in_use = cache.target_prob(torch.full((20, 4), 30.0), torch.zeros(20, dtype=torch.int64))
    torch.testing.assert_close(probs[in_use], torch.ones(19))


def test_the_settings_the_loss_without_the_cache_and_a_cache_that_is_never_used(
    script, trained, corpus_dir
):
    argv = ["--data", corpus_dir, "--save", trained["LSTM"], "--no-cuda"]
    # The longer text, valid.txt, has a last position that would be the cache's first.
    rows = len(Corpus(corpus_dir).valid) - 1
    for window, used in ((20, True), (rows - 1, False), (3785, False)):
        _, out, _ = script("pointer", *argv, "--window", window, "--lambdasm", 0.1)
        assert f"Cache: --lambdasm 0.1 --theta 0.6625523432485668 --window {window}\n" in out
        alone = re.findall(r"without the cache \| loss +\S+ \| ppl +(\S+)", out)
        mixed = re.findall(r"\| (?:val|test) ppl +(\S+)", out)
        assert len(alone) == len(mixed) == 2
        assert (alone != mixed) == used
        assert out.count("is too short for --window") == 2 * (not used)
    score = ["score", corpus_dir / "test.txt", "--checkpoint", trained["LSTM"], "--no-cuda"]
    scored = script(*score, "--as-corpus")[1]
    assert f" {math.log2(float(alone[1])):.2f}" in scored  # bits a token
