"""Comparison of a fast form with its definition on small tensors, without random numbers."""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# The largest distance that rounding explains, by the number type of a computation.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def source_digest(*objects: Any) -> str:
    """A digest of the source of functions or modules, by which an edit of one is noticed."""
    source = "".join(inspect.getsource(part) for part in objects)
    return hashlib.blake2b(source.encode(), digest_size=4).hexdigest()


def numbers(*shape: int, like: Tensor, phase: float = 0.0) -> Tensor:
    """Fixed numbers between -1 and 1, on the device and in the dtype of `like`."""
    angles = torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + phase
    return angles.sin().view(shape).to(like)


def cell_results(cell: nn.Module, like: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Output, states and gradients of a cell of 8 inputs after 5 steps of 3 columns.

    Its parameters become fixed numbers times `scale`.
    """
    with torch.no_grad():
        for p in cell.parameters():
            p.copy_(numbers(*p.shape, like=p) * scale)
    x = numbers(5, 3, 8, like=like).requires_grad_()
    y, state = cell(x, getattr(cell, "module", cell).initial_state(3))
    states = state if isinstance(state, tuple) else (state,)
    loss = y.to(like.dtype).square().sum() + sum(part.sum() for part in states)
    return [y, *states, *torch.autograd.grad(loss, [x, *cell.parameters()])]


def problem(
    compare: Callable[[], Iterable[Sequence[Tensor]]],
    device: torch.device,
    tolerance: float,
    bf16: bool = False,
) -> str:
    """Why the two lists of results of `compare` differ, or its error; "" if they agree.

    With `bf16` they are computed under autocast to bfloat16.
    """
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, torch.bfloat16, bf16, cache_enabled=False),
        ):
            apart = distance(*compare())
    except Exception as error:  # of a kernel, its compiler, or a private function of PyTorch
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"its results differ by {apart:.1e}" if apart > tolerance else ""


def distance(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of the distances of each tensor to the expected one, relative to its norm.

    It is infinite if the tensors differ in number or in shape.
    """
    if [t.shape for t in results] != [t.shape for t in expected]:
        return math.inf
    largest = 0.0
    for tensor, wanted in zip(results, expected, strict=True):
        wanted = wanted.detach().double()
        norm = float((tensor.detach().double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
        largest = max(largest, math.inf if math.isnan(norm) else norm)
    return largest
