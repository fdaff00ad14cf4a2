"""The estimate of a run's time after its first batches."""

import re

import pytest
from conftest import TINY

from run import estimate, metrics, session


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0.4 s"), (45.4, "45 s"), (840, "14 min"), (5399, "90 min"), (5400, "1.5 hours"),
        (36000, "10 hours"), (432000, "5.0 days"), (5e7, "579 days"),
    ],
)  # fmt: skip
def test_durations_in_words(seconds, words):
    assert estimate.in_words(seconds) == words


def test_the_time_left_is_that_of_the_epochs_less_what_is_done():
    epoch, left = estimate.times(0.01, train=90_000, valid=30_000, done=22_500, epochs=3)
    # 900 s of training and 100 s of evaluation an epoch, of which 225 s have passed.
    assert epoch == pytest.approx(1000)
    assert left == pytest.approx(3 * 1000 - 225)


def test_a_run_prints_it_once_and_a_trial_counts_its_batches(
    script, corpus_dir, tmp_path, monkeypatch
):
    argv = ["--data", corpus_dir, *TINY, "--save", tmp_path / "m.pt", "--epochs", 2]
    logged = ["--logdir", tmp_path, "--log-interval", 20]
    seen = []
    monkeypatch.setattr(
        session, "times", lambda *args, **kw: seen.append(kw) or estimate.times(*args, **kw)
    )
    _, out, _ = script("main", *argv, *logged, "--max-batches", 25)
    line = re.findall(r"\| about (.*) an epoch, .* until epoch 2 \| loss .*? ([\d.]+)\n", out)
    assert len(line) == 1
    (numbers,) = seen
    assert numbers["train"] == 25 * 10 * 8
    # The mean over tokens, where the log line's is over batches of several lengths.
    (first, *_) = [e["loss"] for e in metrics.read(tmp_path / "metrics.jsonl") if "grad_norm" in e]
    assert float(line[0][1]) == pytest.approx(first, abs=0.1)
    monkeypatch.setattr(session, "_LONG", 0)
    _, out, _ = script("main", *argv)
    assert out.count("an epoch") == out.count("a smaller model: --preset small") == 1
    _, out, _ = script("main", *argv, "--max-batches", 19)
    assert "an epoch" not in out
