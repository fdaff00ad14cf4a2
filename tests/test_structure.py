"""The modules: which imports which, and the effects of an import."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT, TINY

SCRIPTS = {path.stem for path in ROOT.glob("*.py") if "__main__" in path.read_text("utf-8")}
IDEAS = {path.stem for path in ROOT.glob("*.py")} - SCRIPTS
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"bench"}
# Ideas may import these packages; runs, model files and command lines are for the other packages.
BELOW_IDEAS = {"qrnn", "kernels", "files"} & PACKAGES


def sources(room):
    folder = ROOT / room
    return sorted(folder.glob("*.py")) if folder.is_dir() else [ROOT / f"{room}.py"]


def imported(room):
    """The root modules and packages that `room`, a root module or package, imports."""
    names = set()
    for path in sources(room):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names & (SCRIPTS | IDEAS | PACKAGES) - {room}


@pytest.mark.parametrize("room", sorted(IDEAS | BELOW_IDEAS))
def test_ideas_know_no_mechanics(room):
    assert imported(room) <= (BELOW_IDEAS | IDEAS if room in IDEAS else BELOW_IDEAS | {"utils"})


def test_imports_make_no_circle_and_nothing_imports_a_script():
    graph = {room: imported(room) for room in SCRIPTS | IDEAS | PACKAGES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert not SCRIPTS & set().union(*graph.values())
    assert {"main", "finetune", "pointer", "generate"} <= SCRIPTS


def run_python(code, *flags):
    return subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_importing_is_silent_and_needs_neither_cupy_nor_a_gpu():
    inner = [f"{p}.{path.stem}" for p in PACKAGES for path in sources(p) if path.stem[0] != "_"]
    code = (
        "import sys\n"
        "sys.modules['cupy'] = sys.modules['pynvrtc'] = None  # importing them now fails\n"
        f"import {', '.join([*SCRIPTS, *IDEAS, *inner])}\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    result = run_python(code, "-W", "error")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_scripts_load_only_what_they_need(trained, corpus_dir, tmp_path):
    argv = ["--data", str(corpus_dir), *TINY, "--epochs", "1", "--save", str(tmp_path / "m.pt")]
    code = (
        "import sys, checkpoint, generate, pointer, score\n"
        f"checkpoint.rebuild(checkpoint.load({str(trained['LSTM'])!r}), 'cpu')\n"
        "assert 'training' not in sys.modules\n"
        "import main\n"
        f"main.main({argv})\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    assert run_python(code).returncode == 0
