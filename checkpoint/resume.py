"""The training state in a model file, for `--resume`: its fields, and how each is restored.

stage, args       the script, and the flags of the run
data              `fingerprint` of the text it trains on
epoch             the last epoch that has ended
position          the position within the next epoch, None at its start: see run/session.py
model, criterion  the weights in training: the raw ones if the best ones are averages
optimizer         its state; `parameters` has the names of the weights in its order, `settings` the
                  settings of its groups when it was made
valid_losses      the validation losses so far
best_loss, done   the lowest of them, and whether finetuning is over
rng               the generator of sequence lengths
random_states     the global generators of PyTorch, numpy and Python, by rank
stateful          the states of the session's further objects, by name
"""

import contextlib
import copy
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint.model_file import Checkpoint, CheckpointError, in_short
from checkpoint.network import plain_name
from data import Corpus


def check(loaded: Checkpoint, path: str, stage: str) -> None:
    """Raise CheckpointError unless the file `path` has a training state of the script `stage`."""
    found = (loaded.training or {}).get("stage")
    if found != stage:
        other = f"one of {found}" if found else "none at all"
        raise CheckpointError(
            f"{path} holds no training state of {stage} but {other}: resume a file that "
            f"{stage} wrote"
        )


@contextlib.contextmanager
def restoring(path: str) -> Iterator[None]:
    """Turn the errors of a state that does not fit the run into one CheckpointError."""
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be resumed ({in_short(error)}): its model can still be used, and "
            "main.py --init or finetune.py starts a new run from it"
        ) from error


def fingerprint(corpus: Corpus, *parts: str) -> str:
    """A digest of the ids of the `parts`, such as "train", as hex digits, to recognise a text."""
    digest, size = hashlib.blake2b(digest_size=16), 2**24
    for part in parts:
        for first in range(0, len(corpus), size):
            digest.update(corpus.part(part, first, first + size).numpy())
        digest.update(part.encode())
    return digest.hexdigest()


def parameter_names(network: nn.Module, params: Sequence[Tensor]) -> list[str]:
    """The plain names of `params`, weights of a loss.TrainingLoss, in their order.

    Weight drop and torch.compile add parts to a weight's own name.
    """
    names = {id(p): plain_name(name) for name, p in network.named_parameters()}
    return [names[id(p)].removeprefix("model.") for p in params]


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each group of weights, such as its rate."""
    groups = optimizer.param_groups
    return [{name: group[name] for name in group if name != "params"} for group in groups]


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    names: Sequence[str],
    settings: Sequence[Mapping[str, Any]],
) -> None:
    """Load an optimiser's state from the training state `state`.

    `names` are the weights' names in the order of this run, which differs with and without weight
    drop, and `settings` those with which this run's optimiser was made. A setting that differs from
    the one with which the old run's was made takes effect; the others continue as they were saved.
    Raises ValueError if the state is one of other weights.
    """
    saved, before = state["optimizer"], state["parameters"]
    if sorted(before) != sorted(names):
        raise ValueError("its optimiser trains other weights")
    parts = {names.index(before[n]): copy.deepcopy(part) for n, part in saved["state"].items()}
    groups = []
    for mine, theirs, new, old in zip(
        optimizer.state_dict()["param_groups"],
        saved["param_groups"],
        settings,
        state["settings"],
        strict=True,
    ):
        changed = {name: value for name, value in new.items() if value != old.get(name, value)}
        # Settings that an older PyTorch did not have come from the new run.
        groups.append({**mine, **theirs, **changed, "params": mine["params"]})
    optimizer.load_state_dict({**saved, "state": parts, "param_groups": groups})


def load_parts(parts: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Load the states of objects by name; raises ValueError if the names differ."""
    if states.keys() != parts.keys():
        raise ValueError(f"it has states of {sorted(states)}, not of {sorted(parts)}")
    for name, part in parts.items():
        part.load_state_dict(copy.deepcopy(states[name]))


def rng_state(rng: Any) -> list[Any]:
    """The state of a numpy.random.RandomState, or of `numpy.random`, as plain values."""
    name, key, *rest = rng.get_state()
    return [name, key.tolist(), *rest]


def random_states() -> dict[str, Any]:
    """The states of the global generators: of PyTorch, CPU and CUDA, of numpy, of Python."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy = rng_state(np.random)
    return {"cpu": torch.get_rng_state(), "cuda": cuda, "numpy": numpy, "python": random.getstate()}


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore `random_states`, for CUDA only if this machine has as many devices."""
    np.random.set_state(states["numpy"])  # noqa: NPY002
    random.setstate(states["python"])
    torch.set_rng_state(states["cpu"].clone())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.clone() for state in states["cuda"]])
