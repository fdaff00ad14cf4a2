"""A Python that cannot run the scripts gets a sentence."""

import importlib
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

from run import interpreter


@pytest.mark.parametrize(
    "script",
    [
        *(p.name for p in ROOT.glob("*.py") if "__main__" in p.read_text()),
        *("tools/make_corpus.py", "tools/import_original.py", "tools/export.py"),
        "bench/reproduce.py",
    ],
)
def test_without_the_virtual_environment(script):
    # -S leaves out the installed packages, as the system's Python would.
    command = [sys.executable, "-S", script, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert f"error: {sys.executable} has no PyTorch: activate the virtual" in done.stderr


def test_windows_is_answered_with_wsl(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="on Windows use WSL"):
        importlib.reload(interpreter)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(SystemExit, match="on Windows use WSL"):
        runpy.run_path(str(ROOT / "tools" / "getdata.py"))
