"""plot.py: reading logs and metrics.jsonl, drawing, and bad input."""

import math
import os
import re
import sys

import pytest

import plot
from run import metrics
from run.log_lines import end_line, epoch_line

LOSSES = [6.0, 5.0, 5.2, 4.8]


def log_of(losses, switch=2, first=1):
    lines = ["Args: {}"]
    for epoch, loss in enumerate(losses, start=first):
        lines += ["-" * 89, epoch_line(epoch, 36.0, loss), "-" * 89]
        if epoch == switch:
            lines.append("Switching to averaged SGD")
    return "\n".join([*lines, end_line(5.0)]) + "\n"


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    folder = tmp_path / "a$b_run"
    with metrics.MetricsWriter(folder, command=["main.py"], flags={}, device="cpu") as writer:
        for epoch, loss in enumerate(LOSSES, start=1):
            writer.write("batch", step=epoch, epoch=epoch, batch=1, loss=9.0)
            writer.write("epoch", step=epoch, epoch=epoch, time=36.0, valid_loss=loss)
            if epoch == 2:
                writer.write("switch", step=epoch, epoch=epoch)
        writer.write("test", step=4, test_loss=5.0)
    return folder


def test_both_kinds_of_input_give_one_curve(run_dir, tmp_path):
    (tmp_path / "x.log").write_text(log_of(LOSSES))
    for run in (tmp_path / "x.log", run_dir, run_dir / "metrics.jsonl"):
        curve = plot.read_run(str(run))
        assert curve.name == ("x" if run.suffix == ".log" else "a$b_run")
        assert list(curve.ppl) == [1, 2, 3, 4]
        assert list(curve.ppl.values()) == pytest.approx([math.exp(x) for x in LOSSES], abs=0.006)
        assert curve.hours() == pytest.approx([0.01, 0.02, 0.03, 0.04])
        assert curve.switch == 2


def test_a_resumed_log_and_numbers_that_are_not_finite():
    text = log_of([6.0, 5.0, 4.0], None) + log_of([5.5, math.nan, 999.0], 3, first=2)
    curve = plot.from_log(text, "x")
    assert list(curve.ppl) == [1, 2, 3, 4]
    assert curve.ppl[2] == pytest.approx(math.exp(5.5), abs=0.006)
    assert curve.ppl[3] == curve.ppl[4] == math.inf
    assert curve.switch == 3
    assert not plot.from_log("| end of epoch 1 | time: 1.2.3s | valid loss x", "x").ppl


def test_finetuning_continues_the_curve_in_one_log_or_two(tmp_path, script, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    training, finetuning = log_of([4.0, 3.9], 1), log_of([3.7, 3.6, 3.8], None)
    finetuning = "| start of finetuning | valid loss  3.90\n" + finetuning
    (tmp_path / "both.log").write_text(training + finetuning)
    (tmp_path / "main.log").write_text(training)
    (tmp_path / "tuned.log").write_text(finetuning)
    for stage, losses, flags in (
        ("main", [4.0, 3.9], {}), ("finetune", [3.7], {}), ("finetune", [3.6, 3.8], {"resume": "m"})
    ):  # fmt: skip
        command = [f"{stage}.py"]
        with metrics.MetricsWriter(
            tmp_path / "logs", command=command, flags={"resume": "", **flags}, device="cpu"
        ) as writer:
            for epoch, loss in enumerate(losses, start=2 if flags else 1):
                writer.write("epoch", step=epoch, epoch=epoch, time=36.0, valid_loss=loss)
    for runs in (["both.log"], ["main.log", "tuned.log"], ["logs"]):
        status, out, err = script("plot", *runs)
        assert (status, err) == (0, "")
        assert ": 5 epochs, 3.0 minutes | best valid ppl 36.60 after epoch 4" in out
    status, out, _ = script("plot", *["main.log", "tuned.log"] * 2, "--names", "a", "b")
    assert re.findall(r"\| (.*): 5 epochs", out) == ["a", "b"]
    _, out, _ = script("plot", "tuned.log", "main.log")
    assert re.findall(r"\| (.*): (.) epochs", out) == [("tuned", "3"), ("main", "2")]


def test_pictures(run_dir, tmp_path, script):
    pytest.importorskip("matplotlib")
    log = tmp_path / "_x_$y.log"
    log.write_text(log_of([*[9.0 - 0.1 * i for i in range(30)], math.inf], switch=12))
    for kind, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        out = tmp_path / f"curves.{kind}"
        status, out_text, err = script("plot", run_dir, log, "--out", out)
        assert (status, err) == (0, "")
        assert out.read_bytes().startswith(magic)
    assert "| a$b_run: 4 epochs, 2.4 minutes | best valid ppl 121.51 after epoch 4 |" in out_text
    assert "averaging after epoch 12" in out_text
    status, out_text, _ = script("plot", log, "--names", "mine", "--max-ppl", 900, "--out", out)
    assert status == 0
    assert "| mine: 31 epochs" in out_text


BAD_INPUT = {
    "no file": (["none.log"], 1, r"cannot use none\.log"),
    "no metrics": (["."], 1, r"cannot use metrics\.jsonl"),
    "nested JSON": (["nested.jsonl"], 1, r"line 1 of nested\.jsonl is not a JSON object"),
    "a large integer": (["large.jsonl"], 1, r"line 1 of large\.jsonl is not a JSON object"),
    "a device": (["/dev/zero"], 1, r"cannot use /dev/zero \(it is no plain file\)"),
    "a pipe": (["pipe.log"], 1, r"cannot use pipe\.log \(it is no plain file\)"),
    "no epochs": (["empty.log"], 1, r"empty\.log has no line of a finished epoch"),
    "other JSON": (["bad.jsonl"], 1, r"line 1 of bad\.jsonl lacks the numbers"),
    "no JSON": (["text.jsonl"], 1, r"line 1 of text\.jsonl is not a JSON object"),
    "names": (["x.log", "--names", "a", "b"], 2, "--names has 2 names for 1 runs"),
    "extension": (["x.log", "--out", "x.txt"], 1, r"cannot draw x\.txt"),
    "no folder": (["x.log", "--out", "none/x.png"], 1, "cannot write none/x.png"),
    "no run": ([], 2, "RUN"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, script, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.log").write_text("nothing\n")
    (tmp_path / "x.log").write_text(log_of(LOSSES))
    (tmp_path / "bad.jsonl").write_text('{"kind": "epoch"}\n')
    (tmp_path / "text.jsonl").write_text("text\n")
    (tmp_path / "nested.jsonl").write_text("[" * 100_000 + "\n")
    (tmp_path / "large.jsonl").write_text('{"epoch": ' + "9" * 5000 + "}\n")
    os.mkfifo(tmp_path / "pipe.log")
    argv, expected, message = BAD_INPUT[case]
    status, out, err = script("plot", *argv)
    assert (status, out) == (expected, "")
    assert re.search(message, err), err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("*.png"))


def test_without_matplotlib(script, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "x.log").write_text(log_of(LOSSES))
    status, out, err = script("plot", tmp_path / "x.log", "--out", tmp_path / "x.png")
    assert (status, out) == (1, "")
    assert err.endswith(
        "error: pictures need matplotlib, which is not installed: pip install matplotlib\n"
    )
