"""Faster forms of the definitions, each used only where it agrees with its definition.

A module of this package has one form: a subclass of the definition's class with the same
constructor, state and calls, and `compare(like)`, which yields the results of the form and those of
the definition on the device and in the dtype of `like`. No definition imports this package.

A comparison of results sees only what a small example does. So REPLACED also has a digest of the
source of the methods that a form replaces: where one of them was edited, the definition runs.
"""

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qrnn import QRNNLayer, check, forget_mult

# The module of the form, and its class, by the class of the definition. Names, so that a script
# that samples imports no training.
FORMS = {
    "weight_drop.WeightDrop": "fast.weight_drop.FastWeightDrop",
    "torch.nn.modules.linear.Linear": "fast.linear.FastLinear",
    "splitcross.SplitCrossEntropyLoss": "fast.splitcross.FastSplitCrossEntropyLoss",
    "nt_asgd.NTASGD": "fast.nt_asgd.FastNTASGD",
    "dynamic_evaluation.DynamicEvaluation": "fast.dynamic_evaluation.FastDynamicEvaluation",
    "training.TrainingStep": "fast.step.FastStep",
}
GPU_FORMS = {
    "model.LSTM": "fast.cudnn.FastLSTM",
    "model.GRU": "fast.cudnn.FastGRU",
    "model.QRNN": "fast.qrnn.FastQRNN",
}
# On a CPU in bfloat16.
BF16_FORMS = {"model.LSTM": "fast.rnn_bf16.FastLSTM", "model.GRU": "fast.rnn_bf16.FastGRU"}

# By form: a digest of the source of all methods of the definition that it replaces.
# tests/test_fast.py prints them anew after an edit of ours.
REPLACED: dict[str, str] = {
    "fast.weight_drop.FastWeightDrop": "e71365ca",
    "fast.splitcross.FastSplitCrossEntropyLoss": "71cbae4f",
    "fast.nt_asgd.FastNTASGD": "5ce778e6",
    "fast.dynamic_evaluation.FastDynamicEvaluation": "aace9a5c",
    "fast.step.FastStep": "f621b94f",
    "fast.qrnn.FastQRNN": "abe384c2",
    "fast.cuda_graphs.GraphedStep": "04629662",
}


def choose(
    network: nn.Module,
    *others: Any,
    plain: bool = False,
    bf16: bool = False,
    leave_out: Collection[str] = (),
) -> list[str]:
    """Give each part of `network` and each of `others` whose class has a form that form's class.

    `others` are an optimiser or a step. An object of another class, a subclass too, keeps its own
    code; with `plain` every object does. `bf16` says that the network computes in bfloat16, and
    `leave_out` names modules of this package to be left out. Returns one line about the forms in
    use, and one for each that does not agree with its definition.
    """
    like = next(network.parameters()).detach()
    cells = GPU_FORMS if like.is_cuda else BF16_FORMS if bf16 else {}
    used, problems = [], []
    for part in (*network.modules(), *others):
        if isinstance(part, QRNNLayer):
            part.plain = plain
        name = f"{type(part).__module__}.{type(part).__qualname__}"
        form = "" if plain else FORMS.get(name) or cells.get(name)
        if not form or form.split(".")[1] in leave_out:
            continue
        problem = _problem(form, like.device, like.dtype, bf16)
        if problem:
            problems.append(problem)
        else:
            module, _, kind = form.rpartition(".")
            part.__class__ = getattr(importlib.import_module(module), kind)
            used.append(module)
    if plain:
        return ["Definitions only (--plain)"]
    if any(isinstance(part, QRNNLayer) for part in network.modules()):
        # The layers choose for themselves; chosen now, the way is known before a graph is recorded.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            way = forget_mult.way_for(like.to(torch.bfloat16) if bf16 else like)
        problems += [str(warning.message) for warning in caught]
        used.append(way.__name__)
    names = ", ".join(dict.fromkeys(used)) or "none"
    return [f"Faster forms, equal to their definitions: {names}", *dict.fromkeys(problems)]


def record_steps(step: Any, say: Callable[[str], None] = print) -> str:
    """Make a FastStep record CUDA graphs and replay them; the reason in a sentence if it cannot.

    `say` gets a message if that fails later.
    """
    from fast import cuda_graphs

    if type(step) is not cuda_graphs.FastStep:
        return "CUDA graphs are off: the step is not fast/step.py's"
    if isinstance(step.network, DistributedDataParallel):
        return "CUDA graphs are off: several processes share the batch"
    if len(getattr(step.network.criterion, "splits", ())) > 1:
        return (
            "CUDA graphs are off: the split softmax works on as many rows as a batch has rare words"
        )
    like = step.params[0].detach()
    problem = _problem("fast.cuda_graphs.GraphedStep", like.device, like.dtype, False)
    if not problem:
        step.__class__ = cuda_graphs.GraphedStep
        step.set_up(say)
    return problem


def replaced(form: type) -> tuple[str, str]:
    """The methods of this project's definition that a form replaces, and a digest of their source.

    The digest is empty if there are none.
    """
    fast_kinds = [kind for kind in form.__mro__ if kind.__module__.startswith("fast.")]
    definition = form.__mro__[len(fast_kinds)]
    methods = {
        name: getattr(definition, name, None) for name in set().union(*map(vars, fast_kinds))
    }
    names = sorted(
        name
        for name, method in methods.items()
        if inspect.isfunction(method)
        and not method.__module__.startswith("torch.")
        # PyTorch wraps an optimiser's `step` once more for each class that it first sees.
        and inspect.unwrap(getattr(form, name)) is not inspect.unwrap(method)
    )
    sources = [inspect.unwrap(methods[name]) for name in names]
    return ", ".join(names), check.source_digest(*sources) if names else ""


@functools.cache
def _problem(form: str, device: torch.device, dtype: torch.dtype, bf16: bool) -> str:
    """Why a form is not used, in a sentence; "" if it agrees with its definition."""
    module, _, name = form.rpartition(".")
    place = module.replace(".", "/")
    like = torch.empty(0, device=device, dtype=dtype)
    tolerance = check.TOLERANCE[torch.bfloat16 if bf16 else dtype]
    if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        tolerance = max(tolerance, 2e-3)  # TensorFloat-32 has ten bits

    def compare() -> Iterable[Sequence[Tensor]]:
        own = importlib.import_module(module)
        methods, digest = replaced(getattr(own, name))
        if digest != REPLACED.get(form, ""):
            raise RuntimeError(f"it replaces {methods}, which was edited")
        return own.compare(like)

    cuda = [device] if device.type == "cuda" else []
    # Fixed random numbers; afterwards the generators are as they were.
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(0)
        if cuda:
            torch.cuda.manual_seed(0)
        reason = check.problem(compare, device, tolerance, bf16)
    return reason and f"{place}.py does not do what its definition does ({reason}): it is not used"
