"""run/metrics.py: the format of metrics.jsonl, TensorBoard events, bad folders and files."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import full_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from run import metrics
from utils import ToolkitError

MODULES = ("tensorboard", "torch.utils.tensorboard")


@pytest.fixture
def no_tensorboard(monkeypatch):
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)  # importing it now fails


def writer(folder, **flags):
    return metrics.MetricsWriter(
        folder, command=["main.py", "--lr", "3"], flags=flags, device="cpu"
    )


@pytest.mark.usefixtures("no_tensorboard")
def test_lines(tmp_path, capsys):
    with writer(tmp_path / "a" / "b", lr=3.0, when=[-1], clip=math.inf) as metrics_writer:
        assert "package tensorboard, which is not installed" in capsys.readouterr().out
        metrics_writer.write("batch", step=200, epoch=1, batch=200, lr=3.0, loss=math.log(8))
        # Lines are in the file at once, so that a reader can follow the run.
        path = tmp_path / "a" / "b" / metrics.NAME
        assert len(path.read_text().splitlines()) == 2
        metrics_writer.write("epoch", step=663, epoch=1, time=1.5, valid_loss=0.0)
        metrics_writer.write("switch", step=663, epoch=1)
        metrics_writer.write("test", step=663, test_loss=math.nan)
    header, batch, epoch, switch, test = map(json.loads, path.read_text().splitlines())
    assert header.keys() == {"command", "flags", "versions", "device", "commit"}
    assert header["command"] == ["main.py", "--lr", "3"]
    assert header["flags"] == {"lr": 3.0, "when": [-1], "clip": None}
    assert header["versions"]["torch"] == torch.__version__
    assert batch["kind"] == "batch"
    assert batch["ppl"] == pytest.approx(8)
    assert batch["bpc"] == pytest.approx(3)
    scored = {"valid_loss": 0.0, "valid_ppl": 1.0, "valid_bpc": 0.0}
    assert epoch == {"kind": "epoch", "step": 663, "epoch": 1, "time": 1.5, **scored}
    assert switch == {"kind": "switch", "step": 663, "epoch": 1}
    scored = dict.fromkeys(("test_loss", "test_ppl", "test_bpc"))
    assert test == {"kind": "test", "step": 663, **scored}
    assert metrics.read(path) == [header, batch, epoch, switch, test]


@pytest.mark.usefixtures("no_tensorboard")
@pytest.mark.parametrize("command", ["caf\udce9", "a\x85b\u2028"])
def test_a_line_that_was_cut_off_does_not_spoil_what_a_later_run_adds(command, tmp_path):
    path = tmp_path / metrics.NAME
    path.write_text('{"command": ["ma')
    for _ in range(2):
        with metrics.MetricsWriter(tmp_path, command=[command], flags={}, device="cpu") as log:
            log.write("batch", step=1, loss=2.0)
        with open(path, "a", encoding="utf-8") as file:
            file.write('{"kind": "ba')
    lines = metrics.read(path)
    assert [line.get("kind") for line in lines] == [None, "batch", None, "batch"]
    assert [line["command"] for line in lines[::2]] == [[command]] * 2


@pytest.mark.usefixtures("no_tensorboard")
def test_a_disk_that_fills_up_is_reported_once_and_the_run_continues(tmp_path, capsys):
    with writer(tmp_path) as log:
        capsys.readouterr()
        with full_disk((tmp_path / metrics.NAME).stat().st_size + 100):
            for step in range(3):
                log.write("batch", step=step, loss=1.0)
        assert capsys.readouterr().out == (
            f"Cannot write to {tmp_path} (File too large): going on without it\n"
        )
    assert len(metrics.read(tmp_path / metrics.NAME)) == 2


def test_a_kind_of_ones_own_with_tensors(tmp_path):
    with writer(tmp_path) as metrics_writer:
        sizes = torch.tensor([1, math.nan])
        metrics_writer.write("weights", step=3, norm=torch.tensor(2.5), sizes=sizes)
    line = {"kind": "weights", "step": 3, "norm": 2.5, "sizes": [1, None]}
    assert metrics.read(tmp_path / metrics.NAME)[1] == line
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(s.step, s.value) for s in events.Scalars("weights/norm")] == [(3, 2.5)]


def test_refusals(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError):
        writer(tmp_path / "file")
    # Without a reader, opening a pipe never returned.
    os.mkfifo(tmp_path / metrics.NAME)
    with pytest.raises(OSError, match=r"such device or address|no plain file"):
        writer(tmp_path)
    with pytest.raises(OSError, match="it is no plain file"):
        metrics.read(tmp_path / metrics.NAME)
    path = tmp_path / "m.jsonl"
    for raw in (b"no json\n", b'{"kind": "epoch"}\nx\n{}\n', b"3\n", b"\xff\n"):
        path.write_bytes(raw)
        with pytest.raises(ToolkitError, match="name a run's --logdir"):
            metrics.read(path)
    path.write_text('{"command": []}\n{"kind": "ba')
    assert metrics.read(path) == [{"command": []}]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_commit_with_changed_code_says_so(tmp_path, monkeypatch):
    def git(*words):
        someone = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", tmp_path, *someone, *words], check=True, capture_output=True)

    (tmp_path / "results").mkdir()
    code, result = tmp_path / "main.py", tmp_path / "results" / "run.md"
    code.write_text("a")
    result.write_text("a")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(metrics, "__file__", str(tmp_path / "cli" / "metrics.py"))
    clean = metrics.commit()
    assert len(clean) == 40
    # Changed results do not count: bench/reproduce.py writes them during a run.
    result.write_text("b")
    assert metrics.commit() == clean
    code.write_text("b")
    assert metrics.commit() == f"{clean}+"
    monkeypatch.setenv("PATH", "")
    assert metrics.commit() is None


def test_tensorboard_reads_every_number(tmp_path):
    with writer(tmp_path) as log:
        for step in (10, 20):
            log.write("batch", step=step, epoch=1, batch=step, loss=5.0, grad_norm=0.5)
        log.write("epoch", step=30, epoch=1, time=2.0, valid_loss=4.0)
        log.write("switch", step=30, epoch=1)
        log.write("test", step=30, test_loss=3.0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name, value in {
        "batch/grad_norm": 0.5,
        "batch/ppl": math.exp(5),
        "batch/bpc": 5 / math.log(2),
        "epoch/valid_loss": 4.0,
        "epoch/valid_ppl": math.exp(4),
        "epoch/valid_bpc": 4 / math.log(2),
        "test/test_ppl": math.exp(3),
    }.items():
        scalars = events.Scalars(name)
        assert [s.value for s in scalars] == [pytest.approx(value)] * len(scalars), name
        assert scalars[0].step == (10 if name.startswith("batch") else 30)
    (switch,) = (tag for tag in events.Tags()["tensors"] if tag.startswith("switch"))
    assert events.Tensors(switch)[0].step == 30
