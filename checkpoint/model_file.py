"""The model file that every stage reads and writes, and nothing else that touches the disk for it.

A file is one dictionary of tensors and plain values; it loads with `torch.load(weights_only=True)`:

    format, version   what it is
    config            the arguments of RNNModel, and the splits of the softmax
    model, criterion  the best weights so far, what the later stages use
    vocabulary        the words by id, and how often each occurred
    args, stage       the flags it was trained with, and the script that wrote it
    epoch, valid_loss when the best weights were found, and their validation loss in nats; 0 and
                      infinity before the first epoch has ended
    training          what to go on from, or None: see `training_state`
"""

import dataclasses
import hashlib
import math
import os
import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cli.signals import Stopped
from data import Dictionary
from model import RNNModel
from nt_asgd import NonMonotonicTrigger
from splitcross import SplitCrossEntropyLoss
from training import engine
from training.parallel import Ranks
from utils import ToolkitError, replacing, rng_state, set_rng_state, unwritable

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
    return _copies(module.state_dict())


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU; those that share memory still do."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    state = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in copies or not tensor.numel():
            copies[key] = tensor.detach().to("cpu", copy=True)
        state[name] = copies[key]
    return state


def same_file(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one place."""
    return os.path.realpath(path) == os.path.realpath(other)


def in_memory(checkpoint: Checkpoint) -> Checkpoint:
    """A file's model, without its training state, that stays when the file is written over."""
    copies = {name: _copies(getattr(checkpoint, name)) for name in ("model", "criterion")}
    return dataclasses.replace(checkpoint, **copies, training=None)


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
        raise _cannot_write(path, error) from error


def _cannot_write(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    cause: BaseException | None = error
    # torch's writer, which has more to write as it ends, hides what the system said.
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    reason = getattr(cause, "strerror", None) or _first_line(error)
    return CheckpointError(
        f"cannot write {path} ({reason}): the old file, if any, is unchanged; free the disk or "
        "pass another --save"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
        content = _content(path)
    except PermissionError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}): let yourself read it, or name another file"
        ) from error
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
        # Files from before there was a stage in it: good for all but going on.
        if checkpoint.training is not None and "stage" not in checkpoint.training:
            checkpoint.training = None
        problem = _problem(checkpoint)
    # What reading fields of a wrong type, or sizes beyond any memory, can raise.
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        RuntimeError,
        OverflowError,
        MemoryError,
    ) as error:
        problem = f"{type(error).__name__}: {_first_line(error)}"
    if problem:
        raise CheckpointError(f"{path} is damaged ({problem}): train it again with main.py")
    return checkpoint


def _content(path: str | os.PathLike[str]) -> Any:
    """What torch reads from a file, without copying its tensors; raises whatever torch raises."""
    while True:
        before = _stamp(path)
        try:
            # What torch says of odd bytes by the way is no help to the user.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:
            if _stamp(path) == before:
                raise
        else:
            if _stamp(path) == before:
                return content
        # torch opens the path twice, for the index and for the tensors. A run has put a new file
        # there meanwhile, so that the one was of the old file and the other of the new.


def _stamp(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """What differs once a file has been replaced or rewritten."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _NoInitialWeights(TorchFunctionMode):
    """Within this context nothing is drawn: most of the time it takes to make a large model."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Those of Tensor and those of torch.nn.init.
        if func.__name__ in ("uniform_", "normal_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def rebuild(
    checkpoint: Checkpoint, device: torch.device, **dropouts: float
) -> tuple[RNNModel, SplitCrossEntropyLoss]:
    """The model and criterion of a file, on `device`; `dropouts` override those of the file."""
    config = {**checkpoint.config, **dropouts}
    splits = config.pop("splits")
    with _NoInitialWeights():
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


@dataclass
class Run:
    """The parts of a training run whose state is saved; `stage` is the script's name.

    `data` is `fingerprint` of what it trains on.
    """

    stage: str
    args: dict[str, Any]
    data: str
    model: RNNModel
    criterion: SplitCrossEntropyLoss
    optimizer: torch.optim.Optimizer
    trigger: NonMonotonicTrigger
    rng: np.random.RandomState
    ranks: Ranks


def file_of(run: Run, vocabulary: dict[str, Any], epoch: int, valid_loss: float) -> Checkpoint:
    """A copy of the weights in use, as a model file; `valid_loss` is in nats a token."""
    return Checkpoint(
        config=config_of(run.model, run.criterion),
        model=snapshot(run.model),
        criterion=snapshot(run.criterion),
        vocabulary=vocabulary,
        args=run.args,
        stage=run.stage,
        epoch=epoch,
        valid_loss=valid_loss,
    )


def training_state(
    run: Run, epoch: int, position: engine.Position | None, **more: Any
) -> dict[str, Any]:
    """What a later run needs to go on as if nothing had happened: plain values and tensors.

    `epoch` is the last one that has ended, `position` where the next one stands, None for its
    start; `more` is kept too. The optimiser's tensors are the live ones: write them before the next
    step. To be called by every rank at once; only the first one's result is whole.

    Raises ToolkitError, rather than let it be written over a good state, if a weight or the loss is
    not finite.
    """
    if position is not None:
        engine.check_finite(position, run.optimizer, run.ranks)
    optimizer = run.optimizer.state_dict()
    held = [t for state in optimizer["state"].values() for t in state.values()]
    for tensor in [*run.model.parameters(), *run.criterion.parameters(), *held]:
        if isinstance(tensor, Tensor) and not tensor.isfinite().all():
            raise ToolkitError(
                f"weights are no longer finite after epoch {epoch}, at the rate "
                f"{run.optimizer.param_groups[0]['lr']:g}: lower --lr or set --clip; the saved "
                "model is the last good one"
            )
    return {
        "stage": run.stage,
        "args": run.args,
        "data": run.data,
        "epoch": epoch,
        "position": None if position is None else position.state(run.ranks),
        "model": snapshot(run.model),
        "criterion": snapshot(run.criterion),
        "optimizer": optimizer,
        "valid_losses": list(run.trigger.losses),
        "rng": rng_state(run.rng),
        "random_states": run.ranks.gathered(random_states()),
        **more,
    }


def resume(run: Run, state: Mapping[str, Any]) -> tuple[int, engine.Position | None]:
    """Put a run where `training_state` left one; return that function's `epoch` and `position`.

    The optimiser's weight decay is the new run's, its learning rate the old one's. Weight drop may
    be on in one of the two runs and off in the other.
    """
    device = run.model.encoder.weight.device
    load_state(run.model, state["model"])
    load_state(run.criterion, state["criterion"])
    decays = [group["weight_decay"] for group in run.optimizer.param_groups]
    here = [_plain_name(name) for name, _ in run.model.named_parameters()]
    before = _trained_names(state["model"], here)
    others = range(len(here), len(here) + len(list(run.criterion.parameters())))
    numbers = [*(here.index(name) for name in before), *others]
    states = state["optimizer"]["state"]
    held = {numbers[number]: _copies(tensors) for number, tensors in states.items()}
    run.optimizer.load_state_dict({**state["optimizer"], "state": held})
    for group, decay in zip(run.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    run.trigger.losses = list(state["valid_losses"])
    set_rng_state(run.rng, state["rng"])
    # With another number of processes there is nothing to go on from: they keep their fresh seeds.
    if len(state["random_states"]) == run.ranks.world:
        set_random_states(state["random_states"][run.ranks.rank])
    position = state["position"]
    if position is not None:
        position = engine.Position.from_state(position, device, run.ranks)
    return state["epoch"], position


def load_to_resume(path: str | os.PathLike[str], stage: str) -> Checkpoint:
    """Read a model file whose training state `stage`, a script's name, can go on from.

    Raises CheckpointError for what `load` refuses, and for a file without such a state.
    """
    checkpoint = load(path)
    if checkpoint.training is None:
        raise CheckpointError(
            f"{path} holds no training state of {stage} (it was written by {checkpoint.stage}): "
            f"resume from the file that {stage} wrote"
        )
    if checkpoint.training["stage"] != stage:
        raise CheckpointError(
            f"{path} holds no training state of {stage} but one of "
            f"{checkpoint.training['stage']}: resume it with that script"
        )
    return checkpoint


def saved(stopped: Stopped, path: str | os.PathLike[str]) -> Stopped:
    """The same stop, saying where the state was saved."""
    return Stopped(stopped.signum, f"{stopped}; --resume {path} goes on from here")


def check_same_text(
    tokens: Tensor, training: Mapping[str, Any], folder: str, path: str | os.PathLike[str]
) -> None:
    """Raise CheckpointError if a training state was made on another text than `tokens`.

    Neither its place within an epoch nor its losses, with which new ones are compared, would mean
    anything there.
    """
    if training["data"] != fingerprint(tokens):
        raise CheckpointError(
            f"{path} goes on with another text than that in {folder}: bring back the corpus it was "
            "trained on, or begin on this one with main.py --init, or finetune.py without --resume"
        )


def fingerprint(tokens: Tensor) -> str:
    """What a stream of ids comes to, as hex digits: whether a text is the one trained on so far."""
    return hashlib.blake2b(tokens.numpy().tobytes(), digest_size=16).hexdigest()


def copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy a model file as it is; raises CheckpointError with nothing changed at `target`."""
    try:
        with open(source, "rb") as old, replacing(target) as new:
            shutil.copyfileobj(old, new)
    except OSError as error:
        raise _cannot_write(target, error) from error


def _plain_name(name: str) -> str:
    """A weight's name without what WeightDrop adds to it."""
    return name.replace(".module.", ".").removesuffix("_raw")


def _trained_names(state: Mapping[str, Tensor], names: Collection[str]) -> list[str]:
    """The plain `names` of a model's parameters in the order in which the optimiser numbers them.

    That order is that of the weights `state` it trained: with weight drop another than without.
    """
    return [name for name in map(_plain_name, state) if name in names]


def _problem(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a file's content, if anything."""
    words, counts = checkpoint.vocabulary["words"], checkpoint.vocabulary["counts"]
    config = dict(checkpoint.config)
    splits = config.pop("splits")
    if len(words) != config["ntoken"] or len(set(words)) != len(words) or len(counts) != len(words):
        return "its vocabulary does not fit its configuration"
    if not all(type(word) is str for word in words) or not _whole(counts):
        return "its vocabulary is not one of words and counts"
    sizes = [config[name] for name in ("ntoken", "ninp", "nhid", "nlayers")]
    if not _whole([*sizes, *splits]) or min(sizes) < 1:
        return "a size is not a whole number above 0"
    for name in ("dropout", "dropouth", "dropouti", "dropoute", "wdrop"):
        if not 0 <= config[name] < 1:
            return f"{name} is not in [0, 1)"
    plain = (checkpoint.args, dict), (checkpoint.stage, str), (checkpoint.epoch, int)
    if not all(isinstance(value, kind) for value, kind in plain):
        return "a field has the wrong type"
    if type(checkpoint.valid_loss) is not float or math.isnan(checkpoint.valid_loss):
        return "its validation loss is no number"
    # Before a module is made for each of a trillion layers.
    if config["nlayers"] > len(checkpoint.model):
        return "its weights do not fit its configuration"
    # On the meta device nothing is allocated, however absurd the sizes.
    with torch.device("meta"):
        model = RNNModel(**config)
        criterion = SplitCrossEntropyLoss(model.decoder.in_features, splits)
    if splits and splits[-1] >= config["ntoken"]:
        return "its splits do not fit its vocabulary"
    states = [(model, checkpoint.model), (criterion, checkpoint.criterion)]
    for module, state in states:
        if module.state_dict().keys() != state.keys():
            return "its weights do not fit its configuration"
    training = checkpoint.training
    if training is not None:
        # Their names may be others: the run that goes on may have turned weight drop on or off.
        states += [(model, training["model"]), (criterion, training["criterion"])]
    for module, state in states:
        expected = {_plain_name(name): tensor for name, tensor in module.state_dict().items()}
        if len(state) != len(expected) or expected.keys() != set(map(_plain_name, state)):
            return "its weights do not fit its configuration"
        for name, tensor in state.items():
            problem = _tensor_problem(name, tensor, expected[_plain_name(name)].shape)
            if problem:
                return problem
    return None if training is None else _training_problem(training, model, criterion)


def _whole(numbers: list[int]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _tensor_problem(name: str, tensor: Tensor, shape: torch.Size | tuple[int, ...]) -> str | None:
    if tensor.shape != shape or tensor.dtype != torch.float32:
        return f"{name} has the wrong shape or type"
    # One number shown a trillion times would take no space in the file and forever to read.
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return f"{name} is not stored as a plain tensor"
    if not math.isfinite(tensor.sum().item()) and not tensor.isfinite().all():
        return f"{name} holds numbers that are not finite"
    return None


def _training_problem(
    training: dict[str, Any], model: RNNModel, criterion: SplitCrossEntropyLoss
) -> str | None:
    """What is wrong with a training state, whose weights are good."""
    if type(training["stage"]) is not str or type(training["args"]) is not dict:
        return "its training state has a field of the wrong type"
    more = {"best_loss": float, "done": bool} if training["stage"] == "finetune.py" else {}
    if any(type(training[name]) is not kind for name, kind in more.items()):
        return "its training state has a field of the wrong type"
    if not _whole([training["epoch"]]) or type(training["data"]) is not str:
        return "its training state has a field of the wrong type"
    if not all(type(loss) is float and math.isfinite(loss) for loss in training["valid_losses"]):
        return "its history holds what is no loss"
    shapes = {_plain_name(name): parameter.shape for name, parameter in model.named_parameters()}
    params = [shapes[name] for name in _trained_names(training["model"], shapes)]
    params += [parameter.shape for parameter in criterion.parameters()]
    optimizer = training["optimizer"]
    (group,) = optimizer["param_groups"]
    averaged = group.get("averaged_steps")
    if group["params"] != list(range(len(params))) or not 0 < group["lr"] < math.inf:
        return "its optimiser does not fit its weights"
    if not (averaged is None or _whole([averaged])):
        return "its optimiser does not fit its weights"
    # The optimiser keeps a tensor like each parameter under these names, or none at all.
    if averaged is not None:
        names = {"average"}
    else:
        names = {"exp_avg", "exp_avg_sq"} if "betas" in group else set()
    for number, held in optimizer["state"].items():
        for name in names:
            problem = _tensor_problem(f"the optimiser's {name}", held[name], params[number])
            if problem:
                return problem
        if held.keys() - names - {"step"}:
            return "its optimiser does not fit its weights"
        if "step" in held and (held["step"].numel() != 1 or not held["step"].item() >= 0):
            return "its optimiser's count of steps is no number"
    if averaged is not None and len(optimizer["state"]) != len(params):
        return "its optimiser does not fit its weights"
    # Tried on generators of their own.
    set_rng_state(np.random.RandomState(), training["rng"])
    for states in training["random_states"]:
        torch.Generator().set_state(states["cpu"].clone())
        if not all(state.dtype == torch.uint8 for state in states["cuda"]):
            return "its random states are damaged"
    return _position_problem(training["position"], model)


def _position_problem(position: dict[str, Any] | None, model: RNNModel) -> str | None:
    """What is wrong with the place within an epoch that a training state holds."""
    if position is None:
        return None
    if not _whole([position[name] for name in ("row", "batches", "since")]):
        return "its place within the epoch is no number"
    if not all(math.isfinite(position[name]) for name in ("total", "interval")):
        return "its place within the epoch is no number"
    if position["hidden"] is None:
        return None if position["row"] == 0 else "its hidden state is missing"
    columns = None
    if len(position["hidden"]) != model.nlayers:
        return "its hidden state does not fit its configuration"
    for state, size in zip(position["hidden"], model.layer_sizes, strict=True):
        parts = state if model.rnn_type == "LSTM" else (state,)
        if len(parts) != (2 if model.rnn_type == "LSTM" else 1):
            return "its hidden state does not fit its configuration"
        for part in parts:
            columns = part.size(1) if columns is None else columns
            problem = _tensor_problem("its hidden state", part, (1, columns, size))
            if problem:
                return problem
    layers = model.rnns if model.rnn_type == "QRNN" else []
    for inputs, layer in zip(position["kept"], layers, strict=True):
        if (inputs is None) != (layer.window == 1):
            return "the inputs it keeps do not fit its configuration"
        if inputs is not None:
            shape = (layer.window - 1, columns, layer.input_size)
            problem = _tensor_problem("the inputs it keeps", inputs, shape)
            if problem:
                return problem
    return None
