"""bench/run_all.py: it keeps all tables and failures, and continues a run that was cut."""

import shlex

import pytest

from bench import run_all
from bench.decisions import QUESTIONS, decisions
from bench.run_all import Task

GOOD = Task("python -c \"print('| a | 1 |')\"")
BAD = Task("python -c \"import sys; print('before'); sys.exit(3)\"")
# This task has a child process, which must end too.
LONG = Task("sh -c 'echo so far; tail -f /dev/null; true'")


@pytest.fixture
def tasks(monkeypatch):
    chosen = {}
    monkeypatch.setattr(run_all, "TASKS", chosen)
    return chosen


def read(folder, name):
    return (folder / f"{name}.md").read_text(encoding="utf-8")


def test_tables_are_kept(tasks, tmp_path, capsys):
    tasks.update(one=GOOD, two=GOOD)
    assert run_all.main(["--out", str(tmp_path)]) == 0
    for name in tasks:
        assert read(tmp_path, name).startswith(f"# `{GOOD.command}`\n\nOn ")
        assert read(tmp_path, name).endswith(": whole\n\n| a | 1 |\n")
    printed = capsys.readouterr().out
    assert printed.count("\n| a | 1 |\n") == 2
    assert read(tmp_path, "decisions").startswith("| question | measured |")
    assert "| question | measured |" in printed


def test_what_goes_wrong_is_said_and_the_rest_runs(tasks, tmp_path):
    tasks.update(bad=BAD, missing=Task("python -c 1", needs="no-such-program"), good=GOOD)
    assert run_all.main(["--out", str(tmp_path)]) == 1
    assert read(tmp_path, "bad").endswith(": failed with exit status 3\n\nbefore\n")
    assert "not run: no-such-program is not installed" in read(tmp_path, "missing")
    assert read(tmp_path, "good").endswith("| a | 1 |\n")
    assert "- bad: failed with exit status 3\n" in read(tmp_path, "decisions")


def test_where_it_was_cut_it_goes_on(tasks, tmp_path):
    count = tmp_path / "count"
    tasks.update(
        first=Task(f"sh -c 'echo once >> {shlex.quote(str(count))}'"), long=LONG, last=GOOD
    )
    assert run_all.main(["--out", str(tmp_path), "--minutes", "0.05"]) == 1
    assert ": cut off after " in read(tmp_path, "long")
    assert read(tmp_path, "long").endswith("so far\n")
    assert "not run: the time is up" in read(tmp_path, "last")
    tasks["long"] = GOOD
    assert run_all.main(["--out", str(tmp_path)]) == 0
    assert read(tmp_path, "long").endswith("| a | 1 |\n")
    assert read(tmp_path, "last").endswith("| a | 1 |\n")
    # A finished task runs again only if it is named.
    assert count.read_text() == "once\n"
    assert run_all.main(["--out", str(tmp_path), "--only", "first"]) == 0
    assert count.read_text() == "once\nonce\n"


def test_every_benchmark_is_run():
    """TASKS lists every script of bench/ that prints a table."""
    scripts = {path.stem for path in (run_all.ROOT / "bench").glob("*.py")}
    others = {"__init__", "common", "decisions", "published", "reproduce", "study", "run_all"}
    commands = " ".join(task.command for task in run_all.TASKS.values())
    assert scripts - others == {s for s in scripts if f"bench/{s}.py" in commands}


def test_decisions_are_read_from_the_tables():
    row = "| PTB QRNN, batch 20 x 70 | {} | {} | 1.10 to 1.90 | 900,000 | 60% | |\n"
    files = {
        "train_step-ptb-qrnn": row.format("eager tf32", "2.50") + row.format("graphs tf32", 1.4),
        "train_step-ptb-lstm": "| PTB LSTM, batch 20 x 70 | graphs tf32 | 2.60 | | | | |\n",
        "forget_mult": "| (70, 20, 1550) | ours | 36.5 | 30.0 to 40.0 | 71 | 90% | 4.00 |\n",
    }
    rows = [line.split("|")[1:-1] for line in decisions(files).splitlines()[2:]]
    answers = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert answers["CUDA graphs pay"] == ["1.4", "2.5", "yes"]
    assert answers["a QRNN step is at most half an LSTM step"] == ["1.4", "1.3", "no"]
    assert answers["a PTB QRNN step takes at most 1.5 ms"] == ["1.4", "1.5", "yes"]
    assert answers["ForgetMult, PTB: 35 us"] == ["36.5", "35", "no"]
    assert answers["the layer, PTB: 45 us"] == ["not measured", "", ""]


def test_every_question_is_about_a_task_that_is_run():
    asked = [row for question in QUESTIONS for row in (question.row, question.other) if row]
    assert {row[0] for row in asked} <= set(run_all.TASKS)
