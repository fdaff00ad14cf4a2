"""tools/results_table.py, bench/study.py: the README's measured figures come from results/."""

import contextlib
import importlib
import itertools
import json
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY

import checkpoint
from bench import study
from bench.published import ROWS
from tools import results_table
from utils import ToolkitError


def write(folder, name, **stages):
    (folder / f"{name}.metrics.jsonl").write_text(json.dumps({"stages": stages}) + "\n")


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
    write(tmp_path, "ptb-qrnn", main=done, finetune=cut)
    write(tmp_path, "ptb-lstm-reduced", main=done)  # is no row
    table = results_table.published_table(tmp_path)
    assert cells(table, "PTB QRNN")[4:] == [
        "60.71 / 58.43", "valid 59.90 after 120 of 300 epochs", ""
    ]  # fmt: skip
    assert "(results/ptb-qrnn.md)" in table
    assert cells(table, "PTB LSTM")[4:] == ["", "", ""]
    # Character models have bits per character.
    write(tmp_path, "ptbc", main={**done, "valid": 1.2014, "test": 1.1759})
    assert cells(results_table.published_table(tmp_path), "characters")[4] == "1.201 / 1.176"


def test_check_fails_on_a_changed_figure_and_writing_mends_it(tmp_path, capsys, monkeypatch):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    for page in results_table.pages(ROOT / "results"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        text = (ROOT / page).read_text("utf-8").replace("53.4 / 52.6", "53.3 / 52.6")
        (tmp_path / page).write_text(text, "utf-8")
    monkeypatch.setattr(results_table, "ROOT", tmp_path)
    assert results_table.main(["--check"]) == 1
    assert "README.md differs" in capsys.readouterr().out
    assert results_table.main([]) == 0
    assert (tmp_path / "README.md").read_text("utf-8") == (ROOT / "README.md").read_text("utf-8")
    with pytest.raises(ValueError, match="markers"):
        results_table.replaced("no markers", "study", "")


def run(cell, seed, without="", *, ppl):
    """A run whose perplexities fall by ten an epoch to `ppl`; in the test it is 3 lower."""
    second = "raw" if without == "no averaging" else "finetune"
    epochs = [{"epoch": n, "loss": math.log(ppl + 10 * (8 - n))} for n in range(1, 9)]
    tests = {"main": math.log(ppl + 15), second: math.log(ppl - 3)}
    return {"cell": cell, "seed": seed, "without": without, "epochs": epochs, "tests": tests,
            "parameters": 1_234_567}  # fmt: skip


def test_the_tables_of_the_study():
    cells_and_seeds = itertools.product(("LSTM", "GRU", "QRNN"), (1, 2))
    runs = [run(*which, ppl=120 + 2 * n) for n, which in enumerate(cells_and_seeds)]
    runs += [run("LSTM", 1, name, ppl=118.5 + 4 * n) for n, name in enumerate(study.ABLATIONS)]
    runs += [run("LSTM", 1, "no averaging", ppl=131), run("LSTM", 2, "no averaging", ppl=132)]
    table = study.tables(runs)
    assert "| LSTM | 1,234,567 | 1 | 140.00 | 120.00 | 117.00 |" in table
    assert "| QRNN | 1,234,567 | 2 | 150.00 | 130.00 | 127.00 |" in table
    assert cells(table, "everything")[1:] == ["120.00", "117.00", "", "60.0 / 57.3", ""]
    weight_drop = ["118.50", "115.50", "-1.5", "71.1 / 68.9", "+11.1"]
    assert cells(table, "no weight drop")[1:] == weight_drop
    assert cells(table, "no averaging")[1:] == ["131.00", "128.00", "+11.0", "", ""]


def test_a_study_that_is_interrupted_continues_and_is_read_from_its_metrics(
    corpus_dir, tmp_path, monkeypatch
):
    for name, value in (("SIZES", TINY), ("RATES", []), ("MAIN_EPOCHS", 2), ("FINETUNE_EPOCHS", 1)):
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "ALL_EPOCHS", 3)
    monkeypatch.setattr(study, "RUNS", [study.Run("lstm-1", "LSTM", 1, raw=True)])
    folder, scripts = tmp_path / "lstm-1", []

    def metrics(stage):
        lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def in_this_process(command, stdout, **options):
        """The first call ends after its first epoch, with a test score, as after Ctrl-C."""
        _, script, *flags = command
        if not scripts:
            flags[flags.index("--epochs") + 1] = "1"
        scripts.append(Path(script).name)
        with contextlib.redirect_stdout(stdout):
            importlib.import_module(Path(script).stem).main(flags)

    processes = SimpleNamespace(run=in_this_process, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(study, "subprocess", processes)
    with pytest.raises(ToolkitError, match="the same command continues it"):
        study.train(study.RUNS[0], corpus_dir, tmp_path)
    # An epoch that a kill made undone: the line of the next run counts.
    with open(folder / "main" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "epoch", "epoch": 2, "valid_loss": 99.0}) + "\n")
    for _ in range(2):  # the second call finds nothing to do
        study.train(study.RUNS[0], corpus_dir, tmp_path)
    assert scripts == ["main.py", "main.py", "main.py", "finetune.py"]

    averaged, raw = study.collected(tmp_path)
    assert (averaged["without"], raw["without"]) == ("", "no averaging")
    commit = metrics("main")[0]["commit"]
    for found, stage, epoch in ((averaged, "finetune", 1), (raw, "raw", 3)):
        assert [e["epoch"] for e in found["epochs"]] == [1, 2, 3]
        assert [e["stage"] for e in found["epochs"]] == ["main", "main", stage]
        losses = {e["epoch"]: e["valid_loss"] for e in metrics(stage) if e.get("kind") == "epoch"}
        assert study.after(found, 3) == pytest.approx(math.exp(losses[epoch]))
        assert 1 < study.after(found, 2) < 100
        assert study.tested(found) == pytest.approx(math.exp(metrics(stage)[-1]["test_loss"]))
        weights = checkpoint.load(folder / f"{stage}.pt").model
        tied = {id(t.untyped_storage()): t.numel() for t in weights.values()}
        assert found["parameters"] == sum(tied.values())
        assert found["commits"] == ([commit[:7] + "+" * commit.endswith("+")] if commit else [])
