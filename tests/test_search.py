"""scoring/search.py and pointer.py --search, --by-word, --plot compared with naive references."""

import itertools
import math
import re

import pytest
import references
import torch

import pointer
from continuous_cache import ContinuousCache
from scoring import search as searching
from scoring import words as words_of
from scoring.search import Setting
from scoring.stream import Piece


def stream(n, size=5, vocabulary=6, scale=1.0):
    torch.manual_seed(0)
    words = torch.randint(vocabulary, (n,))
    table = torch.randn(n, vocabulary).log_softmax(dim=1)
    return torch.randn(n, size) * scale, words, table


def piece_of(outputs, words, table):
    return Piece(outputs, words, table.gather(1, words.unsqueeze(1)).squeeze(1))


@pytest.mark.parametrize("block", [1, 7, 16, 500])
@pytest.mark.parametrize("n", [1, 2, 60])
def test_every_window_and_theta(n, block, monkeypatch):
    monkeypatch.setattr(searching, "_BLOCK", block)
    outputs, words, _ = stream(n)
    windows, thetas = [1, 5, 30, 59, 60, 400], [0.0, 0.7, 3.0]
    done = []
    probs = searching.target_probs(outputs, words, windows, thetas, done.append)
    assert probs.shape == (6, 3, n)
    assert sum(done) == n
    for w, window in enumerate(windows):
        for k, theta in enumerate(thetas):
            expected = torch.zeros(n)
            for t in range(1, n):
                past = range(max(0, t - window), t)
                attention = (theta * (outputs[list(past)] @ outputs[t])).softmax(dim=0)
                expected[t] = sum(
                    a for a, i in zip(attention, past, strict=True) if words[i] == words[t]
                )
            torch.testing.assert_close(probs[w, k], expected, atol=1e-6, rtol=1e-5)


def test_scores_far_above_those_of_a_window(monkeypatch):
    # At these scores a small window's exponentials underflow relative to the widest window's.
    monkeypatch.setattr(searching, "_BLOCK", 16)
    outputs, words, _ = stream(60, scale=30.0)
    probs = searching.target_probs(outputs, words, [2, 10, 50], [0.5, 20.0])
    for (w, window), (k, theta) in itertools.product(enumerate([2, 10, 50]), enumerate([0.5, 20])):
        cache = ContinuousCache(window, theta, from_start=True)
        expected = cache.target_prob(outputs, words)[0]
        torch.testing.assert_close(probs[w, k], expected, atol=1e-5, rtol=1e-4)


def test_best_lambda():
    outputs, words, table = stream(200)
    logprob = piece_of(outputs, words, table).logprob
    for p_cache in (torch.rand(200), torch.rand(200) ** 3, torch.rand(200) * (words == 2)):
        lambdasm, gain = searching.best_lambda(logprob, p_cache)

        def total(x, p_cache=p_cache):
            mixed = x * p_cache.double() + (1 - x) * logprob.double().exp()
            return (mixed.log() - logprob.double()).sum().item()

        best = max(range(1000), key=lambda i: total(i / 1000))
        assert lambdasm == pytest.approx(best / 1000, abs=0.0011)
        assert gain == pytest.approx(total(lambdasm), abs=1e-6)
    # A cache that is always right, one that never is, no positions, words the model rules out.
    assert searching.best_lambda(logprob, torch.ones(200))[0] == 0.999
    assert searching.best_lambda(logprob, torch.zeros(200)) == (0.0, 0.0)
    assert searching.best_lambda(logprob[:0], logprob[:0]) == (0.0, 0.0)
    lambdasm, gain = searching.best_lambda(torch.full((9,), -1e4), torch.full((9,), 0.5))
    assert lambdasm == 0.999
    assert math.isfinite(gain)


@pytest.mark.parametrize("from_start", [False, True])
def test_grid_has_each_setting_at_its_best(from_start):
    outputs, words, table = stream(80)
    piece = piece_of(outputs, words, table)
    for setting in searching.grid(piece, [5, 30, 90], [0.3, 1.0], from_start):

        def loss(x, setting=setting):
            args = (outputs, words, table.exp(), setting.window, setting.theta, x, from_start)
            losses = references.pointer_losses(*args)
            return sum(losses) / len(losses)

        assert setting.loss == pytest.approx(loss(setting.lambdasm), abs=1e-5)
        assert setting.loss <= min(loss(x / 20) for x in range(20)) + 1e-6
        assert searching.loss_at(piece, setting, from_start) == pytest.approx(
            setting.loss, abs=1e-5
        )


@pytest.mark.parametrize("from_start", [False, True])
def test_search_is_at_least_as_good_as_what_was_given(from_start):
    # Equal words follow similar outputs, so that the cache helps.
    torch.manual_seed(1)
    words = torch.randint(6, (300,))
    outputs = torch.randn(6, 8)[words] + 0.5 * torch.randn(300, 8)
    table = torch.randn(300, 6).log_softmax(dim=1)
    piece = piece_of(outputs, words, table)
    for window, theta, lambdasm in ((7, 0.9, 0.5), (500, 0.0, 0.0), (100, 3.0, 0.9)):
        given = Setting(window, theta, lambdasm, math.nan)
        given = given._replace(loss=searching.loss_at(piece, given, from_start))
        table_, best = searching.search(piece, given, from_start)
        assert (window, theta) in {setting[:2] for setting in table_}
        assert best.loss <= given.loss
        assert best.loss == searching.loss_at(piece, best, from_start)
        assert best.loss <= min(setting.loss for setting in table_) + 1e-5
    better = given._replace(loss=0.0)
    assert searching.search(piece, better, from_start)[1] == better


def test_changes_by_word():
    gain = torch.tensor([1.0, -2.0, 0.5, 0.25, 0.0])
    words = torch.tensor([2, 0, 2, 3, 1])
    found = words_of.changes(gain, words, ["a", "b", "c", "d", "e"])
    assert found == [("c", 1.5, 2), ("d", 0.25, 1), ("b", 0.0, 1), ("a", -2.0, 1)]
    helped, hurt = words_of.extremes(found, 5)
    assert [change.word for change in helped] == ["c", "d"]
    assert [change.word for change in hurt] == ["a"]
    assert [change.word for change in words_of.extremes(found, 1)[0]] == ["c"]


END = re.compile(r"\| End of pointer \| (val|test) loss +\S+ \| \1 ppl +(\S+)")


@pytest.mark.parametrize("from_start", [False, True])
def test_search_by_the_command_line(from_start, script, trained, corpus_dir):
    flags = ["--data", corpus_dir, "--save", trained["LSTM"], "--no-cuda"]
    flags += ["--cache-from-start"] if from_start else []
    given = ["--window", 40, "--theta", 1, "--lambdasm", 0.05]
    status, plain, err = script("pointer", *flags, *given)
    assert (status, err) == (0, "")
    status, out, err = script("pointer", *flags, *given, "--search", "--bptt", 33)
    assert (status, err) == (0, "")
    assert out == script("pointer", *flags, *given, "--search", "--bptt", 1000)[1]
    assert float(dict(END.findall(out))["val"]) <= float(dict(END.findall(plain))["val"])
    ((best, ppl),) = re.findall(r"\| best: (.*) \| val ppl (\S+)", out)
    assert dict(END.findall(out))["val"] == ppl
    # The printed best setting, passed as flags, gives the same scores.
    assert END.findall(script("pointer", *flags, *best.split())[1]) == END.findall(out)
    ((_, ppl),) = re.findall(r"\| given: (.*) \| val ppl (\S+)", out)
    assert dict(END.findall(plain))["val"] == ppl


def test_by_word_and_plot(script, trained, corpus_dir, tmp_path):
    flags = ["--data", corpus_dir, "--save", trained["GRU"], "--no-cuda", "--window", 40]
    flags += ["--theta", 1, "--lambdasm", 0.3]
    plain = script("pointer", *flags)[1]
    status, out, err = script("pointer", *flags, "--by-word", 3)
    assert (status, err) == (0, "")
    assert out.endswith(plain[plain.index("=" * 89) :])
    assert "| valid.txt without the cache | loss" in out
    rows = re.findall(r"^\| +(-?[\d.]+) \| +(-?[\d.]+) \| +(\d+) \| (\S+)$", out, re.MULTILINE)
    assert len(rows) == 6
    sums = [float(row[0]) for row in rows]
    assert sums[:3] == sorted(sums[:3], reverse=True)
    assert sums[3:] == sorted(sums[3:])
    assert sums[2] > 0 > sums[5]
    valid = (corpus_dir / "valid.txt").read_text().replace("\n", " <eos> ").split()[1:]
    for total, mean, count, word in rows:
        assert valid.count(word) == int(count)
        assert float(mean) == pytest.approx(float(total) / int(count), abs=0.006)

    pytest.importorskip("matplotlib")
    path = tmp_path / "words.svg"
    status, out, err = script("pointer", *flags, "--max-batches", 1, "--plot", path)
    assert (status, err, out.count(f"Wrote {path}\n")) == (0, "", 1)
    assert "partial" not in out  # one chunk is all of it
    assert path.read_bytes().startswith(b"<?xml")
    assert "words of valid.txt" not in out


@pytest.mark.parametrize(
    ("window", "theta", "line"),
    [
        (20, 0.5, ""), (10, 1.0, ""), (5, 0.5, "outside the table"), (20, 2.0, "outside the table"),
        (20, 0.2, "outside the table"), (40, 2.0, "--window 80 looks further back"),
    ],
)  # fmt: skip
def test_a_best_setting_at_the_edge_is_said(window, theta, line, capsys):
    table = [searching.Setting(w, t, 0.1, 5.0) for w in (10, 20, 40) for t in (0.5, 1.0)]
    best = searching.Setting(window, theta, 0.1, 4.0)
    pointer.print_search(table, best, table[0], 100, " | partial")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(" | partial") if not line else line in last


@pytest.mark.parametrize("picture", ["words.txt", "none/words.png"])
def test_a_picture_that_cannot_be_drawn_is_refused_first(picture, script, trained, corpus_dir):
    argv = ["--data", corpus_dir, "--save", trained["LSTM"], "--plot", picture]
    status, out, err = script("pointer", *argv)
    assert (status, out) == (1, "")
    assert re.search(rf"cannot (draw|write) {picture}", err)
