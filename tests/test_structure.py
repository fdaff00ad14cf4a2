"""The house: who imports whom, what importing does, and what the repository must not hold."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ROOMS = sorted({path.stem for path in ROOT.glob("*.py")})


def run_python(code, *flags):
    return subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_importing_is_silent_and_needs_neither_cupy_nor_a_gpu():
    modules = [*ROOMS, "qrnn.forget_mult", "qrnn.layer", "qrnn.kernels"]
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
