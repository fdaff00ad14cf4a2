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
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import Dictionary
from files.reading import opened
from files.writing import previous, writing
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


def save(
    path: str | os.PathLike[str], checkpoint: Checkpoint, keep: bool = False, own: bool = False
) -> None:
    """Write a model file, as `files.writing.replacing` does.

    Raises CheckpointError if the file could not be read again, and ToolkitError, with the old file
    unchanged, if it cannot be written.
    """
    check_content(vars(checkpoint))
    write(path, {"format": FORMAT, "version": VERSION, **vars(checkpoint)}, keep, own)


def write(
    path: str | os.PathLike[str], content: Any, keep: bool = False, own: bool = False
) -> None:
    """Write a file that `read` reads, as `save` does."""
    with writing(path, "--save", keep, own) as file:
        torch.save(content, file)


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


# Reading


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a model file; its weights are checked by `rebuild`, its training state by `--resume`.

    No code in the file is run. Raises CheckpointError if the file is missing or damaged, or has
    another format or version, and OSError if it cannot be read.
    """
    if not Path(path).is_file():
        kept = f", but {previous(path)} is there" if previous(path).is_file() else ""
        raise CheckpointError(
            f"there is no model file {path}{kept}: train one with main.py, or name one with --save "
            "(generate.py and score.py: --checkpoint)"
        )
    try:
        content = read(path)
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise  # it cannot be opened
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
    fields = {name: content.get(name, {}) for name in Checkpoint.__dataclass_fields__}
    plain = {"stage": str, "epoch": int, "valid_loss": float, "training": dict | None}
    if not all(isinstance(part, plain.get(name, dict)) for name, part in fields.items()):
        raise CheckpointError(f"{path} lacks a part of a model file: train it again with main.py")
    return Checkpoint(**fields)


def read(path: str | os.PathLike[str]) -> Any:
    """A file's content as torch reads it, its tensors mapped, not copied.

    No code in it is run. Raises any error for a damaged file, or one that holds more than its size.
    """
    with opened(path) as file, zipfile.ZipFile(file) as archive:
        size, records = os.fstat(file.fileno()).st_size, archive.infolist()
        # A small file may claim gigabytes: by compressed records, or by records that overlap.
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise zipfile.BadZipFile("a record is compressed")
        if sum(record.file_size for record in records) > size:
            raise zipfile.BadZipFile("the records are larger than the file")
        # torch ignores the checksums.
        if archive.testzip():
            raise zipfile.BadZipFile("a checksum is wrong")
        # Not the path, at which a running main.py may have put a new file.
        same = f"/dev/fd/{file.fileno()}"
        content = torch.load(same, map_location="cpu", weights_only=True, mmap=True)
    # Or by lists within lists, each of them there many times.
    for count, _ in enumerate(parts_of(content)):
        if count > size:
            raise ValueError("a part is there too many times")
    return content


def parts_of(value: Any) -> Iterator[Any]:
    """The value and everything within its dictionaries, lists and tuples, in no certain order."""
    parts = [value]
    while parts:
        part = parts.pop()
        yield part
        if isinstance(part, dict | list | tuple):
            parts.extend(part.values() if isinstance(part, dict) else part)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor within dictionaries, lists and tuples."""
    return (part for part in parts_of(value) if isinstance(part, Tensor))


def in_short(error: Exception) -> str:
    """An error's type and the start of its text, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
