"""The training state in a model file, for `--resume`: written, checked and restored.

stage, args       the script, and the flags of the run
data              `fingerprint` of the text it trains on
epoch             the last epoch that has ended
position          the position within the next epoch, None at its start: see training/step.py
model, criterion  the weights in training: the raw ones if the best ones are averages
optimizer         its state; `parameters` has the names of the weights in its order
valid_losses      the validation losses so far
best_loss, done   the lowest of them, and whether finetuning is over
rng               the generator of sequence lengths
random_states     PyTorch's generators, by rank
stateful          the states of the session's further objects, by name
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import checkpoint
from checkpoint import Checkpoint, CheckpointError, plain_name
from checkpoint.check import DAMAGE, state_problem, tensor_problem, tensors_of, told, whole
from cli import resuming
from cli.parser import Parser
from data import Corpus
from utils import map_state

if TYPE_CHECKING:
    from training.session import Session


def training_state(session: Session) -> dict[str, Any]:
    """Everything that `restore` needs: plain values and tensors.

    The optimiser's tensors are not copied: write them before the next step. Every rank must call
    this at once; only the first rank's result is complete.

    Raises ToolkitError if a weight, the loss, or the loss of the next batch is not finite, so that
    such a state never replaces a good one.
    """
    position = session.step.position() if session.underway else None
    if session.underway:
        session.check_loss()
    optimizer = session.optimizer.state_dict()
    for tensor in [*session.step.params, *tensors_of(optimizer["state"])]:
        if not tensor.isfinite().all():
            raise session.diverged(f"weights are no longer finite after epoch {session.finished}")
    # Weights can be finite and so large that no rate recovers from them.
    loss = session.ranks.total(session.step.next_loss())
    if not math.isfinite(loss):
        raise session.diverged(f"the training loss becomes {loss} after epoch {session.finished}")
    return {
        "stage": session.stage,
        "args": session.flags,
        "data": session.fingerprint,
        "epoch": session.finished,
        "position": position,
        "model": checkpoint.snapshot(session.model),
        "criterion": checkpoint.snapshot(session.criterion),
        "optimizer": optimizer,
        "parameters": _parameter_names(session),
        "valid_losses": list(session.trigger.losses),
        "best_loss": session.best_loss,
        "done": session.done,
        "rng": _rng_state(session.rng),
        "random_states": session.ranks.gathered(_random_states()),
        "stateful": {name: part.state_dict() for name, part in session.stateful.items()},
    }


def read(args: argparse.Namespace, parser: Parser, stage: str) -> Checkpoint:
    """The model file of --resume, for the script `stage`; its flags go into `args`.

    Raises ToolkitError if there is no such file, if its training state is another script's or is
    damaged, or if a flag would make it a different run.
    """
    path = args.resume
    loaded = checkpoint.load(path)
    training = loaded.training
    # Older files lack `stage`: usable, but not resumable.
    if training is None or "stage" not in training:
        raise CheckpointError(
            f"{path} holds no training state of {stage} (it was written by {loaded.stage}): resume "
            f"from the file that {stage} wrote"
        )
    if training["stage"] != stage:
        raise CheckpointError(
            f"{path} holds no training state of {stage} but one of {training['stage']}: resume it "
            "with that script"
        )
    try:
        problem = _problem(loaded)
    except DAMAGE as error:
        problem = told(error)
    if problem:
        raise _cannot_resume(path, problem)
    resuming.check_architecture(args, loaded.config, path)
    resuming.resume_flags(args, parser, training, path)
    if "save" not in args.given:
        args.save = path
    return loaded


def restore(session: Session, loaded: Checkpoint, path: str) -> Mapping[str, Any] | None:
    """Restore a session from the file `loaded` of its run; return the position in the epoch.

    The weight decay is the new run's, the learning rate the old run's. Weight drop may be on in one
    of the two runs and off in the other. Raises CheckpointError for another text, and for a state
    that the model or the optimiser does not accept.
    """
    state = loaded.training
    ranks = session.ranks
    if ranks.decided(state["data"] != session.fingerprint):
        raise CheckpointError(
            f"{path} goes on with another text than that in {session.args.data}: bring back the "
            "corpus it was trained on, or start a new run on this one with main.py --init, or with "
            "finetune.py without --resume"
        )
    try:
        checkpoint.load_state(session.model, state["model"])
        checkpoint.load_state(session.criterion, state["criterion"])
        _restore_optimizer(session, state)
        _set_rng_state(session.rng, state["rng"])
        _restore_stateful(session, state.get("stateful", {}))
        # With another number of processes no saved states fit: the ranks keep fresh seeds.
        if len(state["random_states"]) == session.ranks.world:
            _set_random_states(state["random_states"][session.ranks.rank])
        position = _position(session, state["position"])
    except torch.OutOfMemoryError:
        raise
    except DAMAGE as error:
        raise _cannot_resume(path, told(error)) from error
    session.finished = state["epoch"]
    session.trigger.losses = list(state["valid_losses"])
    session.best_loss = state.get("best_loss", loaded.valid_loss)
    session.done = state.get("done", False)
    return position


def fingerprint(corpus: Corpus) -> str:
    """A digest of the ids of train.txt, as hex digits, to recognise the text of a run."""
    digest, size = hashlib.blake2b(digest_size=16), 2**24
    for first in range(0, len(corpus), size):
        digest.update(corpus.part("train", first, first + size).numpy())
    return digest.hexdigest()


def _cannot_resume(path: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be resumed ({problem}): its model can still be used, and main.py --init or "
        "finetune.py starts a new run from it"
    )


def _problem(loaded: Checkpoint) -> str | None:
    """The fault in a training state that can be found before the run continues, or None."""
    training = loaded.training
    kinds = {"args": dict, "data": str, "epoch": int, "rng": str, "valid_losses": list}
    typed = all(isinstance(training[name], kind) for name, kind in kinds.items())
    if not typed or not whole([training["epoch"]]):
        return "its training state has a field of the wrong type"
    losses = [*training["valid_losses"], training.get("best_loss", 0.0)]
    if not all(type(loss) is float and not math.isnan(loss) for loss in losses):
        return "its history holds something that is no loss"
    modules = checkpoint.skeleton(loaded.config)
    for module, name in zip(modules, ("model", "criterion"), strict=True):
        problem = state_problem(module, training[name])
        if problem:
            return problem
    for name in ("optimizer", "position"):
        for tensor in tensors_of(training[name]):
            problem = tensor_problem(f"a tensor of its {name}", tensor, name == "optimizer")
            if problem:
                return problem
    return None


# The optimiser


def _parameter_names(session: Session) -> list[str]:
    """The plain names of the trained weights, in the optimiser's order."""
    named = [
        *((plain_name(name), p) for name, p in session.model.named_parameters()),
        *((f"criterion.{name}", p) for name, p in session.criterion.named_parameters()),
    ]
    names = {id(p): name for name, p in named}
    return [names[id(p)] for p in session.step.params]


def _restore_optimizer(session: Session, state: Mapping[str, Any]) -> None:
    """Load the optimiser's state; raises ValueError if it does not fit the weights.

    The state numbers the weights in the order of the state dict, which differs with and without
    weight drop.
    """
    optimizer, saved = session.optimizer, state["optimizer"]
    here = _parameter_names(session)
    before = state.get("parameters")
    if before is None:
        # Older files: the model's weights in the order of its state dict, then the criterion's.
        before = [name for name in map(plain_name, state["model"]) if name in here]
        before += here[len(before) :]
    if sorted(before) != sorted(here):
        raise ValueError("its optimiser trains other weights")
    held = {here.index(before[n]): copy.deepcopy(parts) for n, parts in saved["state"].items()}
    own, groups = optimizer.state_dict()["param_groups"], []
    for mine, theirs in zip(own, saved["param_groups"], strict=True):
        # Settings that an older PyTorch did not have come from the new run, too.
        names = ("params", "weight_decay", "capturable")
        new = {name: mine[name] for name in names if name in mine}
        groups.append({**mine, **theirs, **new})
        numbers = [value for value in theirs.values() if isinstance(value, float)]
        if not all(map(math.isfinite, numbers)) or theirs["lr"] < 0:
            raise ValueError("its optimiser has a setting that is no number")
    optimizer.load_state_dict({**saved, "state": held, "param_groups": groups})


def _restore_stateful(session: Session, states: Mapping[str, Any]) -> None:
    if states.keys() != session.stateful.keys():
        raise ValueError(f"it has states of {sorted(states)}, not of {sorted(session.stateful)}")
    for name, part in session.stateful.items():
        part.load_state_dict(copy.deepcopy(states[name]))


# The position within an epoch, and random numbers


def _position(session: Session, position: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The position within an epoch, if its numbers and hidden state fit the model."""
    if position is None or position["hidden"] is None:
        return None
    counted = whole([position[name] for name in ("row", "batches", "since")])
    if not counted or not all(math.isfinite(position[name]) for name in ("total", "interval")):
        raise ValueError("its place within the epoch is no number")
    hidden = position["hidden"]
    if any(inputs is not None for inputs in position.get("kept", ())):
        # Older files keep a QRNN's last inputs beside its state.
        pairs = zip(hidden, position["kept"], strict=True)
        hidden = [state if inputs is None else (state, inputs) for state, inputs in pairs]

    def same(part: Tensor, expected: Tensor) -> Tensor:
        if part.shape != expected.shape or part.dtype != expected.dtype:
            raise ValueError("its hidden state does not fit its configuration")
        return part

    hidden = map_state(same, hidden, session.model.init_hidden(session.args.batch_size))
    return {**position, "hidden": hidden}


def _rng_state(rng: np.random.RandomState) -> str:
    """The state of a generator of sequence lengths as text."""
    name, key, *rest = rng.get_state()
    return json.dumps([name, key.tolist(), *rest])


def _set_rng_state(rng: np.random.RandomState, state: str) -> None:
    """Restore the result of `_rng_state`; raises ValueError for anything else."""
    name, key, position, *rest = json.loads(state)
    # numpy checks neither: with a bad position it reads beyond its memory, with a key of zeros
    # it never ends.
    if type(position) is not int or not 0 <= position <= 624 or not any(key):
        raise ValueError("its generator of sequence lengths is damaged")
    rng.set_state((name, np.array(key, dtype=np.uint32), position, *rest))


def _random_states() -> dict[str, Any]:
    """The states of PyTorch's generators, CPU and CUDA."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_states(states: Mapping[str, Any]) -> None:
    """Restore `_random_states`, for CUDA only if this machine has as many devices."""
    torch.set_rng_state(states["cpu"].clone())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.clone() for state in states["cuda"]])
