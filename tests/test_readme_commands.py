"""The commands of README.md and docs/ run, in their order, on corpora of a hundred lines.

The scripts run in this process, with the flags of SHORT appended: a tiny network, one epoch and
one batch for training, one batch for the cache. The published commands run at their real sizes in
`test_readme.py`. EXCLUDED lists the commands that are not run, with reasons.
"""

import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_readme import commands

import checkpoint

EXCLUDED = {
    "make demo": "minutes; its stages are those of the commands below",
    "make test": "these tests",
    "make test-fast": "these tests",
    "pip install": "installs",
    "python bench/reproduce.py": "hours; tests/test_reproduce.py runs it at a reduced size",
    "torchrun": "starts several processes; tests of the same name in tests/ do it",
    "PYTHONPATH=the/example": "needs the example and a file of its",
    "PYTHONPATH=the/original": "needs the original and the PyTorch that can read its files",
    "./getdata.sh": "fetches from the internet; tests/test_getdata.py runs it from a folder",
}
PROGRAMS = (
    "python ",
    ".venv/bin/python ",
    "./",
    "make ",
    "pip ",
    "torchrun ",
    "PYTHONPATH=",
    "grep ",
)
SHORT = {
    "main.py": "--epochs 1 --max-batches 1 --emsize 8 --nhid 8 --nlayers 2 --no-cuda",
    "finetune.py": "--epochs 1 --max-batches 1 --emsize 8 --nhid 8 --nlayers 2 --no-cuda",
    "pointer.py": "--max-batches 1 --no-cuda",
    "dynamiceval.py": "--max-batches 1 --no-cuda --batch_size 4",
    "generate.py": "--no-cuda",
    "score.py": "--no-cuda",
    "plot.py": "",
}
# The words of the README's --text and --prompt must be in the vocabulary.
SPOKEN = "the company said it would sell its shares\n"


def excluded(command):
    return any(command == name or command.startswith(f"{name} ") for name in EXCLUDED)


def test_what_is_excluded_is_in_the_pages():
    for name in EXCLUDED:
        assert any(c == name or c.startswith(f"{name} ") for c in commands()), name


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A new working directory, with small corpora where the README's commands look for them."""
    penn = tmp_path / "data" / "penn"
    penn.mkdir(parents=True)
    for name in ("train.txt", "valid.txt", "test.txt"):
        text = (ROOT / "data" / "sample" / name).read_text(encoding="utf-8")
        head = "".join(text.splitlines(keepends=True)[:100])
        (penn / name).write_text(SPOKEN + head, encoding="utf-8")
    for corpus in ("pennchar", "wikitext-2", "wikitext-103", "enwik8", "sample"):
        shutil.copytree(penn, penn.parent / corpus)
    (penn.parent / "own").mkdir()
    shutil.copy(penn / "train.txt", penn.parent / "own")
    shutil.copy(penn / "train.txt", tmp_path / "book.txt")
    (tmp_path / "nbest.txt").write_text(SPOKEN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run(tree, script):
    pytest.importorskip("matplotlib")
    ran = 0
    for command in commands():
        if not command.startswith(PROGRAMS) or excluded(command):
            continue
        if command.startswith("grep "):
            assert subprocess.run(command, shell=True).returncode == 0, command
            continue
        program, name, *argv = shlex.split(command)
        if program == "python":
            if "book" in argv[0]:
                shutil.rmtree("data/book", ignore_errors=True)  # of another page
            module = name.removesuffix(".py").replace("/", ".")
            status, out, err = script(module, *argv, *SHORT.get(name, "").split())
            written = "written to generated.txt\n" if name == "generate.py" else ""
            assert status == 0, command
            assert err in ("", written), command
            assert out, command
            if name == "main.py":
                # The logs that the README's plot.py command compares.
                for log in ("lstm.log", "gru.log"):
                    (tree / log).write_text(out, encoding="utf-8")
        else:
            assert (program, name) == (".venv/bin/python", "tools/import_original.py")
            model = checkpoint.load("PTB.pt")
            state = {"model": model.model, "criterion": model.criterion}
            torch.save(state, "exported.pt")
            result = subprocess.run(
                [sys.executable, str(ROOT / name), *argv], capture_output=True, text=True
            )
            assert result.returncode == 0, result.stderr
        ran += 1
    assert ran > 20
    # The files that the commands write.
    left = ["PTB.pt", "WT2.pt", "PTBC.pt", "ENWIK8.pt", "WT103.12hr.QRNN.pt", "OWN.pt"]
    for name in [*left, "surprisal.html", "words.png", "curves.png"]:
        assert (tree / name).stat().st_size > 0, name
