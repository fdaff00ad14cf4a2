"""The four scripts on one model file: the stages, resuming, interruption, bad input."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ORIGINAL_CELLS, ROOT, TINY, full_disk, linux_only

import checkpoint
import nt_asgd
import training
from checkpoint.network import plain_name
from loss import TrainingLoss
from run import metrics
from run.rehearsal import differing_files
from run.signals import Output, Stopped
from training import TrainingStep

BATCH = re.compile(
    r"\| epoch +\d+ \| +\d+/ *\d+ batches \| lr \d+\.\d{5} \| ms/batch +\d+\.\d\d \| "
    r"loss +\d+\.\d\d \| ppl +\d+\.\d\d \| bpc +\d+\.\d{3}"
)
EPOCH = re.compile(
    r"\| end of epoch +(\d+) \| time: +\d+\.\d\ds \| valid loss +(\d+\.\d\d) \| "
    r"valid ppl +(\d+\.\d\d) \| valid bpc +\d+\.\d{3}"
)
END = re.compile(
    r"\| End of (training|pointer) \| (val|test) loss +\d+\.\d\d \| "
    r"(?:val|test) ppl +(\d+\.\d\d)(?: \| test bpc +\d+\.\d{3})?$",
    re.MULTILINE,
)


@pytest.fixture
def output(script):
    """The output of a script that ends well and has nothing to report on standard error."""

    def run(name, *argv):
        status, out, err = script(name, *argv)
        assert (status, err) == (0, "")
        return out

    return run


@pytest.fixture
def flags(corpus_dir):
    """Flags of main.py and finetune.py for the tiny corpus."""
    return ["--data", corpus_dir, *TINY, "--lr", 5]


@pytest.fixture
def train(output, flags):
    """Train on the tiny corpus into a file; returns the output."""
    return lambda path, *more: output("main", *flags, "--save", path, *more)


def weights(path):
    content = torch.load(path, weights_only=True)
    return {**content["model"], **content["criterion"]}


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def unigram_perplexity(corpus_dir):
    train = (corpus_dir / "train.txt").read_text().replace("\n", " <eos> ").split()
    test = (corpus_dir / "test.txt").read_text().replace("\n", " <eos> ").split()
    counts = {word: train.count(word) for word in set(train)}
    return math.exp(-sum(math.log(counts[w] / len(train)) for w in test) / len(test))


@pytest.mark.parametrize("cell", ORIGINAL_CELLS)
def test_four_stages(cell, script, output, train, flags, corpus_dir, tmp_path):
    path = tmp_path / "m.pt"
    out = train(path, "--model", cell, "--epochs", 4, "--log-interval", 10)
    assert [int(e[0]) for e in EPOCH.findall(out)] == [1, 2, 3, 4]
    batch_lines = [line for line in out.splitlines() if "ms/batch" in line]
    assert len(batch_lines) > 20
    assert all(BATCH.fullmatch(line) for line in batch_lines)
    assert batch_lines[0].startswith("| epoch   1 |    10/")
    ((_, _, main_ppl),) = END.findall(out)
    assert float(main_ppl) < unigram_perplexity(corpus_dir)

    trained_loss = checkpoint.load(path).valid_loss

    # The published commands repeat main.py's flags, with or without --model.
    repeated = ["--model", cell] if cell == "QRNN" else []
    out = output("finetune", *flags, "--save", path, "--epochs", 3, *repeated)
    ((kind, part, finetuned_ppl),) = END.findall(out)
    assert (kind, part) == ("training", "test")
    finetuned = checkpoint.load(path)
    assert finetuned.stage == "finetune.py"
    assert finetuned.valid_loss < trained_loss
    assert float(finetuned_ppl) < unigram_perplexity(corpus_dir)

    scored = ["--data", corpus_dir, "--save", path, "--window", 50, "--no-cuda"]
    out = output("pointer", *scored, "--bptt", 70)
    assert [e[:2] for e in END.findall(out)] == [("pointer", "val"), ("pointer", "test")]
    assert output("pointer", *scored, "--bptt", 7) == out

    text = tmp_path / "text.txt"
    status, _, err = script("generate", "--checkpoint", path, "--outf", text, "--words", 45)
    assert (status, err) == (0, f"written to {text}\n")
    lines = text.read_text().splitlines()
    assert [len(line.split()) for line in lines] == [20, 20, 5]
    known = set(checkpoint.load(path).dictionary.idx2word)
    assert set(text.read_text().split()) <= known


def test_split_softmax_through_all_stages(output, train, flags, corpus_dir, tmp_path, monkeypatch):
    import main

    monkeypatch.setattr(main, "default_splits", lambda ntoken: [10, 25, 40])
    path = tmp_path / "m.pt"
    ((_, _, ppl),) = END.findall(train(path, "--epochs", 6))
    assert float(ppl) < unigram_perplexity(corpus_dir)
    loaded = checkpoint.load(path)
    # Split points assume ids sorted by frequency; later stages use the same ids.
    counts = loaded.vocabulary["counts"]
    assert counts == sorted(counts, reverse=True)
    assert loaded.criterion["tail_vectors"].abs().sum() > 0
    output("finetune", *flags, "--save", path, "--epochs", 1)
    output("pointer", "--data", corpus_dir, "--save", path, "--window", 20)
    output("generate", "--checkpoint", path, "--outf", "-", "--words", 20)


@pytest.mark.parametrize("stage", ["main", "finetune"])
def test_a_seed_decides_the_run(stage, output, flags, trained, tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        if stage == "finetune":
            shutil.copy(trained["LSTM"], tmp_path / name)
        output(stage, *flags, "--epochs", 2, "--seed", seed, "--save", tmp_path / name)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "a", tmp_path / "c")


@pytest.fixture
def switch_after_two_epochs(monkeypatch):
    """Make averaging start after the second epoch, whatever the losses."""

    def update(self, loss):
        self.losses.append(loss)
        return len(self.losses) == 2

    monkeypatch.setattr(nt_asgd.NonMonotonicTrigger, "update", update)


@pytest.mark.usefixtures("switch_after_two_epochs")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("cell", ORIGINAL_CELLS)
def test_resume_goes_on_as_if_nothing_had_happened(cell, optimizer, output, train, flags, tmp_path):
    # The run includes the switch to averaging and a division of the rate by --when.
    own = ["--model", cell, "--when", 3, "--optimizer", optimizer, "--max-batches", 40]
    own += ["--lr", 5 if optimizer == "sgd" else 0.02]
    whole = train(tmp_path / "whole", *own, "--epochs", 6)
    if optimizer == "sgd":
        assert "Switching to averaged SGD" in whole
    path = tmp_path / "resumed"
    epochs = EPOCH.findall(train(path, *own, "--epochs", 1))
    for last in (3, 5, 6):
        # With flags from the file, or with the run's own flags repeated.
        repeated = [*flags, *own] if last > 3 else ["--max-batches", 40]
        epochs += EPOCH.findall(output("main", *repeated, "--resume", path, "--epochs", last))
        assert epochs == EPOCH.findall(whole)[:last]
    assert_same_weights(tmp_path / "whole", path)


def test_resume_with_changed_dropouts_and_rate(output, train, tmp_path):
    path, other = tmp_path / "m.pt", tmp_path / "other.pt"
    train(path, "--epochs", 1)
    old = path.read_bytes()
    changed = ["--wdrop", 0, "--dropouti", 0.1, "--dropoute", 0.3, "--lr", 2, "--save", other]
    out = output("main", "--resume", path, "--epochs", 2, *changed, "--log-interval", 30)
    assert "lr 2.00000" in out
    assert path.read_bytes() == old
    config = checkpoint.load(other).config
    assert (config["wdrop"], config["dropouti"], config["dropoute"]) == (0, 0.1, 0.3)


@pytest.mark.usefixtures("switch_after_two_epochs")
@pytest.mark.parametrize("wdrops", [(0.4, 0), (0, 0.4)])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("cell", ORIGINAL_CELLS)
def test_weight_drop_turned_on_or_off_on_the_way(cell, optimizer, wdrops, output, train, tmp_path):
    """The optimiser's state is kept, and the file can be resumed without a better model."""
    path = tmp_path / "m.pt"
    own = ["--model", cell, "--optimizer", optimizer, "--lr", 5 if optimizer == "sgd" else 0.02]
    train(path, *own, "--wdrop", wdrops[0], "--epochs", 3, "--max-batches", 40)
    before = checkpoint.load(path)
    resumed = ["--resume", path, "--max-batches", 4]
    output("main", *resumed, "--epochs", 4, "--lr", 1e-9, "--wdrop", wdrops[1])
    after = checkpoint.load(path)
    assert after.training["args"]["wdrop"] == wdrops[1]
    # At this rate the weights do not change, and each keeps its optimiser state.
    name = "average" if optimizer == "sgd" else "exp_avg_sq"
    for state in (before, after):
        trained = [n for n in state.training["model"] if n != "decoder.weight"]
        for number, held in state.training["optimizer"]["state"].items():
            assert held[name].shape == state.training["model"][trained[number]].shape
    weights = {plain_name(n): t for n, t in before.training["model"].items()}
    for weight, tensor in after.training["model"].items():
        torch.testing.assert_close(tensor, weights[plain_name(weight)], atol=1e-4, rtol=1e-4)
    # The next resumed run has the last run's dropout, not the dropout of the best model.
    assert f"'wdrop': {float(wdrops[1])}" in output("main", *resumed, "--epochs", 5)


@pytest.mark.usefixtures("switch_after_two_epochs")
def test_copies_divided_rates_and_averaged_weights(train, tmp_path):
    path = tmp_path / "m.pt"
    out = train(path, "--when", 2, 3, "--epochs", 4, "--log-interval", 30)
    divided, switched = "Dividing learning rate by 10", "Switching to averaged SGD"
    parts = re.split(f"{divided}\n(?:{switched}\n)?", out)
    assert [set(re.findall(r"lr (\S+)", part)) for part in parts] == [
        {"5.00000"}, {"0.50000"}, {"0.05000"},
    ]  # fmt: skip
    # Averaging begins at the divided rate.
    assert out.index(divided) < out.index(switched) < out.rindex(divided)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pt", "m.pt.e2", "m.pt.e3"]
    assert checkpoint.load(f"{path}.e2").epoch == 2
    # The averaged weights are saved, the raw ones trained on.
    content = checkpoint.load(path)
    averaged, raw = content.model["encoder.weight"], content.training["model"]["encoder.weight"]
    assert not torch.equal(averaged, raw)
    stored = [s["average"] for s in content.training["optimizer"]["state"].values()]
    assert any(a.shape == raw.shape and not torch.equal(a, raw) for a in stored)


def test_a_first_log_line_is_the_mean_of_its_batches(train, tmp_path):
    own = ["--epochs", 1, "--max-batches", 6, "--lr", 0.001, "--seed", 2]
    losses = {}
    for interval in (1, 3):
        out = train(tmp_path / f"{interval}.pt", *own, "--log-interval", interval)
        losses[interval] = [float(loss) for loss in re.findall(r"/batch .* loss +(\S+) \|", out)]
    expected = [sum(losses[1][:3]) / 3, sum(losses[1][3:]) / 3]
    assert losses[3] == pytest.approx(expected, abs=0.011)


def test_another_log_interval_on_the_way(output, middle_of_an_epoch, tmp_path):
    own = ["--log-interval", 7, "--max-batches", 7, "--epochs", 1]
    out = output("main", "--resume", middle_of_an_epoch, "--save", tmp_path / "a", *own)
    (loss,) = re.findall(r"\| +7/ +7 batches .* loss +(\S+) \|", out)
    assert 3 < float(loss) < 5  # log(60) is 4.1


def test_what_a_terminal_gets_what_is_partial_and_the_files_written(
    script, output, corpus_dir, tmp_path, monkeypatch
):
    path = tmp_path / "m.pt"
    scored = ["--data", corpus_dir, "--save", path, "--bptt", 10, "--max-batches", 2]
    own = [*scored, "--log-interval", 1]
    logged = ["--logdir", tmp_path, "--epochs", 3, "--when", 1]
    monkeypatch.setattr(Output, "isatty", lambda output: True, raising=False)
    with monkeypatch.context() as patch:
        send(patch, signal.SIGTERM, 3)
        _, out, _ = script("main", *TINY, *own, *logged)
    assert "Args: \n  options: --save-every 300.0\n  files: --data" in out
    assert "\n  network: --emsize 12 --model LSTM --nhid 16 --nlayers 2\n" in out
    assert "\n  text:" not in out  # --tokens-are is not given
    assert re.findall(r"Wrote (\S+m\.pt[^,\n]*)", out) == [f"{path}.e1", str(path)]
    resumed = output("main", "--resume", path, *own, *logged)
    tuned = output("finetune", *own, "--keep", "--epochs", 1)
    assert f"Wrote {path}.before-finetune\n" in tuned
    searched = output("pointer", *scored, "--window", 9, "--search", "--by-word", 2)
    # The third epoch was trained before the stop; finetuning has two batches too.
    assert [text.count("ms/batch") for text in (out, resumed, tuned)] == [6, 0, 2]
    for text, count in ((resumed, 2), (tuned, 3), (searched, 9)):
        lines = [
            line for line in text.splitlines() if re.search("(val|test).* (loss|ppl|log p)", line)
        ]
        lines += re.findall(".* tokens of valid.*", text)
        assert len(lines) == count
        assert all(re.search(r"\| partial: \d+\.\d% of the text$", line) for line in lines)
    epochs = [line for line in metrics.read(tmp_path / metrics.NAME) if line.get("kind") == "epoch"]
    assert [line.get("resumed_at") for line in epochs] == [None, None, 2]


@pytest.mark.parametrize("stage", ["main", "finetune"])
def test_a_resumed_run_with_nothing_to_do_writes_its_file(stage, output, train, flags, tmp_path):
    path, other = tmp_path / "m.pt", tmp_path / "other.pt"
    train(path, "--epochs", 1)
    if stage == "finetune":
        output("finetune", *flags, "--save", path, "--epochs", 1)
    out = output(stage, "--resume", path, "--save", other)
    assert "Epoch 1 was the last: a larger --epochs continues the run" in out
    assert_same_weights(path, other)
    assert checkpoint.load(other).training["epoch"] == 1


def send(monkeypatch, signum, call, name="evaluate"):
    """Send this process `signum` at the start of the n-th `call` of training's function `name`."""
    function, calls = getattr(training, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signum)
        return function(*args, **kwargs)

    monkeypatch.setattr(training, name, interrupted)


def test_interrupted_training_ends_with_the_test_score(output, train, flags, tmp_path, monkeypatch):
    path, whole = tmp_path / "m.pt", tmp_path / "whole.pt"
    train(whole, "--epochs", 4)
    with monkeypatch.context() as patch:
        send(patch, signal.SIGINT, 3)
        out = train(path, "--epochs", 4)
    assert f"Exiting from training early\n--resume {path} continues it\n" in out
    assert len(EPOCH.findall(out)) == 2
    assert len(END.findall(out)) == 1
    # The third epoch was trained but not evaluated; the resumed run evaluates it.
    assert checkpoint.load(path).training["epoch"] == 2
    out = output("main", "--resume", path)
    assert [int(e[0]) for e in EPOCH.findall(out)] == [3, 4]
    assert re.search(
        rf"Resuming {path}: epoch 3, batch \d+ of about \d+, best \S+ after epoch [12]", out
    )
    resumed = re.findall(r"\| epoch (\d) was resumed at batch \d+: its time is that since", out)
    assert resumed == ["3"]
    assert_same_weights(whole, path)

    with monkeypatch.context() as patch:
        send(patch, signal.SIGINT, 3)
        out = output("finetune", *flags, "--save", path, "--epochs", 9)
    assert "Exiting from finetuning early" in out
    assert len(END.findall(out)) == 1


def test_a_second_interrupt_stops_at_once(script, flags, tmp_path, monkeypatch):
    send(monkeypatch, signal.SIGINT, 1)
    send(monkeypatch, signal.SIGINT, 1)
    status, out, _ = script("main", *flags, "--save", tmp_path / "m.pt")
    assert status == 130
    assert "End of training" not in out


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_a_signal_is_obeyed_and_the_state_saved(
    signum, evaluation, script, output, flags, tmp_path, monkeypatch
):
    # Evaluations: after the first epoch, after the second, on the test set.
    path = tmp_path / "m.pt"
    send(monkeypatch, signum, evaluation)
    status, out, err = script("main", *flags, "--save", path, "--epochs", 2)
    assert status == 128 + signum
    assert len(err.splitlines()) == 1
    assert signum.name in err
    assert "End of training" not in out
    assert checkpoint.load(path).training["epoch"] == evaluation - 1
    assert math.isinf(checkpoint.load(path).valid_loss) == (evaluation == 1)
    out = output("main", "--resume", path)
    assert len(EPOCH.findall(out)) == 3 - evaluation
    assert len(END.findall(out)) == 1


def test_finetuning_that_does_not_help_leaves_the_file_and_ends_well(
    output, flags, trained, tmp_path
):
    # The original ends with exit status 1 and without a test score.
    path = tmp_path / "m.pt"
    shutil.copy(trained["LSTM"], path)
    rate = ["--lr", 500, "--clip", 9, "--nonmono", 1]
    out = output("finetune", *flags, *rate, "--save", path, "--epochs", 30)
    assert "no longer falls" in out
    assert len(EPOCH.findall(out)) < 30
    assert len(END.findall(out)) == 1
    # The training state is new, the model is not.
    assert_same_weights(path, trained["LSTM"])
    assert checkpoint.load(path).stage == "main.py"
    # Resuming a finished run trains no further, unless --nonmono differs.
    again = output("finetune", "--resume", path)
    assert "Already done: the validation loss no longer fell" in again
    assert EPOCH.findall(again) == []
    assert END.findall(again) == END.findall(out)
    following = len(EPOCH.findall(out)) + 1
    again = output("finetune", "--resume", path, "--epochs", following, "--nonmono", 30)
    assert [int(e[0]) for e in EPOCH.findall(again)] == [following]


def test_finetune_caps_the_sequence_length(output, flags, trained, tmp_path, monkeypatch):
    caps = []
    draw = training.draw_seq_len

    def record(rng, bptt, cap):
        caps.append(cap)
        return draw(rng, bptt, cap)

    monkeypatch.setattr(training, "draw_seq_len", record)
    path = tmp_path / "m.pt"
    shutil.copy(trained["LSTM"], path)
    for more, cap in (([], 20), (["--max-seq-len", 12], 12)):
        caps.clear()
        output("finetune", *flags, "--save", path, "--epochs", 1, *more)
        assert set(caps) == {cap}


def test_generate(output, trained):
    argv = ["--checkpoint", trained["LSTM"], "--outf", "-", "--words", 60]
    text = output("generate", *argv, "--seed", 3)
    assert len(text.split()) == 60
    assert output("generate", *argv, "--seed", 3) == text
    assert output("generate", *argv, "--seed", 4) != text
    # With one candidate per word the seed has no effect.
    argv += ["--prompt", "w1 w3"]
    greedy = [
        output("generate", *argv, *words)
        for words in (
            ["--top-k", 1, "--seed", 3],
            ["--top-k", 1, "--seed", 4],
            ["--temperature", 0.001],
            ["--temperature", 1e-30],
            ["--temperature", 0],
        )
    ]
    assert len(set(greedy)) == 1
    hot = output("generate", *argv, "--temperature", 50, "--words", 300)
    assert len(set(hot.split())) > 50


@pytest.mark.parametrize("kind", ["words", "characters", "pieces"])
def test_lines_as_text(kind, output, trained, tmp_path):
    loaded = checkpoint.load(trained["LSTM"])
    words = [w for w in loaded.vocabulary["words"] if w != "<eos>"]
    letters = {
        w: {"words": w, "characters": chr(k + 0x4E00), "pieces": f"\u2581{w}"}[kind]
        for k, w in enumerate(words)
    }
    if kind == "pieces":
        letters[words[0]] = words[0]
    loaded.vocabulary["words"] = [letters.get(w, w) for w in loaded.vocabulary["words"]]
    path = tmp_path / "m.pt"
    checkpoint.save(path, loaded)
    start = " ".join(letters[w] for w in words[1:3])
    argv = ["--checkpoint", path, "--no-cuda"]
    printed = [*argv, "--outf", "-", "--prompt", start]
    out = output("generate", *printed, "--lines", 5)
    lines = out.splitlines()
    assert len(lines) == len(set(lines)) == 5
    texts = {"words": start, "characters": start.replace(" ", ""), "pieces": " ".join(words[1:3])}
    assert all(line.startswith(texts[kind]) for line in lines)
    assert ("<eos>" not in out, "\u2581" in out) == (True, False)
    # The likeliest line: each word is the likeliest after those before it.
    likeliest = [*printed, "--lines", 1, "--temperature", 0]
    best = output("generate", *likeliest).removesuffix("\n")
    if kind == "words":
        found = [*best.split(), "<eos>"]
        for n in range(2, len(found)):
            prompt = " ".join(found[:n])
            following = output("generate", *argv, "--prompt", prompt, "--next", 1)
            assert following.split()[1] == found[n]
    # Nothing but the joining differs.
    spaced = output("generate", *likeliest, "--tokens-are", "words")
    pieces = "".join(spaced.split())
    texts = {"words": spaced, "characters": pieces, "pieces": pieces.replace("\u2581", " ")}
    assert best == texts[kind].strip()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--next 2", "--next has no effect without --prompt"),
        ("--next 2 --prompt w1 --top-k 3", "--top-k has no effect with --next"),
        ("--interactive --outf t.txt", "--outf has no effect with --interactive"),
        ("--words 9 --tokens-are characters", "--tokens-are has no effect without --lines"),
        ("--interactive --prompt w1", "not allowed with argument"),
        ("--lines 2 --samples 3", "not allowed with argument"),
    ],
)
def test_flags_without_effect_are_refused(flags, message, script, trained):
    status, out, err = script("generate", "--checkpoint", trained["LSTM"], *flags.split())
    assert (status, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("argv", [["--next", 2, "--prompt", ""], ["--lines", 2]])
def test_no_line_begins_where_the_vocabulary_has_no_end(argv, script, trained, tmp_path):
    model = checkpoint.load(trained["LSTM"])
    words = model.vocabulary["words"]
    words[words.index("<eos>")] = "other"
    checkpoint.save(tmp_path / "m.pt", model)
    status, out, err = script("generate", "--checkpoint", tmp_path / "m.pt", *argv)
    assert (status, out) == (1, "")
    assert "the model knows no <eos> to begin with: give words with --prompt" in err


def test_prompts_from_standard_input(trained):
    command = [sys.executable, ROOT / "generate.py", "--checkpoint", trained["LSTM"], "--no-cuda"]
    command += ["--interactive", "--words", "3"]
    result = subprocess.run(command, input="w1 w3\nzebra\nw9\n", capture_output=True, text=True)
    assert result.returncode == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:-3] for line in lines] == [["w1", "w3"], ["w9"]]
    assert "'zebra'" in result.stderr


@pytest.mark.parametrize(
    ("name", "flags"), [("generate.py", "--next 2 --prompt"), ("score.py", "--tsv - --text")]
)
def test_words_of_the_command_line_are_utf8_in_any_locale(name, flags, trained, tmp_path):
    model = checkpoint.load(trained["LSTM"])
    model.vocabulary["words"] = [w.replace("w1", "gar\xe7on") for w in model.vocabulary["words"]]
    checkpoint.save(tmp_path / "m.pt", model)
    command = [sys.executable, ROOT / name, "--checkpoint", tmp_path / "m.pt", "--no-cuda"]
    command += [*flags.split(), "w3 gar\xe7on".encode()]
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    results = [
        subprocess.run(command, capture_output=True, env=env)
        for env in (plain, {**os.environ, "PYTHONUTF8": "1"})
    ]
    numbers = [re.findall(rb"\d\.\d{5}", result.stdout) for result in results]
    assert numbers[0] == numbers[1] != []
    assert [result.stderr for result in results] == [b"", b""]


def test_next_words_are_those_that_score_gives(output, trained):
    for cell in ORIGINAL_CELLS:
        argv = ["--checkpoint", trained[cell], "--no-cuda"]
        out = output("generate", *argv, "--prompt", "w1 w3", "--next", 61)
        rows = [line.split() for line in out.splitlines()]
        found = {word: float(p) for p, word in rows}
        assert len(found) == 61
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert sum(found.values()) == pytest.approx(1, abs=1e-4)
        for word in ("w9", rows[0][1]):
            text = f"w1 w3 {word}" if word != "<eos>" else "w1 w3"
            out = output("score", *argv, "--text", text, "--tokens", "--json")
            token = json.loads(out.splitlines()[2])
            assert found[word] == pytest.approx(math.exp(token["logprob"]), abs=1e-5)


def test_several_texts_and_a_part_of_the_words(script, output, trained, tmp_path):
    model = checkpoint.load(trained["LSTM"])
    words = model.vocabulary["words"]
    words[words.index("w0")] = "<unk>"
    path = tmp_path / "m.pt"
    checkpoint.save(path, model)
    argv = ["--checkpoint", path, "--outf", "-", "--words", 30, "--no-cuda"]
    status, out, err = script("generate", *argv, "--samples", 3, "--prompt", "zebra w3 gnu zebra")
    assert (status, err) == (0, "not in the vocabulary, read as <unk>: zebra gnu\n")
    texts = out.split("\n\n")
    # The prompt is a part of each text.
    assert [len(text.split()) for text in texts] == [34, 34, 34]
    assert all(text.startswith("zebra w3 gnu zebra ") for text in texts)
    assert len(set(texts)) == 3
    # At such a small probability only the likeliest word is left.
    few = output("generate", *argv, "--top-p", 1e-6, "--prompt", "w3")
    assert few == output("generate", *argv, "--top-k", 1, "--prompt", "w3")
    many = [*argv, "--words", 2000, "--samples", 2]
    assert "<unk>" in output("generate", *many)
    assert "<unk>" not in output("generate", *many, "--no-unk")


def test_one_layer_has_the_embedding_s_size_and_says_so(output, corpus_dir, tmp_path):
    path = tmp_path / "m.pt"
    flags = ["--data", corpus_dir, "--save", path, *TINY, "--epochs", 1, "--max-batches", 1]
    line = "| one layer has the size --emsize: --nhid and --dropouth have no effect\n"
    assert line in output("main", *flags, "--nlayers", 1)
    assert checkpoint.load(path).model["rnns.0.module.weight_hh_l0_raw"].shape == (4 * 12, 12)
    assert line not in output("main", *flags)


def test_the_corpus_s_own_unknown_word(script, output, corpus_dir, tmp_path):
    folder, path = tmp_path / "own", tmp_path / "m.pt"
    shutil.copytree(corpus_dir, folder)
    text = (folder / "train.txt").read_text()
    (folder / "train.txt").write_text(text.replace("w7 ", "<UNK> ") + "rare <UNK>\n")
    own = ["--data", folder, "--save", path, *TINY, "--epochs", 1, "--max-batches", 2]
    argv = ["--checkpoint", path, "--no-cuda"]
    out = output("main", *own)
    assert "| <UNK> is a word like any other here: --unk '<UNK>' makes it the unknown one" in out
    status, _, err = script("generate", *argv, "--no-unk", "--outf", "-")
    assert (status, "no <unk> for --no-unk" in err) == (1, True)
    status, _, err = script("main", *own, "--unk", "<other>")
    assert (status, "no word <other> for --unk" in err) == (1, True)

    out = output("main", *own, "--unk", "<UNK>", "--tokens-are", "joined", "--min-count", 2)
    assert "like any other" not in out
    # A resumed run that finds no better model writes what it was told too.
    other = tmp_path / "other.pt"
    output("main", "--resume", path, "--save", other, "--tokens-are", "words")
    assert checkpoint.load(other).dictionary.tokens_are == "words"
    output("finetune", *own)
    dictionary = checkpoint.load(path).dictionary
    assert (dictionary.unk, dictionary.tokens_are) == ("<UNK>", "joined")
    assert not {"rare", "<unk>"} & set(dictionary.idx2word)
    assert "<UNK>" not in output("generate", *argv, "--no-unk", "--outf", "-", "--words", 2000)
    scores = json.loads(output("score", *argv, "--text", "w1 rare w3", "--json"))
    assert scores["notes"]["outside_the_vocabulary"].endswith("scored as <UNK>")
    assert scores["chars"] == len("w1rarew3\n")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (" ", " ", None),
        ("\n", " <eos>\n", "end in <eos> already"),
        (" ", "", r"(9\d|100)% of the words of valid.txt occur nowhere"),
        ("\nw1 ", "\n\ufeffw1 ", r"U\+FEFF, .* is within"),
    ],
)
def test_texts_that_are_not_what_is_expected(old, new, line, output, corpus_dir, tmp_path):
    for part in ("train.txt", "valid.txt", "test.txt"):
        (tmp_path / part).write_text((corpus_dir / part).read_text().replace(old, new))
    own = ["--data", tmp_path, *TINY, "--epochs", 1, "--max-batches", 1]
    out = output("main", *own, "--save", tmp_path / "m.pt")
    odd = [row for row in out.splitlines() if re.search("already|nowhere|FEFF", row)]
    assert len(odd) == (line is not None)
    assert line is None or re.search(line, odd[0])


def test_the_words_that_reach_a_probability_are_kept():
    import generate

    logprob = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().repeat(4000, 1)
    for top_p, kept in ((0.39, 1), (0.4, 1), (0.41, 2), (0.7001, 3), (1.0, 4)):
        torch.manual_seed(0)
        counts = generate.choose(logprob, 1.0, top_p=top_p).flatten().bincount(minlength=4) / 4000
        expected = torch.tensor([0.4, 0.3, 0.2, 0.1])[:kept]
        torch.testing.assert_close(counts[:kept], expected / expected.sum(), atol=0.03, rtol=0)
        assert counts[kept:].sum() == 0


def test_generate_samples_the_models_distribution(trained):
    # The distribution is over the vocabulary, not over the features of the last layer.
    import generate

    device = torch.device("cpu")
    network = TrainingLoss(*checkpoint.rebuild(checkpoint.load(trained["QRNN"]), device))
    model = network.model
    prompt = torch.tensor([1, 2, 3])
    torch.manual_seed(0)
    counts = torch.zeros(model.encoder.num_embeddings)
    for _ in range(3000):
        counts[next(generate.sample(network, prompt.unsqueeze(1), 0.7))] += 1
    model.eval()
    with torch.no_grad():
        output, _ = model(prompt.unsqueeze(1), model.init_hidden(1))
        logits = output[-1] @ model.decoder.weight.t() + model.decoder.bias
    expected = (logits / 0.7).softmax(dim=0)
    assert (counts / 3000 - expected).abs().max() < 0.04
    assert (counts / 3000 - expected).abs().sum() < 0.3


# A script with its flags, and a pattern of its error message.
BAD_INPUT = r"""
main --data nowhere | nowhere
main --data short | train\.txt is too short for 8 columns
main --data short-valid | valid\.txt is too short
finetune --data other | vocabulary
pointer --data other | vocabulary
finetune --model GRU | --model GRU contradicts
pointer --model QRNN | --model QRNN contradicts
generate --model QRNN | --model QRNN contradicts
finetune --nhid 17 | --nhid 17 contradicts
finetune --save none.pt | no model file none.pt
pointer --save none.pt | no model file none.pt
generate --checkpoint none.pt | no model file none.pt
main --resume none.pt | no model file none.pt
pointer --save truncated.pt | no model file of this toolkit
main --resume other.pt | no model file of this toolkit
main --resume finetuned.pt | no training state of main.py
finetune --resume model.pt | of finetune.py but one
main --resume middle.pt --batch_size 5 | --batch_size 5 contradicts middle.pt.*middle of epoch 1
main --resume middle.pt --data shuffled | goes on with another text
finetune --resume finetuned.pt --keep | --keep comes too late
main --resume model.pt --data other | vocabulary
main --save corpus | cannot write corpus
main --save none/m.pt | cannot write none/m.pt
generate --outf none/t.txt | cannot write none/t.txt
generate --outf corpus | cannot write corpus
generate --prompt "w1 zebra" | 'zebra'
main --cuda | --cuda was given
main --data pipe | cannot use pipe/train\.txt \(it is no plain file\)
main --nhid 99999999 | memory is too small for this: lower --batch_size
""".strip().splitlines()


@pytest.fixture(scope="session")
def middle_of_an_epoch(tmp_path_factory, corpus_dir):
    """A model file of main.py stopped within its first epoch."""
    import main

    path = tmp_path_factory.mktemp("middle") / "m.pt"
    argv = ["--data", str(corpus_dir), *TINY, "--lr", "5", "--epochs", "1", "--save", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        send(patch, signal.SIGTERM, 5, "draw_seq_len")
        with pytest.raises(Stopped):
            main.main(argv)
    return path


def test_keep(script, output, flags, trained, tmp_path):
    path, kept = tmp_path / "m.pt", tmp_path / "m.pt.before-finetune"
    shutil.copy(trained["LSTM"], path)
    first = [*flags, "--epochs", 2, "--save", path]
    for argv in (first, ["--resume", path, "--epochs", 3], first):
        output("finetune", *argv, "--keep")
        assert differing_files(checkpoint.load(kept), checkpoint.load(trained["LSTM"])) == []
    status, _, err = script("main", "--resume", kept, "--epochs", 3)
    assert (status, "name another file" in err) == (1, True)
    output("main", "--resume", kept, "--save", tmp_path / "n.pt", "--epochs", 3)
    assert differing_files(checkpoint.load(kept), checkpoint.load(trained["LSTM"])) == []


@pytest.mark.parametrize("stopped_in", [3, 60])
def test_finetune_resumes_exactly(
    stopped_in, script, output, flags, trained, tmp_path, monkeypatch
):
    whole, path = tmp_path / "whole", tmp_path / "m.pt"
    own = [*flags, "--epochs", 3, "--max-batches", 30, "--partial-shuffle"]
    for file in (whole, path):
        shutil.copy(trained["QRNN"], file)
    output("finetune", *own, "--save", whole)
    send(monkeypatch, signal.SIGTERM, stopped_in, "draw_seq_len")
    status, _, err = script("finetune", *own, "--save", path)
    assert status == 128 + signal.SIGTERM
    assert "--resume" in err
    output("finetune", "--resume", path, "--max-batches", 30)
    assert differing_files(checkpoint.load(whole), checkpoint.load(path)) == []


def test_a_new_run_keeps_the_file_of_another(output, train, flags, tmp_path):
    path, kept = tmp_path / "m.pt", tmp_path / "m.pt.previous"
    train(path, "--epochs", 2)
    assert not kept.exists()
    first = path.read_bytes()
    out = train(path, "--epochs", 2, "--seed", 8)
    assert out.count(f"Keeping the old model file {path} as {kept}") == 1
    assert kept.read_bytes() == first != path.read_bytes()
    # Runs that continue from the file keep no second copy.
    for name, argv in (("main", ["--resume", path]), ("finetune", flags)):
        assert "Keeping" not in output(name, *argv, "--epochs", 3, "--save", path)
    assert kept.read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pt", "m.pt.previous"]


def test_numbers_that_go_wrong_leave_the_last_good_model(script, train, tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    train(path, "--epochs", 1)
    old = path.read_bytes()
    forward, calls = TrainingLoss.forward, []

    def wrong(self, *args):
        calls.append(1)
        loss, raw_loss, hidden = forward(self, *args)
        scale = math.nan if len(calls) > 3 else 1
        return loss * scale, raw_loss * scale, hidden

    monkeypatch.setattr(TrainingLoss, "forward", wrong)
    # The loss is checked at a log line, at a save, and at the end of the epoch.
    for flag, number, good in (
        ("--log-interval", 5, 3),
        ("--save-every", 0, 0),
        ("--max-batches", 20, 3),
    ):
        calls[:] = [1] * (3 - good)
        status, _, err = script("main", "--resume", path, "--epochs", 3, flag, number)
        assert status == 1
        assert re.search(r"became nan by batch \d+ \(last gradient norm nan\) at the rate 5:", err)
        assert path.read_bytes() == old


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("not enough memory: 9")]
)
def test_out_of_memory_names_the_flag(error, script, corpus_dir, trained, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(TrainingStep, "take", fail)
    status, _, err = script("main", "--data", corpus_dir, *TINY, "--save", tmp_path / "m.pt")
    assert status == 1
    assert "lower --batch_size, --bptt or --max-seq-len" in err
    monkeypatch.setattr("pointer.evaluate", fail)
    status, _, err = script("pointer", "--data", corpus_dir, "--save", trained["LSTM"])
    assert status == 1
    assert "lower --bptt" in err
    for name, argv, flag in (("score", ["--text", "w1"], "--bptt"), ("generate", [], "--samples")):
        monkeypatch.setattr(f"{name}.network_of", fail)
        status, _, err = script(name, "--checkpoint", trained["LSTM"], *argv)
        assert (status, f"lower {flag}" in err) == (1, True)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("main", []),
        ("main", ["--when", 1]),
        ("finetune", []),
        ("finetune", ["--keep"]),
        ("generate", ["--outf", "text"]),
    ],
)
def test_a_full_disk(name, more, script, flags, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained["LSTM"], "m.pt")
    (tmp_path / "text").write_text("old")
    argv = [] if name == "generate" else [*flags, "--max-batches", 3, "--epochs", 1]
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    # Room only for the printed output, which pytest also keeps in a file.
    with full_disk(4000):
        status, _, err = script(name, *argv, "--save", "m.pt", *more)
    assert status == 1
    assert len(err.splitlines()) == 1
    assert "cannot write" in err
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("case", [pytest.param("full", marks=linux_only), "broken pipe"])
def test_output_that_nothing_takes(case, trained):
    command = [sys.executable, ROOT / "generate.py", "--checkpoint", trained["LSTM"]]
    command += ["--outf", "-", "--words", "9", "--no-cuda"]
    if case == "full":
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        read_end, output = os.pipe()
        os.close(read_end)
    result = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
    os.close(output)
    if case == "full":
        assert result.returncode == 1
        assert re.fullmatch(
            r"generate\.py: error: standard output takes no more \(.*\n", result.stderr
        )
    else:
        # The reader has what it wanted, as in `| head -1`.
        assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("at", ["start", "first line"])
def test_training_whose_output_nothing_takes(at, corpus_dir, tmp_path):
    model = tmp_path / "m.pt"
    command = [sys.executable, ROOT / "main.py", "--data", corpus_dir, "--save", model, *TINY]
    command += ["--log-interval", "1", "--epochs", "50"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        if at == "first line":
            assert any(line.startswith("| epoch") for line in process.stdout)
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE
    assert error.startswith("main.py: standard output takes no more (Broken pipe)")
    if at == "start":
        # There is nothing to save yet, so no file is written.
        assert not model.exists()
    else:
        assert error.endswith(f"; --resume {model} continues from here\n")
        assert checkpoint.load(model).training["position"]["batches"] > 0


@pytest.mark.parametrize(
    ("command", "world"),
    [
        ("main.py --data LONG", 1),
        ("finetune.py --data CORPUS", 1),
        ("main.py --data CORPUS --save LONG", 1),
        ("main.py --resume LONG", 1),
        ("pointer.py --data CORPUS --save LONG", 1),
        ("generate.py --checkpoint MODEL --outf LONG", 1),
        ("plot.py LONG --out a.png", 1),
        ("score.py --checkpoint LONG --text w1", 1),
        ("score.py --checkpoint MODEL /dev/zero", 1),
        ("main.py --data CORPUS --no-cuda", 2),
    ],
)
def test_what_the_system_refuses_is_one_sentence(
    command, world, corpus_dir, trained, tmp_path, script, monkeypatch
):
    known = {"CORPUS": corpus_dir, "MODEL": trained["LSTM"], "LONG": "x" * 300}
    name, *argv = (known.get(word, word) for word in command.split())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setenv("WORLD_SIZE", str(world))
    status, _, err = script(name.removesuffix(".py"), *argv)
    assert status == 1
    assert re.fullmatch(rf"{name}: error: .+: .+\n", err)
    assert not list(tmp_path.iterdir())


def test_a_closed_standard_input_is_refused_in_a_sentence(trained):
    line = shlex.join([sys.executable, f"{ROOT}/score.py", "--checkpoint", str(trained["LSTM"])])
    result = subprocess.run(f"{line} <&-", shell=True, capture_output=True, text=True)
    assert result.returncode == 1
    assert re.fullmatch(r"score\.py: error: .+: .+\n", result.stderr)


def test_words_that_the_terminal_cannot_show(trained, tmp_path):
    model = checkpoint.load(trained["LSTM"])
    model.vocabulary["words"] = [f"{word}\xe9" for word in model.vocabulary["words"]]
    checkpoint.save(tmp_path / "m.pt", model)
    command = [sys.executable, ROOT / "generate.py", "--checkpoint", tmp_path / "m.pt"]
    command += ["--outf", "-", "--words", "3", "--no-cuda"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, text=True, env=ascii_only)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\\xe9") == 3


@pytest.fixture
def bad_folder(tmp_path, monkeypatch, corpus_dir, trained, middle_of_an_epoch):
    """A folder with a good corpus and model, and bad ones of several kinds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    texts = {name: (corpus_dir / f"{name}.txt").read_text() for name in ("train", "valid", "test")}
    kinds = {
        "corpus": {},
        "short": {"train": "w1 w2\n"},
        "short-valid": {"valid": "w1 w2\n"},
        "other": {"train": texts["train"] + "zebra\n"},
        "shuffled": {"train": texts["train"] + "w1 w2\n"},
    }
    for kind, changes in kinds.items():
        (tmp_path / kind).mkdir()
        for name, text in {**texts, **changes}.items():
            (tmp_path / kind / f"{name}.txt").write_text(text)
    shutil.copytree("corpus", "pipe")
    os.unlink("pipe/train.txt")
    os.mkfifo("pipe/train.txt")
    shutil.copy(trained["LSTM"], "model.pt")
    (tmp_path / "truncated.pt").write_bytes(trained["LSTM"].read_bytes()[:-500])
    torch.save({"state_dict": {}}, "other.pt")
    finetuned = checkpoint.load("model.pt")
    finetuned.stage = finetuned.training["stage"] = "finetune.py"
    finetuned.training.update(best_loss=5.0, done=False)
    checkpoint.save("finetuned.pt", finetuned)
    shutil.copy(middle_of_an_epoch, "middle.pt")
    return tmp_path


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, script, bad_folder):
    command, message = case.split(" | ")
    name, *argv = shlex.split(command)
    if "--data" not in argv:
        argv = ["--data", "corpus", *argv]
    if name in ("main", "finetune") and not {"--resume", "--cuda"} & {*argv}:
        argv = [*TINY, *argv]

    def files():
        every = (p for p in bad_folder.rglob("*") if p.is_file() and p.name != ".corpus-cache")
        return {p: p.read_bytes() for p in every}

    before = files()
    status, _, err = script(name, *argv)
    assert status == 1
    assert re.search(message, err), err
    assert len(err.splitlines()) == 1
    assert "error: " in err
    assert files() == before


@pytest.mark.usefixtures("switch_after_two_epochs")
def test_logdir(output, train, flags, tmp_path):
    path, folder = tmp_path / "m.pt", tmp_path / "logs"
    logged = ["--logdir", folder, "--log-interval", 20]
    out = train(path, *logged, "--epochs", 3)
    header, *lines = metrics.read(folder / "metrics.jsonl")
    assert header["flags"]["lr"] == 5
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1, 2, 3]
    assert [line["epoch"] for line in lines if line["kind"] == "switch"] == [2]
    # The numbers are equal to those in the log lines.
    for kind, name in (("batch", "loss"), ("epoch", "valid_loss"), ("test", "test_loss")):
        shown = re.findall(rf"\| {name.replace('_', ' ')} +([\d.]+)", out)
        written = [f"{line[name]:.2f}" for line in lines if line["kind"] == kind]
        assert written == shown
        assert len(written) >= 1
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert all(line["tokens_per_second"] > 0 for line in lines if line["kind"] == "batch")
    # A resumed run and finetuning append to the same file.
    output("main", "--resume", path, "--epochs", 4, *logged)
    output("finetune", *flags, "--save", path, "--epochs", 1, *logged)
    more = metrics.read(folder / "metrics.jsonl")
    assert sum("command" in line for line in more) == 3
    assert [line["epoch"] for line in more if line.get("kind") == "epoch"] == [1, 2, 3, 4, 1]


def test_init_starts_a_new_run_from_a_model(script, output, corpus_dir, trained, tmp_path):
    path = tmp_path / "m.pt"
    own = ["--data", corpus_dir, "--batch_size", 4, "--bptt", 10, "--save", path, "--no-cuda"]
    own += ["--init", trained["QRNN"]]
    out = output("main", *own, "--epochs", 1, "--lr", 1e-9, "--wdrop", 0.2)
    begun, loaded = checkpoint.load(path), checkpoint.load(trained["QRNN"])
    # At a rate near zero the weights stay those of the --init file.
    for name, weight in loaded.model.items():
        torch.testing.assert_close(begun.model[name], weight, atol=1e-5, rtol=1e-4)
    assert begun.vocabulary["words"] == loaded.vocabulary["words"]
    assert begun.config["wdrop"] == 0.2
    assert [int(e[0]) for e in EPOCH.findall(out)] == [1]
    status, _, err = script("main", *own, "--model", "GRU")
    assert status == 1
    assert "--model GRU contradicts" in err
