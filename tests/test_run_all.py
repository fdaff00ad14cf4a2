"""bench/run_all.py: all tables and failures are kept."""

import pytest

from bench import run_all
from bench.run_all import Task

GOOD = Task("python -c \"print('| a | 1 |')\"")
BAD = Task("python -c \"import sys; print('before'); sys.exit(3)\"")
# A benchmark with a child process, which must be ended too.
LONG = Task("sh -c 'echo so far; tail -f /dev/null; true'")


@pytest.fixture
def tasks(monkeypatch):
    chosen = {}
    monkeypatch.setattr(run_all, "TASKS", chosen)
    return chosen


def test_tables_are_kept(tasks, tmp_path, capsys):
    tasks.update(one=GOOD, two=GOOD)
    out = tmp_path / "bench.md"
    assert run_all.main(["--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert text.startswith("# Benchmarks on ")
    assert text.count(f"## `{GOOD.command}`\n\n| a | 1 |\n") == 2
    assert "| a | 1 |" in capsys.readouterr().out
    assert run_all.main(["--out", str(out), "--only", "two"]) == 0
    assert out.read_text(encoding="utf-8").count("| a | 1 |\n") == 1


def test_what_goes_wrong_is_said_and_the_rest_runs(tasks, tmp_path):
    tasks.update(bad=BAD, missing=Task("python -c 1", needs="no-such-program"), good=GOOD)
    out = tmp_path / "bench.md"
    assert run_all.main(["--out", str(out)]) == 1
    head, *sections = out.read_text(encoding="utf-8").split("## `")
    assert f"- `{BAD.command}` failed with exit status 3\n" in head
    assert "not run: no-such-program is not installed\n" in head
    assert "before\n**failed with exit status 3**\n" in sections[0]
    assert "| a | 1 |" in sections[2]


def test_the_time_is_kept_and_what_a_cut_benchmark_printed(tasks, tmp_path):
    tasks.update(long=LONG, good=GOOD)
    out = tmp_path / "bench.md"
    assert run_all.main(["--out", str(out), "--minutes", "0.05"]) == 1
    head, *sections = out.read_text(encoding="utf-8").split("## `")
    assert head.count("\n- ") == 2
    assert "so far\n**cut off after 3 s**" in sections[0]
    assert "**not run: the time is up**" in sections[1]


def test_every_benchmark_is_run():
    """TASKS lists every script of bench/ that prints a table."""
    scripts = {path.stem for path in (run_all.ROOT / "bench").glob("*.py")}
    others = {"__init__", "common", "published", "reproduce", "study", "run_all"}
    assert scripts - others == {name for name, task in run_all.TASKS.items() if not task.gpu}
