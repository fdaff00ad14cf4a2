"""plot.py: reading logs and metrics.jsonl, drawing, and bad input."""

import math
import os
import re
import sys

import pytest
from conftest import ROOT

import plot
from run import metrics
from run.log_lines import batch_line, end_line, epoch_line

LOSSES = [6.0, math.nan, 999.0, 4.8]


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
        (curve,) = plot.read_curves([str(run)])
        assert curve.name == ("x" if run.suffix == ".log" else "a$b_run")
        assert list(curve.ppl) == [1, 2, 3, 4]
        expected = [math.exp(6.0), math.inf, math.inf, math.exp(4.8)]
        assert list(curve.ppl.values()) == pytest.approx(expected, abs=0.006)
        assert curve.hours() == pytest.approx([0.01, 0.02, 0.03, 0.04])
        assert curve.switch == 2


def test_of_two_runs_in_one_folder_the_last_is_drawn(run_dir):
    flags = {"max_batches": 9}
    with metrics.MetricsWriter(run_dir, command=["main.py"], flags=flags, device="cpu") as writer:
        writer.write("epoch", step=1, epoch=1, time=36.0, valid_loss=7.0)
    (curve,) = plot.read_curves([str(run_dir)])
    assert curve.ppl == {1: pytest.approx(math.exp(7.0))}
    assert (curve.switch, curve.batches, curve.partial) == (None, {}, True)


def test_lines_of_other_kinds_and_a_run_without_an_epoch_change_nothing(run_dir):
    (expected,) = plot.read_curves([str(run_dir)])
    with metrics.MetricsWriter(run_dir, command=["main.py"], flags={}, device="cpu") as writer:
        writer.write("batch", step=1, epoch=1, batch=1, loss=9.0)
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    own = [f'{{"kind": "{kind}"}}' for kind in ("new", "partial", "finetuning", "resuming", "x")]
    path.write_text("\n".join([*lines[:4], *own, *lines[4:]]))
    (curve,) = plot.read_curves([str(run_dir)])
    assert (curve.ppl, curve.switch, curve.partial) == (expected.ppl, 2, False)


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


def test_a_resumed_run_in_one_log_or_several(tmp_path):
    """Its epochs are joined, and the time before the stop, which no file has, is an estimate."""
    first, tuned = log_of([4.0, 3.9, 3.8], 2), log_of([3.7, 3.6], None)
    again = log_of([3.75, 3.5], None, first=3).replace("time: 36.00s", "time: 5.00s", 1)
    again = again.split(end_line(5.0))[0].replace("-" * 89, "", 1)
    middle = again.index("| end of epoch   4")
    resumed = "Resuming m.pt: epoch 3, batch 7 of about 9, best 3.90 after epoch 2\n"
    resumed += f"{again[:middle]}| epoch 3 was resumed at batch 7: its time is that since then\n"
    resumed += again[middle:]
    tuned = "| start of finetuning | valid loss  3.50\n" + tuned
    later = "Resuming m.pt: epoch 3, batch 0 of about 9\n" + log_of([3.55], None, first=3)
    parts = {"a.log": first, "b.log": resumed, "c.log": tuned, "d.log": later}
    for name, text in parts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "all.log").write_text("".join(parts.values()))
    for runs in (parts, ["all.log"]):
        (curve,) = plot.read_curves([str(tmp_path / name) for name in runs])
        losses = [4.0, 3.9, 3.75, 3.5, 3.7, 3.6, 3.55]
        assert list(curve.ppl) == [1, 2, 3, 4, 5, 6, 7]
        assert list(curve.ppl.values()) == pytest.approx([math.exp(x) for x in losses], abs=0.006)
        assert (curve.resumed, curve.switch) == ({3}, 2)
        assert curve.hours()[-1] == pytest.approx(0.07)
        assert sum(curve.seconds.values()) == 6 * 36 + 5
    # A run of its own is no continuation, and nothing is joined to nothing.
    names = [str(tmp_path / name) for name in ("b.log", "a.log")]
    assert [len(curve.ppl) for curve in plot.read_curves(names)] == [2, 3]


def batches_of(epoch, *losses):
    lines = [batch_line(epoch, 9 * i, 30, 30.0, 5.0, x) for i, x in enumerate(losses, start=1)]
    return "\n".join([*lines, ""])


def test_training_and_what_is_partial(run_dir, tmp_path, script):
    pytest.importorskip("matplotlib")
    log, out = tmp_path / "x.log", tmp_path / "x.svg"
    text = log_of([4.0], None).replace("-" * 89, batches_of(1, 5.0, 4.5), 1)
    log.write_text(text + batches_of(2, 4.25) + log_of([3.9, 3.8], None, first=2))
    curves = plot.read_curves([str(log), str(run_dir)])
    expected = [[math.exp(4.75), math.exp(4.25), math.nan], [math.exp(9.0)] * 4]
    for curve, means in zip(curves, expected, strict=True):
        assert curve.training() == pytest.approx(means, abs=0.01, nan_ok=True)
    pictures = []
    for flags in ([], ["--train"]):
        status, said, err = script("plot", log, run_dir, "--out", out, *flags)
        assert (status, err) == (0, "")
        assert said.startswith(f"Wrote {out}\n| x: ")
        assert "partial" not in said
        pictures.append(out.read_text())
    assert ["training, mean of an epoch" in picture for picture in pictures] == [False, True]
    ends = re.sub("(end of epoch .*)", r"\1 | partial: 0.3% of the text", log_of([4.0], None))
    log.write_text(ends)
    status, said, err = script("plot", log, "--out", out, "--train")
    assert (status, said) == (1, "")
    assert "x has no log line within an epoch for --train" in err
    _, said, _ = script("plot", log, "--out", out)
    assert "after epoch 1 | partial validation\n" in said
    assert "(best 54.60, partial)" in out.read_text()


def test_the_stages_that_reproduce_puts_into_one_file():
    (curve,) = plot.read_curves([str(ROOT / "results" / "ptb-qrnn-reduced.metrics.jsonl")])
    assert list(curve.ppl) == [1, 2, 3, 4]
    assert curve.ppl[2] == pytest.approx(508.93, abs=0.01)
    assert curve.ppl[4] == pytest.approx(410.63, abs=0.01)


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
    "other JSON": (["other.jsonl"], 1, r"line 1 of other\.jsonl lacks the numbers"),
    "names": (["x.log", "--names", "a", "b"], 2, "--names has 2 names for 1 runs"),
    "extension": (["x.log", "--out", "x.txt"], 1, r"cannot draw x\.txt"),
    "no folder": (["x.log", "--out", "none/x.png"], 1, "cannot write none/x.png"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, script, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.log").write_text("nothing\n")
    (tmp_path / "x.log").write_text(log_of(LOSSES))
    (tmp_path / "nested.jsonl").write_text("[" * 100_000 + "\n")
    (tmp_path / "large.jsonl").write_text('{"epoch": ' + "9" * 5000 + "}\n")
    os.mkfifo(tmp_path / "pipe.log")
    (tmp_path / "other.jsonl").write_text('{"kind": "epoch"}\n')
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
