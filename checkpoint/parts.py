"""Conversion of a model to the parts of a model file, and back."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data import Dictionary
from model import RNNModel, make_network
from splitcross import SplitCrossEntropyLoss


def config_of(model: RNNModel, criterion: SplitCrossEntropyLoss) -> dict[str, Any]:
    """The arguments of `model.make_network` that make both again, from the attributes of both.

    Every argument of RNNModel, a new one too, is an attribute of the same name.
    """
    config = {name: getattr(model, name) for name in inspect.signature(RNNModel).parameters}
    return {**config, "splits": criterion.splits[1:]}


def vocabulary_of(dictionary: Dictionary) -> dict[str, Any]:
    """A dictionary as plain values."""
    counts = [dictionary.counter[i] for i in range(len(dictionary))]
    return {"words": list(dictionary.idx2word), "counts": counts}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state on the CPU; weights that are shared stay shared."""
    return copies({without_compiled(name): part for name, part in module.state_dict().items()})


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors on the CPU; tensors that share memory still share it."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    state = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in made or not tensor.numel():
            made[key] = tensor.detach().to("cpu", copy=True)
        state[name] = made[key]
    return state


class Undrawn(TorchFunctionMode):
    """A context in which weights start at 0: to draw them takes most of a large model's set-up.

    On the meta device PyTorch would also import its compiler to draw them.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Tensor's methods and the functions of torch.nn.init.
        if func.__name__ in ("uniform_", "normal_", "kaiming_uniform_"):
            return (args[0] if args else kwargs["tensor"]).data.zero_()
        return func(*args, **kwargs)


@contextlib.contextmanager
def sizes_only() -> Iterator[None]:
    """A context in which new modules have the sizes of their weights, but no memory and no values.

    The constructor of a cell fails in it if it needs a value.
    """
    with torch.device("meta"), Undrawn():
        yield


def skeleton(config: Mapping[str, Any]) -> tuple[RNNModel, SplitCrossEntropyLoss]:
    """Model and criterion of a configuration, to compare weights with; without memory if possible.

    Raises any error for a configuration that is damaged.
    """
    try:
        with sizes_only():
            return make_network(**config)
    except Exception:
        # For a cell whose constructor needs values. Other errors are raised again here.
        with Undrawn():
            return make_network(**config)


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights; weight drop may have been on or off when they were saved.

    Raises RuntimeError if other weights are missing or too many, or have other sizes.
    """
    own = {plain_name(name): name for name in module.state_dict()}
    module.load_state_dict({own.get(plain_name(name), name): state[name] for name in state})


def plain_name(name: str) -> str:
    """A weight's name without the parts that WeightDrop and torch.compile add."""
    return without_compiled(name).replace(".module.", ".").removesuffix("_raw")


def without_compiled(name: str) -> str:
    """A weight's name without the part that torch.compile adds."""
    return name.replace("_orig_mod.", "")
