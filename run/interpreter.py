"""Imported before anything else by the scripts: ends those that this Python cannot run."""

import importlib.util
import sys
from pathlib import Path


def _missing() -> str:
    """A sentence if the scripts cannot run here, else an empty string."""
    if sys.platform == "win32":
        return "the scripts run on Linux and macOS: on Windows use WSL"
    for package in ("torch", "numpy"):
        if importlib.util.find_spec(package) is None:
            return (
                f"{sys.executable} has no package {package}: activate the virtual environment "
                "(. .venv/bin/activate), or set one up as README.md says"
            )
    return ""


if _sentence := _missing():
    sys.exit(f"{Path(sys.argv[0]).name}: error: {_sentence}")
