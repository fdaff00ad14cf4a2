"""Killed runs and runs of several processes: whole programs, started as a user would."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, linux_only

import checkpoint
from run import ranks as run_ranks

ALIKE = (
    "--emsize 12 --nhid 16 --nlayers 2 --batch_size 5 --bptt 10 --no-cuda --seed 7 --lr 5 "
    "--dropout 0 --dropouth 0 --dropouti 0 --dropoute 0 --wdrop 0 --max-batches 20"
).split()


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["LSTM", "QRNN"])
def test_killed_at_random_moments(cell, corpus_dir, tmp_path):
    command = [sys.executable, ROOT / "tests" / "killed.py", corpus_dir, tmp_path, cell, "25"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert "25 kills" in result.stdout


def torchrun(ranks, script, *argv, where=("--standalone",)):
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, where)]
    command += ["--nproc-per-node", str(ranks), str(ROOT / script), *map(str, argv)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ranks(*words):
    """Start scripts as two ranks, one after another; "+" is between them. Sooner than torchrun."""
    command = [sys.executable, "tests/ranks.py", "2", *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process, seconds=300):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def assert_close(path, other, atol=1e-5):
    first, second = checkpoint.load(path), checkpoint.load(other)
    torch.testing.assert_close(
        torch.tensor(first.training["valid_losses"]),
        torch.tensor(second.training["valid_losses"]),
        atol=atol,
        rtol=0,
    )
    for name, tensor in first.training["model"].items():
        torch.testing.assert_close(tensor, second.training["model"][name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["LSTM", "QRNN"])
def test_two_ranks_are_one(cell, corpus_dir, tmp_path, script):
    # Five columns, so the two ranks have uneven shares.
    flags = ["--data", corpus_dir, *ALIKE, "--model", cell, "--partial-shuffle"]
    one, two = tmp_path / "one", tmp_path / "two"
    stages = {"main": ["--epochs", 3, "--log-interval", 5], "finetune": ["--epochs", 2]}
    alone = ""
    for stage, more in stages.items():
        status, out, err = script(stage, *flags, *more, "--save", one)
        assert (status, err) == (0, "")
        alone += out
    words = [[f"{stage}.py", *flags, *more, "--save", two] for stage, more in stages.items()]
    status, out, err = finish(ranks(*words[0], "+", *words[1]))
    assert status == 0, err
    assert_close(one, two)

    def losses(text):
        return [float(x) for x in re.findall(r"loss +(\d+\.\d\d)", text)]

    # Only one rank logs, with the loss over both ranks' columns.
    assert losses(out) == pytest.approx(losses(alone), abs=0.011)
    assert [out.count(line) for line in ("From ", "Args:", "| start of finetuning")] == [1, 2, 1]


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def on_two_machines(*argv):
    """Start two torchrun agents, as on two machines, that connect through the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ("--nnodes", 2, "--master-addr", "127.0.0.1", "--master-port", port, "--node-rank")
    return [torchrun(1, "main.py", *argv, where=(*meeting, machine)) for machine in (0, 1)]


@linux_only
@pytest.mark.slow
def test_two_machines_are_one(corpus_dir, tmp_path, script):
    flags = ["--data", corpus_dir, *ALIKE, "--model", "LSTM"]
    one, two = tmp_path / "one", tmp_path / "shared" / "two"
    two.parent.mkdir()
    agents = on_two_machines(*flags, "--epochs", 1000, "--save-every", 0, "--save", two)
    until(lambda: two.exists() and checkpoint.load(two).training["epoch"] > 1)
    # The run ends when one machine dies, and one machine alone can resume it.
    for pid in (*children(agents[1].pid), agents[1].pid):
        os.kill(pid, signal.SIGKILL)
    finish(agents[1])
    status, _, err = finish(agents[0], seconds=90)
    assert status != 0
    assert "lost touch with another rank" in err
    epochs = checkpoint.load(two).training["epoch"] + 1
    resume = ["--resume", two, "--max-batches", 20, "--epochs", epochs]
    assert script("main", *resume)[0] == 0
    assert script("main", *flags, "--epochs", epochs, "--save", one)[0] == 0
    assert_close(one, two, atol=1e-3)
    assert [path.name for path in two.parent.iterdir()] == ["two"]


@linux_only
@pytest.mark.slow
def test_two_ranks_stopped_or_dead_go_on_exactly(corpus_dir, tmp_path):
    # With dropout: each rank's masks continue from its own random state.
    flags = ["--data", corpus_dir, *ALIKE, "--model", "QRNN", "--dropouti", 0.3, "--wdrop", 0.2]
    path, whole = tmp_path / "m.pt", tmp_path / "whole"
    process = torchrun(2, "main.py", *flags, "--epochs", 1000, "--save-every", 0, "--save", path)
    until(lambda: path.exists() and checkpoint.load(path).training["epoch"] > 0)
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process, seconds=60)
    assert status != 0
    assert "stopped by SIGTERM; --resume" in err
    stopped = checkpoint.load(path).training["epoch"]

    resume = ["main.py", "--resume", path, "--max-batches", 20]
    process = ranks(*resume, "--epochs", 1000, "--save-every", 0)
    until(lambda: checkpoint.load(path).training["epoch"] > stopped)
    until(lambda: checkpoint.load(path).training["position"])
    os.kill(children(process.pid)[1], signal.SIGKILL)
    status, _, err = finish(process, seconds=60)
    assert status == 1
    assert "lost touch with another rank" in err

    epochs = ["--epochs", checkpoint.load(path).training["epoch"] + 1]
    for process in (
        torchrun(2, *resume, *epochs),
        ranks("main.py", *flags, *epochs, "--save", whole),
    ):
        status, _, err = finish(process)
        assert status == 0, err
    for name, tensor in checkpoint.load(whole).training["model"].items():
        assert torch.equal(tensor, checkpoint.load(path).training["model"][name]), name


def test_the_second_of_two_runs_with_one_file_stops(corpus_dir, tmp_path, script):
    path = tmp_path / "m.pt"
    flags = ["--data", corpus_dir, *ALIKE, "--save", path]
    assert script("main", *flags, "--epochs", 1)[0] == 0
    command = [sys.executable, ROOT / "main.py", "--resume", path, "--epochs", "9999"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "Faster forms" in first.stdout.readline()
    seconds = [("main", *flags), ("main", "--resume", path), ("finetune", *flags)]
    for second in seconds:
        status, out, err = script(*second)
        assert (status, out.count("Args")) == (1, 0)
        assert re.search(
            rf"another run writes .*m\.pt now \(process {first.pid} of .*another --save", err
        )
    # The file is free again after the first run's end, even by a kill.
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    for second in seconds:
        assert script(*second, "--epochs", 2)[0] == 0
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_rank_without_others_says_what_it_waits_for(tmp_path, script, monkeypatch):
    monkeypatch.setattr(run_ranks, "_MINUTES", 0.02)
    rank = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}

    def meet_at(port):
        for name, value in {**rank, "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        return script("main", "--no-cuda", "--save", tmp_path / "m.pt")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    status, out, err = meet_at(port)
    assert status == 1
    assert f"Rank 0 of 2 waits at 127.0.0.1:{port} for the others" in out
    assert re.fullmatch(r".*error: rank 0 of 2 does not meet the others .*: start .*\n", err)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, err = meet_at(taken.getsockname()[1])
    assert status == 1
    assert "address already in use" in err
    assert len(err.splitlines()) == 1


def test_two_runs_may_build_the_cache_at_once(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_bytes((corpus_dir / f"{name}.txt").read_bytes() * 20)
    code = "import data, sys; c = data.Corpus(sys.argv[1]); print(len(c.train), len(c.dictionary))"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, folder], cwd=ROOT, text=True, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert outputs[0] == outputs[1]
    assert sorted(p.name for p in folder.iterdir()) == [
        ".corpus-cache", "test.txt", "train.txt", "valid.txt",
    ]  # fmt: skip
    assert not (tmp_path / "user").exists()
