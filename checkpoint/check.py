"""The checks of a model file: its configuration, vocabulary and weights.

The training state is checked when a run is resumed, in training/resume.py.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint.parts import plain_name, skeleton
from model import DROPOUTS

# The errors that fields of a wrong type, or sizes beyond any memory, can raise.
DAMAGE = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError)


def check_whole(content: Any, places: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError unless each tensor of a mapped file is one whole record of data.

    `places` are the first byte and the size of every record, by name. A tensor larger than its
    record would read on into the next record.
    """
    storages = {t.data_ptr(): t for t in map(Tensor.untyped_storage, tensors_of(content)) if len(t)}
    mapped = sorted((begin, len(storage)) for begin, storage in storages.items())
    stored = sorted(place for name, place in places.items() if "/data/" in name and place[1])
    offset = mapped[0][0] - stored[0][0]
    if mapped != [(begin + offset, size) for begin, size in stored]:
        raise ValueError("its tensors do not match its records")


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor within dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, dict | list | tuple)
    return [tensor for part in parts for tensor in tensors_of(part)] if nested else []


def problem_of(content: Mapping[str, Any]) -> str | None:
    """The fault in a file's content, or None; damaged content may also raise any error."""
    config, vocabulary = content["config"], content["vocabulary"]
    words, counts = vocabulary["words"], vocabulary["counts"]
    if len(words) != config["ntoken"] or len(set(words)) != len(words) or len(counts) != len(words):
        return "its vocabulary does not fit its configuration"
    # encode() raises ValueError for lone surrogates, which no text holds.
    if not all(type(word) is str and word.encode() for word in words) or not whole(counts):
        return "its vocabulary is not made of words and counts"
    sizes = [config[name] for name in ("ntoken", "ninp", "nhid", "nlayers")]
    if not whole([*sizes, *config["splits"]]) or min(sizes) < 1:
        return "a size is not a whole number above 0"
    for name in DROPOUTS:
        if not 0 <= config.get(name, 0.0) < 1:
            return f"{name} is not in [0, 1)"
    kinds = {"args": dict, "stage": str, "epoch": int, "valid_loss": float}
    if not all(isinstance(content[name], kind) for name, kind in kinds.items()):
        return "a field has the wrong type"
    if math.isnan(content["valid_loss"]):
        return "its validation loss is not a number"
    # Checked first: a file may ask for a trillion layers, and each would become a module.
    if config["nlayers"] > len(content["model"]):
        return "its weights do not fit its configuration"
    if config["splits"] and config["splits"][-1] >= config["ntoken"]:
        return "its splits do not fit its vocabulary"
    return network_problem(config, content["model"], content["criterion"])


def network_problem(config: Mapping[str, Any], *states: Mapping[str, Tensor]) -> str | None:
    """The fault in the `states` of the model and the criterion of a configuration, or None."""
    for module, state in zip(skeleton(config), states, strict=True):
        problem = _names_problem(module.state_dict(), state) or state_problem(module, state)
        if problem:
            return problem
    return None


def told(error: Exception) -> str:
    """An error's type and first line, for a message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def whole(numbers: list[Any]) -> bool:
    """Whether all are whole numbers of 0 or more."""
    return all(type(number) is int and number >= 0 for number in numbers)


def state_problem(module: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """The fault in weights for `module`, or None; names are compared as plain names."""
    expected = {plain_name(name): tensor for name, tensor in module.state_dict().items()}
    # A buffer may hold infinity, such as a mask of attention.
    weights = {plain_name(name) for name, _ in module.named_parameters(remove_duplicate=False)}
    found = {plain_name(name): tensor for name, tensor in state.items()}
    problem = _names_problem(expected, found)
    if problem or len(found) != len(state):
        return problem or "it has a weight twice"
    for name, tensor in state.items():
        plain = plain_name(name)
        like = expected[plain]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            return f"{name} has the wrong shape or type"
        problem = tensor_problem(name, tensor, finite=plain in weights)
        if problem:
            return problem
    return None


def _names_problem(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """The first difference in names; the code may have changed since the file was written."""
    for name in sorted(expected.keys() - found.keys()):
        return f"it lacks {name}, which the model has in this code"
    for name in sorted(found.keys() - expected.keys()):
        return f"it has {name}, which the model lacks in this code"
    return None


def tensor_problem(name: str, tensor: Tensor, finite: bool = True) -> str | None:
    """The fault in a tensor's storage or, if they must be `finite`, its numbers, or None."""
    plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
    # An expanded tensor is tiny on disk but huge in memory.
    if not plain or tensor.untyped_storage().nbytes() < tensor.nbytes:
        return f"{name} is not stored as a plain tensor"
    # The sum is tried first because it needs no second tensor.
    if not finite or not tensor.is_floating_point() or math.isfinite(tensor.sum().item()):
        return None
    return None if tensor.isfinite().all() else f"{name} holds numbers that are not finite"
