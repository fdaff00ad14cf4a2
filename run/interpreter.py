"""Imported first by every script: a Python that cannot run them ends with a sentence."""

import importlib.util
import sys

if sys.platform == "win32":
    sys.exit("error: the scripts run on Linux and macOS: on Windows use WSL")
if importlib.util.find_spec("torch") is None:
    sys.exit(
        f"error: {sys.executable} has no PyTorch: activate the virtual environment "
        "(. .venv/bin/activate), or set one up as README.md says"
    )
