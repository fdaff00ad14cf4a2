"""All disk access for the model file, which every stage reads or writes.

A file is one dictionary of tensors and plain values; it loads with `torch.load(weights_only=True)`:

    format, version   the kind of file and its version
    config            the arguments of `model.make_network`
    model, criterion  the best weights so far, which the later stages use
    vocabulary        the words by id, and how often each occurred
    args, stage       the flags it was trained with, and the script that wrote it
    epoch, valid_loss the epoch of the best weights, and their validation loss in nats; 0 and
                      infinity before the first epoch has ended
    training          the state for `--resume`, or None: see training/resume.py
"""

import dataclasses
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.check import DAMAGE, check_whole, network_problem, problem_of, told
from checkpoint.parts import Undrawn, config_of, copies, load_state, snapshot
from data import Dictionary
from files.reading import opened, records
from files.writing import replacing, unwritable
from model import RNNModel, make_network
from splitcross import SplitCrossEntropyLoss
from utils import ToolkitError

FORMAT = "awd-lstm-lm"
VERSION = 1


class CheckpointError(ToolkitError):
    """A model file that cannot be read, written, or used as asked."""


@dataclass
class Checkpoint:
    """The content of a model file; the module's docstring describes the fields."""

    config: dict[str, Any]
    model: dict[str, Tensor]
    criterion: dict[str, Tensor]
    vocabulary: dict[str, Any]
    args: dict[str, Any]
    stage: str
    epoch: int
    valid_loss: float
    training: dict[str, Any] | None = None

    @property
    def dictionary(self) -> Dictionary:
        """The vocabulary the model was trained with."""
        return Dictionary.from_words(self.vocabulary["words"], self.vocabulary["counts"])


def in_memory(checkpoint: Checkpoint) -> Checkpoint:
    """A copy of a file's model, without the training state; the file can then be overwritten."""
    weights = {name: copies(getattr(checkpoint, name)) for name in ("model", "criterion")}
    return dataclasses.replace(checkpoint, **weights, training=None)


def save(path: str | os.PathLike[str], checkpoint: Checkpoint, keep: bool = False) -> None:
    """Write a model file; once it is complete, it replaces the old one in one step.

    With `keep`, the old file is renamed with the suffix .previous. Raises CheckpointError, with the
    old file unchanged, if the file cannot be written.
    """
    # Not dataclasses.asdict(): it would copy every tensor.
    fields = {name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__}
    try:
        with replacing(path, keep) as file:
            torch.save({"format": FORMAT, "version": VERSION, **fields}, file)
    # torch's zip writer raises RuntimeError on a full disk.
    except (OSError, RuntimeError) as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    cause: BaseException | None = error
    # torch's writer fails again as it closes, which hides the system's error.
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    reason = getattr(cause, "strerror", None) or told(error)
    return CheckpointError(
        f"cannot write {path} ({reason}): the old file, if any, is unchanged; free disk space or "
        "pass another --save"
    )


def check_readable(model: RNNModel, criterion: SplitCrossEntropyLoss) -> None:
    """Raise CheckpointError if `load` would refuse a file of this network, before it is trained."""
    config = config_of(model, criterion)
    problem = network_problem(config, snapshot(model), snapshot(criterion))
    if problem:
        raise CheckpointError(
            f"a model file of this network could not be read ({problem}): make the network in "
            "model.make_network, from arguments that are attributes of the model"
        )


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if `save` could not write `path`; an existing file is not changed."""
    problem = unwritable(path)
    if problem:
        raise CheckpointError(f"cannot write {path} ({problem}): pass another --save")


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a model file and check that it holds a model; the training state is not checked.

    No code in the file is run. Raises CheckpointError if the file is missing or damaged, has
    another format or version, or has weights that do not fit its configuration or are not finite.
    """
    if not Path(path).is_file():
        raise CheckpointError(
            f"there is no model file {path}: train one with main.py, or name one with --save "
            "(generate.py: --checkpoint)"
        )
    try:
        content = _content(path)
    except PermissionError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}): change its permissions, or name another file"
        ) from error
    except Exception as error:
        # torch.load raises many kinds of error; each means a foreign or damaged file.
        raise CheckpointError(
            f"{path} is no model file of this toolkit, or is damaged: train it again with main.py"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no model file of this toolkit: train one with main.py")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('version')} but this toolkit reads {VERSION}: "
            "use the version of the toolkit that wrote the file"
        )
    fields = {name: content.get(name) for name in Checkpoint.__dataclass_fields__}
    try:
        problem = problem_of(fields)
    except (*DAMAGE, MemoryError) as error:
        problem = told(error)
    if problem:
        raise CheckpointError(f"{path} is damaged ({problem}): train it again with main.py")
    return Checkpoint(**fields)


def _content(path: str | os.PathLike[str]) -> Any:
    """A file's content as torch reads it, its tensors mapped, not copied; raises torch's errors."""
    while True:
        before = _stamp(path)
        try:
            # torch's warnings about odd bytes do not help the user.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with opened(path) as file:
                    places = records(file)
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            check_whole(content, places)
        except Exception:
            if _stamp(path) == before:
                raise
        else:
            if _stamp(path) == before:
                return content
        # Another run replaced the file meanwhile. torch opens the path twice, so it may have read
        # the index of the old file and the tensors of the new one: read again.


def _stamp(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Numbers that change when a file is replaced or rewritten."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy a model file; raises CheckpointError, with `target` unchanged, if that fails."""
    try:
        with open(source, "rb") as old, replacing(target) as new:
            shutil.copyfileobj(old, new)
    except OSError as error:
        raise _cannot_write(target, error) from error


def rebuild(
    checkpoint: Checkpoint, device: torch.device, **dropouts: float
) -> tuple[RNNModel, SplitCrossEntropyLoss]:
    """The model and criterion of a file, on `device`; `dropouts` override those of the file."""
    with Undrawn():
        model, criterion = make_network(**{**checkpoint.config, **dropouts})
    load_state(model, checkpoint.model)
    load_state(criterion, checkpoint.criterion)
    return model.to(device), criterion.to(device)
