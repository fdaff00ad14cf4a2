"""The house: who imports whom, what importing does, and what the repository must not hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A file imports only from floors below its own.
FLOORS = {
    "main": 5,
    "finetune": 5,
    "pointer": 5,
    "generate": 5,
    "score": 5,
    "plot": 5,
    "checkpoint": 4,
    "cache_search": 4,
    "engine": 3,
    "training_step": 2,
    "scoring": 3,
    "model": 1,
    "options": 2,
    "nt_asgd": 0,
    "parallel": 0,
    "safekeeping": 0,
    "continuous_cache": 0,
    "data": 0,
    "plotting": 0,
    "progress": 0,
    "embed_regularize": 0,
    "locked_dropout": 0,
    "metrics": 0,
    "weight_drop": 0,
    "splitcross": 0,
    "qrnn": 0,
    "utils": -1,
    "aligned": -1,
}


def local_imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names if alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def sources(module):
    folder = ROOT / module
    return sorted(folder.glob("*.py")) if folder.is_dir() else [ROOT / f"{module}.py"]


def test_every_module_has_a_floor():
    found = {path.stem for path in ROOT.glob("*.py")} | {"qrnn"}
    assert found == set(FLOORS)


@pytest.mark.parametrize("module", FLOORS)
def test_imports_go_down(module):
    for path in sources(module):
        for name in local_imports(path):
            if name in FLOORS and name != module:
                assert FLOORS[name] < FLOORS[module], f"{path.name} imports {name}"


def run_python(code, *flags):
    return subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_importing_is_silent_and_needs_neither_cupy_nor_a_gpu():
    modules = [*FLOORS, "qrnn.forget_mult", "qrnn.layer", "qrnn.kernels"]
    code = (
        "import sys\n"
        "sys.modules['cupy'] = sys.modules['pynvrtc'] = None  # importing them now fails\n"
        f"import {', '.join(modules)}\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    result = run_python(code, "-W", "error")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("script", ["main", "finetune", "pointer", "generate"])
def test_as_a_program(script, tmp_path):
    """The guard at the end of each script: help, and one line for an error."""
    path = ROOT / f"{script}.py"

    def call(*argv):
        command = [sys.executable, str(path), *argv]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    result = call("--no-such-flag")
    assert result.returncode == 2
    assert result.stderr.startswith(f"{script}.py: error: ")
    missing = call("--data", "nowhere")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert len(missing.stderr.splitlines()) == 1
    assert missing.stderr.startswith(f"{script}.py: error: ")
