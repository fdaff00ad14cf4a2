"""The model file that every stage reads and writes, and nothing else that touches the disk for it.

A file is one dictionary of tensors and plain values; it loads with `torch.load(weights_only=True)`:

    format, version   what it is
    config            the arguments of RNNModel, and the splits of the softmax
    model, criterion  the best weights so far, what the later stages use
    vocabulary        the words by id, and how often each occurred
    args, stage       the flags it was trained with, and the script that wrote it
    epoch, valid_loss when the best weights were found, and their validation loss in nats
    training          raw weights, optimiser, history and random states to go on from; or None
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import Dictionary
from model import RNNModel
from splitcross import SplitCrossEntropyLoss
from utils import ToolkitError, replacing, unwritable

FORMAT = "awd-lstm-lm"
VERSION = 1

State = dict[str, Tensor]


class CheckpointError(ToolkitError):
    """A model file that cannot be read or written."""


@dataclass
class Checkpoint:
    """What a model file holds; the fields are described at the head of this module."""

    config: dict[str, Any]
    model: State
    criterion: State
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


def config_of(model: RNNModel, criterion: SplitCrossEntropyLoss) -> dict[str, Any]:
    """What it takes to rebuild the two: the arguments of RNNModel, and `splits`."""
    sizes = ["rnn_type", "ninp", "nhid", "nlayers", "tie_weights"]
    dropouts = ["dropout", "dropouth", "dropouti", "dropoute", "wdrop"]
    config = {name: getattr(model, name) for name in sizes + dropouts}
    return {"ntoken": model.encoder.num_embeddings, **config, "splits": criterion.splits[1:]}


def vocabulary_of(dictionary: Dictionary) -> dict[str, Any]:
    """A dictionary as plain values."""
    counts = [dictionary.counter[i] for i in range(len(dictionary))]
    return {"words": list(dictionary.idx2word), "counts": counts}


def snapshot(module: nn.Module) -> State:
    """A copy of a module's state on the CPU; weights that are shared stay shared."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    state = {}
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in copies or not tensor.numel():
            copies[key] = tensor.detach().to("cpu", copy=True)
        state[name] = copies[key]
    return state


def save(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a model file; the old one is replaced at once and only when the new one is whole.

    Raises CheckpointError, with the old file untouched, if the file cannot be written.
    """
    # Not dataclasses.asdict(): it would copy every tensor.
    fields = {name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__}
    try:
        with replacing(path) as file:
            torch.save({"format": FORMAT, "version": VERSION, **fields}, file)
    # A full disk reaches us as RuntimeError when it is torch's zip writer that meets it.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"cannot write {path} ({reason}): the old file, if any, is unchanged; free the disk or "
            "pass another --save"
        ) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if `save` could not write `path`; a file that is there is kept."""
    problem = unwritable(path)
    if problem:
        raise CheckpointError(f"cannot write {path} ({problem}): pass another --save")


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a model file and check that it is whole.

    Nothing in the file is run. Raises CheckpointError for a file that is missing, damaged, of
    another format or version, or whose weights do not fit its configuration or are not finite.
    """
    if not Path(path).is_file():
        raise CheckpointError(
            f"there is no model file {path}: train one with main.py, or name one with --save "
            "(generate.py: --checkpoint)"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # torch.load raises many kinds; whichever it is, the file is not one of ours, or not whole.
        raise CheckpointError(
            f"{path} is no model file of this toolkit, or is damaged: train it again with main.py"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no model file of this toolkit: train one with main.py")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('version')} and this toolkit reads {VERSION}: "
            "use the version of the toolkit that wrote it"
        )
    fields = {name: content.get(name) for name in Checkpoint.__dataclass_fields__}
    try:
        checkpoint = Checkpoint(**fields)
        problem = _problem(checkpoint)
    # What reading fields of a wrong type, or sizes beyond any memory, can raise.
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if problem:
        raise CheckpointError(f"{path} is damaged ({problem}): train it again with main.py")
    return checkpoint


def rebuild(
    checkpoint: Checkpoint, device: torch.device, **dropouts: float
) -> tuple[RNNModel, SplitCrossEntropyLoss]:
    """The model and criterion of a file, on `device`; `dropouts` override those of the file."""
    config = {**checkpoint.config, **dropouts}
    splits = config.pop("splits")
    model = RNNModel(**config)
    criterion = SplitCrossEntropyLoss(model.decoder.in_features, splits)
    load_state(model, checkpoint.model)
    load_state(criterion, checkpoint.criterion)
    return model.to(device), criterion.to(device)


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights, also where weight drop was on when they were saved and is off now."""
    by_plain_name = {_plain_name(name): tensor for name, tensor in state.items()}
    module.load_state_dict({name: by_plain_name[_plain_name(name)] for name in module.state_dict()})


def random_states() -> dict[str, Any]:
    """The states of PyTorch's generators, CPU and CUDA."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: Mapping[str, Any]) -> None:
    """Go on from `random_states`, as far as this machine has the same devices."""
    torch.set_rng_state(states["cpu"].clone())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.clone() for state in states["cuda"]])


def _plain_name(name: str) -> str:
    """A weight's name without what WeightDrop adds to it."""
    return name.replace(".module.", ".").removesuffix("_raw")


def _problem(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a file's content, if anything."""
    words = checkpoint.vocabulary["words"]
    config = dict(checkpoint.config)
    splits = config.pop("splits")
    if len(words) != config["ntoken"] or len(set(words)) != len(words):
        return "its vocabulary does not fit its configuration"
    # Before a module is made for each of a trillion layers.
    if config["nlayers"] > len(checkpoint.model):
        return "its weights do not fit its configuration"
    # On the meta device nothing is allocated, however absurd the sizes.
    with torch.device("meta"):
        model = RNNModel(**config)
        criterion = SplitCrossEntropyLoss(model.decoder.in_features, splits)
    states = [(model, checkpoint.model), (criterion, checkpoint.criterion)]
    if checkpoint.training is not None:
        states += [
            (model, checkpoint.training["model"]),
            (criterion, checkpoint.training["criterion"]),
        ]
    for module, state in states:
        expected = module.state_dict()
        if expected.keys() != state.keys():
            return "its weights do not fit its configuration"
        for name, tensor in state.items():
            if tensor.shape != expected[name].shape or tensor.dtype != torch.float32:
                return f"{name} has the wrong shape or type"
            if not math.isfinite(tensor.sum().item()) and not tensor.isfinite().all():
                return f"{name} holds numbers that are not finite"
    return None
