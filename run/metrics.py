"""A run's numbers for programs: DIR/metrics.jsonl, and TensorBoard events if it is installed.

metrics.jsonl has one JSON object a line. The first line, and one more each time a run is resumed:

    {"command": [...], "flags": {...}, "versions": {...}, "device": "...", "commit": "..." or null}

Then comes one line for each log line, in order; "kind" tells them apart:

    {"kind": "batch", "epoch", "batch", "step", "lr", "loss", "tokens_per_second", ...}
    {"kind": "epoch", "epoch", "step", "time", "valid_loss", ...}
    {"kind": "switch", "epoch", "step"}        averaging starts after this epoch
    {"kind": "test", "step", "test_loss"}

Losses are in nats a token; each loss comes with its perplexity and bits, as `loss` with `ppl` and
`bpc`. `time` is the seconds that the epoch took, with `resumed_at` since that batch. A number that
is not finite is null. A call of `Session.write` with another kind adds a line of that kind.
"""

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from files.reading import opened
from utils import ToolkitError, bits, perplexity

NAME = "metrics.jsonl"


def versions() -> dict[str, str]:
    """The versions of Python and PyTorch."""
    return {"python": platform.python_version(), "torch": torch.__version__}


def commit() -> str | None:
    """The commit of this folder, with a + if the code differs from it; None outside git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parents[1]), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # The results are left out, because a run in pieces writes them as it goes.
        changed = git("status", "--porcelain", "--untracked-files=no", ".", ":(exclude)results")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class MetricsWriter:
    """Appends to `folder`/metrics.jsonl; every line reaches the file at once.

    `command` are the words of the command line, `flags` the values of all flags, `device` the
    device in words. If tensorboard is installed, events are written too; else a line says that they
    are not. Without a `folder` nothing is written. Raises OSError if the folder cannot be written
    at the start; a later failure is printed once and ends the writing.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, command: Sequence[str], flags: Mapping[str, Any],
        device: str,
    ) -> None:  # fmt: skip
        self._file = self._events = None
        if not folder:
            return
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / NAME
        # Bytes of a path that are not UTF-8 become escapes.
        self._file = opened(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
        written = path.read_bytes()
        if written and not written.endswith(b"\n"):
            self._file.write("\n")  # a killed run or a full disk cut the last line off
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.folder))
        except ImportError:
            print(
                "TensorBoard events need the package tensorboard, which is not installed: "
                f"{NAME} alone is written"
            )
        head = {"command": list(command), "flags": dict(flags), "versions": versions()}
        self._append({**head, "device": device, "commit": commit()})

    def write(self, kind: str, *, step: int, **values: Any) -> None:
        """Append a line of `kind`; `step` counts rows of the corpus laid out in columns.

        For `loss` the perplexity `ppl` and the bits a token `bpc` are added, for `valid_loss`
        `valid_ppl` and `valid_bpc`, and so on. A value may be a tensor.
        """
        values = {name: v.tolist() if hasattr(v, "tolist") else v for name, v in values.items()}
        for name, value in list(values.items()):
            prefix = name.removesuffix("loss")
            if prefix != name:
                values[f"{prefix}ppl"] = perplexity(value)
                values[f"{prefix}bpc"] = bits(value)
        self._append({"kind": kind, "step": step, **values})
        if self._events is None:
            return
        with self._as_far_as_it_goes():
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("epoch", "batch"):
                    self._events.add_scalar(f"{kind}/{name}", value, step)
            if kind == "switch":
                self._events.add_text("switch", "averaging starts", step)

    def _append(self, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            with self._as_far_as_it_goes():
                text = json.dumps(values, default=str)
                # JSON has no number that is not finite.
                values = json.loads(text, parse_constant=lambda number: None)
                self._file.write(f"{json.dumps(values, ensure_ascii=False)}\n")

    @contextlib.contextmanager
    def _as_far_as_it_goes(self) -> Iterator[None]:
        """After a failed write, print a message and write no more: the run continues."""
        try:
            yield
        except OSError as error:
            print(f"Cannot write to {self.folder} ({error.strerror or error}): going on without it")
            self.close()

    def close(self) -> None:
        """Close the files."""
        for file in (self._file, self._events):
            # The failed write was already reported.
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
        self._file = self._events = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; the last line of a run is skipped if it was cut off.

    Raises ToolkitError for a file that holds anything else, and OSError.
    """
    with opened(path) as file:
        lines = file.read().splitlines()
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            # The run was killed or is still writing; the next run begins with its command.
            if len(lines) > 1 and (number == len(lines) or lines[number].startswith(b'{"command"')):
                continue
            found = None
        if not isinstance(found, dict):
            raise ToolkitError(
                f"line {number} of {path} is not a JSON object: name a run's --logdir"
            )
        objects.append(found)
    return objects
