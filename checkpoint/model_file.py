"""All disk access for the model file, which every stage reads or writes.

A file is one dictionary of tensors and plain values; it loads with `torch.load(weights_only=True)`:

    format, version   the kind of file and its version
    config            the arguments of `model.make_network`
    model, criterion  the best weights so far, which the later stages use
    loss              further weights of a loss.TrainingLoss that has some
    vocabulary        the arguments of `Dictionary.from_words`: the words by id, how often each
                      occurred, and what main.py was told about them
    args, stage       the flags it was trained with, and the script that wrote it
    epoch, valid_loss the epoch of the best weights, and their validation loss in nats; 0 and
                      infinity before the first epoch has ended
    training          the state for `--resume`, or None: see checkpoint/resume.py
"""

import dataclasses
import io
import os
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from data import Dictionary
from files.reading import opened
from files.writing import replacing, unwritable
from utils import ToolkitError

FORMAT = "awd-lstm-lm"
VERSION = 1
_PLAIN = (int, float, bool, str, type(None))


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
    loss: dict[str, Tensor] = field(default_factory=dict)

    @property
    def dictionary(self) -> Dictionary:
        """The vocabulary the model was trained with."""
        return Dictionary.from_words(**self.vocabulary)


def in_memory(checkpoint: Checkpoint) -> Checkpoint:
    """A copy of a file's model, without the training state; the file can then be overwritten."""
    weights = {name: copies(getattr(checkpoint, name)) for name in ("model", "criterion", "loss")}
    return dataclasses.replace(checkpoint, **weights, training=None)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors on the CPU; tensors that share memory still share it."""
    copied: dict[tuple[int, torch.Size], Tensor] = {}
    state = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in copied or not tensor.numel():
            copied[key] = tensor.detach().to("cpu", copy=True)
        state[name] = copied[key]
    return state


# Writing


def save(path: str | os.PathLike[str], checkpoint: Checkpoint, keep: bool = False) -> None:
    """Write a model file; once it is complete, it replaces the old one in one step.

    With `keep`, the old file is kept with the suffix .previous. Raises CheckpointError, with the
    old file unchanged, if the file cannot be written, or could not be read again.
    """
    # Not dataclasses.asdict(): it would copy every tensor.
    fields = {name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__}
    check_content(fields)
    try:
        with replacing(path, keep) as file:
            torch.save({"format": FORMAT, "version": VERSION, **fields}, file)
    # torch's zip writer raises RuntimeError on a full disk.
    except (OSError, RuntimeError) as error:
        raise _cannot_write(path, error) from error


def check_content(value: Any, place: str = "") -> None:
    """Raise CheckpointError if a part of `value` could be written to a file, but not read again."""
    if type(value) in (dict, OrderedDict):
        for name, part in value.items():
            check_content(name, f"a name in {place}")
            check_content(part, f"{place}.{name}" if place else str(name))
    elif type(value) in (list, tuple):
        for number, part in enumerate(value):
            if type(part) not in _PLAIN:
                check_content(part, f"{place}[{number}]")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except Exception as error:  # of pickle, or of torch, which allows only plain values
            raise CheckpointError(
                f"a model file cannot hold {place}, a {type(value).__qualname__}: make it a "
                "number, a string, a tensor, or a list, tuple or dictionary of them"
            ) from error


def copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy a model file; raises CheckpointError, with `target` unchanged, if that fails."""
    try:
        with open(source, "rb") as old, replacing(target) as new:
            shutil.copyfileobj(old, new)
    except OSError as error:
        raise _cannot_write(target, error) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if `save` could not write `path`; an existing file is not changed."""
    problem = unwritable(path)
    if problem:
        raise CheckpointError(f"cannot write {path} ({problem}): pass another --save")


def _cannot_write(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    cause: BaseException | None = error
    # torch's writer fails again as it closes, which hides the system's error.
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    reason = getattr(cause, "strerror", None) or in_short(error)
    return CheckpointError(
        f"cannot write {path} ({reason}): the old file, if any, is unchanged; free disk space or "
        "pass another --save"
    )


# Reading


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a model file; its weights are checked by `rebuild`, its training state by `--resume`.

    No code in the file is run. Raises CheckpointError if the file is missing or damaged, or has
    another format or version.
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
            f"{path} is no model file of this toolkit, or is damaged: tools/import_original.py "
            "imports the original's"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no model file of this toolkit: tools/import_original.py imports weights"
        )
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('version')} but this toolkit reads {VERSION}: "
            "use the version of the toolkit that wrote the file"
        )
    # Files of earlier commits have no `loss`.
    fields = Checkpoint.__dataclass_fields__.keys() & content.keys()
    return Checkpoint(**{name: content[name] for name in fields})


def _content(path: str | os.PathLike[str]) -> Any:
    """A file's content as torch reads it, its tensors mapped, not copied; raises torch's errors."""
    with opened(path) as file:
        try:
            content = _checked_content(file, path)
        except Exception:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise
        else:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return content
    # A running main.py has replaced the file, which torch opens by its path: read the new one.
    return _content(path)


def _checked_content(file: BinaryIO, path: str | os.PathLike[str]) -> Any:
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise zipfile.BadZipFile("a record is compressed")
        # torch ignores the checksums.
        if archive.testzip():
            raise zipfile.BadZipFile("a checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor within dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


def in_short(error: Exception) -> str:
    """An error's type and the start of its text, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
