"""A network as the tensors of a model file, and back."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from checkpoint.model_file import Checkpoint, CheckpointError, copies, in_short, load
from data import Dictionary
from loss import TrainingLoss, is_frozen
from model import RNNModel, make_network
from splitcross import SplitCrossEntropyLoss


def vocabulary_of(dictionary: Dictionary) -> dict[str, Any]:
    """A dictionary as plain values."""
    counts = [dictionary.counter[i] for i in range(len(dictionary))]
    words = {"words": list(dictionary.idx2word), "counts": counts}
    return {**words, "unk": dictionary.unk, "tokens_are": dictionary.tokens_are}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state on the CPU; weights that are shared stay shared."""
    return copies({_uncompiled(name): part for name, part in module.state_dict().items()})


def further(network: TrainingLoss) -> dict[str, Tensor]:
    """A copy of a network's state beside model, criterion and frozen parts, on the CPU."""
    parts = network.named_children()
    left_out = {name for name, part in parts if name in ("model", "criterion") or is_frozen(part)}
    state = network.state_dict()
    return copies({name: state[name] for name in state if name.split(".")[0] not in left_out})


def load_further(network: TrainingLoss, state: Mapping[str, Tensor]) -> None:
    """Load the result of `further`, if any; raises CheckpointError for another network's."""
    names = further(network).keys()
    if state and names != state.keys():
        raise CheckpointError(
            f"the model file's loss has the weights {sorted(state)}, not {sorted(names)}: use the "
            "code that wrote the file"
        )
    network.load_state_dict(state, strict=False)


def rebuild(
    checkpoint: Checkpoint, device: torch.device, **dropouts: float
) -> tuple[RNNModel, SplitCrossEntropyLoss]:
    """The model and criterion of a file in evaluation, on `device`.

    `dropouts` override those of the file. Training starts with `train()`, as for any module.

    Raises CheckpointError if the weights do not fit the configuration or are not finite.
    """
    states = (checkpoint.model, checkpoint.criterion)
    try:
        with _Undrawn(2**20 + 2 * sum(part.numel() for state in states for part in state.values())):
            modules = make_network(**{**checkpoint.config, **dropouts})
        for module, state in zip(modules, states, strict=True):
            load_state(module, state)
            # With larger ones, the outputs of a layer may not be finite.
            if not all((p.abs() < 1e15).all() for p in module.parameters()):
                raise ValueError("not all weights are finite, and below 1e15")
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(
            f"the weights of the model file do not fit this code or are damaged "
            f"({in_short(error)}): use the code that wrote the file, or train it again"
        ) from error
    return tuple(module.to(device).eval() for module in modules)


def open_model(
    path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[TrainingLoss, Dictionary]:
    """The network of a model file in evaluation, on `device`, and its vocabulary.

    Raises CheckpointError for a file that cannot be used.
    """
    loaded = load(path)
    return scoring_network(loaded, torch.device(device)), loaded.dictionary


def scoring_network(loaded: Checkpoint, device: torch.device) -> TrainingLoss:
    """The network of a file in evaluation, on `device`, with the loss's own weights if it has any.

    Raises CheckpointError as `rebuild` and `load_further` do.
    """
    network = TrainingLoss(*rebuild(loaded, device)).to(device).eval()
    # Weights of a loss that this code does not make are for training alone.
    if further(network):
        load_further(network, loaded.loss)
    return network


def check_readable(written: Checkpoint) -> None:
    """Raise CheckpointError if `rebuild` could not make the network of a snapshot again."""
    try:
        rebuild(written, torch.device("cpu"))
    except CheckpointError as error:
        raise CheckpointError(
            f"a model file of this network could not be read ({error}): make the network in "
            "model.make_network, from the arguments in main.begin"
        ) from error


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights; weight drop may have been on or off when they were saved.

    Raises RuntimeError if other weights are missing or too many, or have other sizes.
    """
    own = {plain_name(name): name for name in module.state_dict()}
    module.load_state_dict({own.get(plain_name(name), name): state[name] for name in state})


def plain_name(name: str) -> str:
    """A weight's name without the parts that WeightDrop and torch.compile add."""
    return _uncompiled(name).replace(".module.", ".").removesuffix("_raw")


def _uncompiled(name: str) -> str:
    return name.replace("_orig_mod.", "")


class _Undrawn(TorchFunctionMode):
    """A context in which weights start at 0: drawing takes most of a large model's set-up.

    Raises ValueError as soon as there are more than `room` numbers in all weights.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Tensor's methods and the functions of torch.nn.init.
        if func.__name__ in ("uniform_", "normal_", "kaiming_uniform_"):
            return (args[0] if args else kwargs["tensor"]).data.zero_()
        result = func(*args, **kwargs)
        if func is torch.empty:
            self._room -= result.numel()
            if self._room < 0:
                raise ValueError("the configuration is one of a larger network")
        return result
