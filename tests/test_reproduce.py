"""bench/reproduce.py: a row run in pieces equals the row run in one piece."""

import fcntl
import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

import checkpoint
from bench import reproduce
from utils import ToolkitError

REDUCED = [*TINY, "--lr", "5", "--epochs", "3", "--save-every", "0", "--max-batches", "9"]


def command(corpus, folder, *more):
    script = str(ROOT / "bench" / "reproduce.py")
    where = ["--data", str(corpus), "--work", str(folder / "work"), "--results", str(folder)]
    return [sys.executable, script, "ptb-lstm", "--no-cuda", *where, *more, "--", *REDUCED]


def start(corpus, folder):
    argv = command(corpus, folder)
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def row(capfd):
    """Run the row in this process; returns its exit status and output."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(corpus, folder, *more):
        status = reproduce.main(command(corpus, folder, *more)[2:])
        return status, capfd.readouterr().out

    yield run
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def until(process, text):
    """Read the process's output up to a line with `text`, and return it."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no {text!r} in\n{''.join(lines)}")


@pytest.mark.slow
def test_stopped_and_killed_it_ends_as_if_it_had_never_been(corpus_dir, tmp_path, row):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert row(corpus_dir, whole)[0] == 0

    # SIGTERM within main.py: the run saves its state and writes its progress.
    process = start(corpus_dir, cut)
    until(process, "end of epoch   1")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Stopped before the end of main.py" in output
    page = (cut / "ptb-lstm-reduced.md").read_text()
    assert "main.py (not finished) | 1 of 3" in page or "(not finished) | 2 of 3" in page
    assert "A run of reduced size" in page

    # Killed within finetune.py, then stopped by a very short --minutes.
    process = start(corpus_dir, cut)
    until(process, "finetune.py")
    until(process, "end of epoch   1")
    process.kill()
    process.stdout.close()
    process.wait()
    with open(cut / "work" / ".finetune.pt.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # wait for the end of the orphaned stage
    status, output = row(corpus_dir, cut, "--minutes", "0.001")
    assert status == 0
    assert "Stopped before the end of finetune.py" in output
    status, output = row(corpus_dir, cut)
    assert status == 0
    assert "All stages are done" in output

    for name in ("main", "finetune"):
        ours, theirs = (checkpoint.load(f / "work" / f"{name}.pt") for f in (cut, whole))
        assert (ours.epoch, ours.valid_loss) == (theirs.epoch, theirs.valid_loss)
        for key, tensor in ours.model.items():
            assert torch.equal(tensor, theirs.model[key]), key
    results = []
    for folder in (cut, whole):
        text = (folder / "ptb-lstm-reduced.metrics.jsonl").read_text()
        head, *lines = map(json.loads, text.splitlines())
        curve = {(e["stage"], e["epoch"]): e["valid_loss"] for e in lines if e["kind"] == "epoch"}
        assert {epoch for stage, epoch in curve if stage == "main"} == {1, 2, 3}
        assert head["stages"].keys() == {"main", "finetune", "pointer"}
        assert all(stage["done"] for stage in head["stages"].values())
        results.append([curve, *((s["valid"], s["test"]) for s in head["stages"].values())])
    assert results[0] == results[1]
    page = (cut / "ptb-lstm-reduced.md").read_text()
    assert str(tmp_path) not in page
    assert "**Another text than the row's.**" in page
    for valid, test in results[0][1:]:
        assert f"| {valid:.2f} |" in page
        assert f"| {test:.2f} |" in page
    assert "| 61.2 |" in page
    assert "56.5" in page

    # A finished row runs nothing more, and refuses other flags.
    status, output = row(corpus_dir, cut)
    assert (status, output.count("$")) == (0, 0)
    with pytest.raises(ToolkitError, match="was begun with the flags"):
        reproduce.main([*command(corpus_dir, cut)[2:], "--nhid", "20"])
    # Without the model's file its loss is that in the log.
    work = reproduce.Work(cut / "work")
    before = reproduce.figures(work, "ptb-lstm")["main"]["valid"]
    (cut / "work" / "main.pt").unlink()
    assert reproduce.figures(work, "ptb-lstm")["main"]["valid"] == pytest.approx(before)


def test_another_text_is_not_the_rows(corpus_dir, tmp_path):
    whole = command(corpus_dir, tmp_path)
    result = subprocess.run(whole[: whole.index("--")], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert re.fullmatch("reproduce.py: error: .* is not the row's corpus .*\n", result.stderr)
    assert not list(tmp_path.glob("*.md"))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("--nhid 3 --max-b 9 --lr 5", ["--max-batches", "9"]),
        ("--max_batches=9", ["--max-batches", "9"]),
        ("--max-seq-len 9", []),
    ],
)
def test_what_every_stage_is_cut_short_by(extra, expected):
    assert reproduce.cut_short(extra.split()) == expected


def test_a_stage_that_fails_is_said_in_a_line(corpus_dir, tmp_path, row):
    with pytest.raises(ToolkitError, match=r"main.py ended with exit status 2 .*--dropout"):
        reproduce.main([*command(corpus_dir, tmp_path)[2:], "--dropout", "2"])


def test_the_trial_on_the_page_writes_into_a_folder_that_git_ignores():
    page = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    (words,) = re.findall(r"^python bench/reproduce\.py (.*) -- ", page, re.MULTILINE)
    args = reproduce.build_parser().parse_args(words.split())
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {f"{args.work}/", f"{args.results}/"} <= set(ignored)
