"""bench/reproduce.py: a row run in pieces equals the row run in one piece."""

import fcntl
import json
import math
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


def start(corpus, folder, *more):
    return subprocess.Popen(
        command(corpus, folder, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


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


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.mark.slow
def test_stopped_and_killed_it_ends_as_if_it_had_never_been(corpus_dir, tmp_path, row):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert row(corpus_dir, whole)[0] == 0

    # SIGTERM within main.py: the run saves its state and writes its progress.
    process = start(corpus_dir, cut)
    until(process, "end of epoch   1")
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status == 128 + signal.SIGTERM
    assert "Stopped before the end of main.py" in output
    page = (cut / "ptb-lstm-reduced.md").read_text()
    assert "main.py (not finished) | 1 of 3" in page or "(not finished) | 2 of 3" in page
    assert "A run of reduced size" in page
    assert "Not begun: finetune.py, pointer.py" in page

    # Killed within finetune.py, then stopped by a very short --minutes.
    process = start(corpus_dir, cut)
    until(process, "finetune.py")
    until(process, "end of epoch   1")
    process.kill()
    process.stdout.close()
    process.wait()
    with open(cut / "work" / "lock") as lock:
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
    heads = []
    for folder in (cut, whole):
        lines = (folder / "ptb-lstm-reduced.metrics.jsonl").read_text().splitlines()
        heads.append(json.loads(lines[0])["stages"])
        epochs = {(e["stage"], e["epoch"]): e["valid_loss"] for e in map(json.loads, lines[1:])
                  if e["kind"] == "epoch"}  # fmt: skip
        assert {epoch for stage, epoch in epochs if stage == "main"} == {1, 2, 3}
        heads[-1]["curve"] = epochs
    assert all(heads[0][name]["done"] for name in ("main", "finetune", "pointer"))
    for name in ("main", "finetune", "pointer"):
        for kind in ("valid", "test"):
            assert heads[0][name][kind] == heads[1][name][kind] > 1
    assert heads[0]["curve"] == heads[1]["curve"]
    page = (cut / "ptb-lstm-reduced.md").read_text()
    assert str(tmp_path) not in page
    assert "Another text than the row's" in page
    assert "| 61.2 |" in page
    assert "56.5" in page

    # A finished row runs nothing more, and refuses other flags.
    status, output = row(corpus_dir, cut)
    assert (status, output.count("$")) == (0, 0)
    with pytest.raises(ToolkitError, match="was begun with the flags"):
        reproduce.main([*command(corpus_dir, cut)[2:], "--nhid", "20"])


def test_another_text_is_not_the_rows(corpus_dir, tmp_path):
    whole = command(corpus_dir, tmp_path)
    result = subprocess.run(whole[: whole.index("--")], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert re.fullmatch("reproduce.py: error: .* is not the row's corpus .*\n", result.stderr)
    assert not list(tmp_path.glob("*.md"))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("--nhid 3 --max-batches 9 --lr 5", ["--max-batches", "9"]),
        ("--max-batches=9", ["--max-batches", "9"]),
        ("--max-b 9 --nhid 3", ["--max-batches", "9"]),
        ("--max-bat=9", ["--max-batches", "9"]),
        ("--max-seq-len 9 --nhid 3", []),
    ],
)
def test_what_every_stage_is_cut_short_by(extra, expected):
    assert reproduce.cut_short(extra.split()) == expected


def test_an_epoch_that_was_run_again_counts_once(tmp_path):
    folder = tmp_path / "main"
    folder.mkdir()
    lines = [{"kind": "epoch", "epoch": 1, "valid_loss": 5.0, "time": 1.0, "step": 1}]
    lines += [{**lines[0], "epoch": 2, "valid_loss": loss} for loss in (3.0, 4.0)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    work = reproduce.Work(tmp_path)
    work.stage("main")
    main = reproduce.figures(work, "ptb-lstm")["main"]
    assert main["epochs"] == 2
    assert main["valid"] == pytest.approx(math.exp(4.0))


def test_two_at_once_are_refused(tmp_path):
    first = reproduce.Work(tmp_path / "work")
    with pytest.raises(ToolkitError, match="another run is at work"):
        reproduce.Work(tmp_path / "work")
    first.lock.close()
    reproduce.Work(tmp_path / "work")


def test_a_stage_that_fails_is_said_in_a_line(corpus_dir, tmp_path, row):
    with pytest.raises(ToolkitError, match=r"main.py ended with exit status 2 .*--dropout"):
        reproduce.main([*command(corpus_dir, tmp_path)[2:], "--dropout", "2"])


def test_the_trial_on_the_page_writes_into_a_folder_that_git_ignores():
    page = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    (words,) = re.findall(r"^python bench/reproduce\.py (.*) -- ", page, re.MULTILINE)
    args = reproduce.build_parser().parse_args(words.split())
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {f"{args.work}/", f"{args.results}/"} <= set(ignored)
