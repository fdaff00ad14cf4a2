"""Imported first by every script: a Python that cannot run them ends with a sentence."""

import importlib.util
import sys
from pathlib import Path

_PROBLEM = ""
if sys.platform == "win32":
    _PROBLEM = "the scripts run on Linux and macOS: on Windows use WSL"
elif importlib.util.find_spec("torch") is None:
    _PROBLEM = (
        f"{sys.executable} has no PyTorch: activate the virtual environment "
        "(. .venv/bin/activate), or set one up as README.md says"
    )
if _PROBLEM:
    sys.exit(f"{Path(sys.argv[0]).name}: error: {_PROBLEM}")
