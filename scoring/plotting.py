"""Pictures, drawn with matplotlib if it is installed."""

import importlib
import os
from pathlib import Path
from typing import Any

from files.writing import check_writable, writing
from utils import ToolkitError

# The formats that matplotlib writes without other packages.
FORMATS = ("png", "pdf", "svg")


def check(path: str | os.PathLike[str], flag: str) -> None:
    """Raise ToolkitError if no picture can be written to `path`, the value of `flag`."""
    if Path(path).suffix[1:].lower() not in FORMATS:
        raise ToolkitError(
            f"cannot draw {path}: give {flag} a name that ends in .{', .'.join(FORMATS)}"
        )
    check_writable(path, flag)
    figure_class()


def figure_class() -> Any:
    """matplotlib's figure class, which draws to a file and needs no window.

    Raises ToolkitError if matplotlib is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise ToolkitError(
            "pictures need matplotlib, which is not installed: pip install matplotlib"
        ) from None


def save(figure: Any, path: str | os.PathLike[str], flag: str) -> None:
    """Write a figure in the format that `path` ends in, and name it; raises ToolkitError."""
    with writing(path, flag) as file:
        figure.savefig(file, format=Path(path).suffix[1:].lower(), dpi=120)
    print(f"Wrote {path}")
