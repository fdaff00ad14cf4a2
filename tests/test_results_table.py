"""tools/results_table.py, bench/study.py: the README's measured figures come from results/."""

import json
import math
from pathlib import Path

import pytest
from conftest import ROOT

from bench import study
from bench.published import ROWS
from tools import results_table
from utils import ToolkitError


def head(**stages):
    return {"row": "ptb-qrnn", "reduced": [], "unit": "perplexity", "stages": stages}


def write(folder, name, line):
    (folder / f"{name}.metrics.jsonl").write_text(json.dumps(line) + "\n")


def cells(table, title):
    row = next(line for line in table.splitlines() if title in line)
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_pages_hold_what_their_sources_hold():
    assert results_table.main(["--check"]) == 0


def test_the_published_column_has_every_published_figure():
    table = results_table.published_table(ROOT / "no-such-folder")
    for row in ROWS.values():
        for valid, test in row.figures.values():
            assert (f"{test:.3f} bpc" if valid is None else f"{valid:.1f} / {test:.1f}") in table
    assert cells(table, "PTB QRNN") == [
        "PTB QRNN", "60.6 / 58.3", "59.1 / 56.7", "53.4 / 52.6"
    ]  # fmt: skip
    assert table.endswith(results_table.NONE_OF_OURS)


def test_ours_come_from_the_files_and_an_unfinished_stage_is_no_final_figure(tmp_path):
    done = {"done": True, "valid": 60.714, "test": 58.426, "epochs": 550, "of": 550}
    cut = {"done": False, "valid": 59.9, "test": None, "epochs": 120, "of": 300}
    write(tmp_path, "ptb-qrnn", head(main=done, finetune=cut))
    table = results_table.published_table(tmp_path)
    assert cells(table, "PTB QRNN")[4:] == [
        "60.71 / 58.43", "valid 59.90 after 120 of 300 epochs", ""
    ]  # fmt: skip
    assert "(results/ptb-qrnn.md)" in table
    assert cells(table, "PTB LSTM")[4:] == ["", "", ""]
    # Character models have bits per character.
    character = {**head(main={**done, "valid": 1.2014, "test": 1.1759}), "unit": "bits"}
    write(tmp_path, "ptbc", character)
    assert cells(results_table.published_table(tmp_path), "characters")[4] == "1.201 / 1.176"


def test_a_reduced_run_is_no_row(tmp_path):
    done = {"done": True, "valid": 300.0, "test": 290.0, "epochs": 2, "of": 2}
    write(tmp_path, "ptb-qrnn", {**head(main=done), "reduced": ["--epochs", "2"]})
    write(tmp_path, "ptb-lstm-reduced", head(main=done))
    assert results_table.published_table(tmp_path) == results_table.published_table(ROOT / "none")


def test_check_fails_on_a_changed_figure_and_writing_mends_it(tmp_path, capsys):
    for page in results_table.pages(ROOT / "results"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        text = (ROOT / page).read_text("utf-8").replace("53.4 / 52.6", "53.3 / 52.6")
        (tmp_path / page).write_text(text, "utf-8")
    flags = ["--root", str(tmp_path)]
    assert results_table.main([*flags, "--check"]) == 1
    assert "README.md differs" in capsys.readouterr().out
    assert results_table.main(flags) == 0
    assert (tmp_path / "README.md").read_text("utf-8") == (ROOT / "README.md").read_text("utf-8")
    with pytest.raises(ValueError, match="markers"):
        results_table.replaced("no markers", "study", "")


def run(cell, seed, without="", *, ppl, stage="finetune"):
    epochs = [
        {"epoch": n, "loss": math.log(ppl + 10 * (8 - n)), "stage": "main" if n <= 6 else stage}
        for n in range(1, 9)
    ]
    tests = {"main": math.log(ppl + 15), stage: math.log(ppl - 3)}
    return {"name": "x", "cell": cell, "seed": seed, "without": without, "epochs": epochs,
            "tests": tests, "commits": ["abc"], "parameters": 1_234_567,
            "versions": {"torch": "2"}, "device": "cpu", "flags": ""}  # fmt: skip


def test_the_tables_of_the_study():
    runs = [
        run("LSTM", 1, ppl=120),
        run("QRNN", 2, ppl=130),
        run("LSTM", 1, "no weight drop", ppl=118.5),
        run("LSTM", 1, "no averaging", ppl=131, stage="raw"),
    ]
    table = study.tables(runs)
    assert "| LSTM | 1,234,567 | 1 | 140.00 | 120.00 | 117.00 |" in table
    assert "| QRNN | 1,234,567 | 2 | 150.00 | 130.00 | 127.00 |" in table
    assert cells(table, "| GRU |  | 1 |")[3:] == ["not run"] * 3
    weight_drop = ["118.50", "115.50", "-1.5", "71.1 / 68.9", "+11.1"]
    assert cells(table, "no weight drop")[1:] == weight_drop
    assert cells(table, "no averaging")[1:4] == ["131.00", "128.00", "+11.0"]
    assert cells(table, "no AR and TAR")[1:4] == ["not run", "not run", ""]
    assert study.tables([]) == "Not run yet."


def metrics_of(folder, *lines):
    folder.mkdir(parents=True)
    first = {"versions": {"torch": "2"}, "device": "cpu", "commit": "0123456789"}
    lines = [json.dumps(line) for line in (first, *lines)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_the_study_reads_its_runs_from_their_metrics(tmp_path):
    def epoch(number, loss):
        return {"kind": "epoch", "epoch": number, "valid_loss": loss, "time": 1.0}

    tested = {"kind": "test", "test_loss": 4.0}
    metrics_of(tmp_path / "lstm-1" / "main", epoch(6, 5.0), tested)
    metrics_of(tmp_path / "lstm-1" / "finetune", epoch(1, 4.9), epoch(2, 4.8), tested)
    metrics_of(tmp_path / "lstm-1" / "raw", epoch(7, 4.95), epoch(8, 5.1))
    metrics_of(tmp_path / "gru-2" / "main", epoch(1, 6.0))
    runs = {(r["cell"], r["seed"], r["without"]): r for r in study.collected(tmp_path)}
    assert set(runs) == {("LSTM", 1, ""), ("LSTM", 1, "no averaging"), ("GRU", 2, "")}
    assert study.after(runs["LSTM", 1, ""], 8) == pytest.approx(math.exp(4.8))
    assert study.after(runs["LSTM", 1, "no averaging"], 8) == pytest.approx(math.exp(5.1))
    assert study.tested(runs["LSTM", 1, ""]) == pytest.approx(math.exp(4.0))
    assert study.tested(runs["LSTM", 1, "no averaging"]) is None
    assert study.after(runs["GRU", 2, ""], 6) is None
    assert runs["LSTM", 1, ""]["commits"] == ["0123456"]
    assert "not run" in study.tables(list(runs.values()))


def test_a_stage_of_the_study_that_ended_early_is_not_done(tmp_path, monkeypatch):
    """Ctrl-C ends main.py early, with a test score and exit status 0."""
    lines = [{"kind": "epoch", "epoch": 2, "valid_loss": 5.0}, {"kind": "test", "test_loss": 5.0}]

    def early(command, **options):
        folder = Path(command[command.index("--logdir") + 1])
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(study.subprocess, "run", early)
    with pytest.raises(ToolkitError, match="was interrupted"):
        study.stage(tmp_path, "main", "main.py", ["--epochs", "3"])
    assert not (tmp_path / "main" / "done").exists()
    study.stage(tmp_path, "main", "main.py", ["--epochs", "2"])
    assert (tmp_path / "main" / "done").exists()
