"""Comparison of a fast form with its definition on small tensors, without random numbers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# The largest distance that rounding explains, by the number type of a computation.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def numbers(*shape: int, like: Tensor, phase: float = 0.0) -> Tensor:
    """Fixed numbers between -1 and 1, on the device and in the dtype of `like`."""
    angles = torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + phase
    return angles.sin().view(shape).to(like)


def cell_results(cell: nn.Module, state: Any, like: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Output, states and gradients of a cell of 8 inputs after 5 steps of 3 columns.

    Its parameters become fixed numbers times `scale`; `state` is the initial one.
    """
    with torch.no_grad():
        for p in cell.parameters():
            p.copy_(numbers(*p.shape, like=p) * scale)
    x = numbers(5, 3, 8, like=like).requires_grad_()
    y, state = cell(x, state)
    states = state if isinstance(state, tuple) else (state,)
    loss = y.to(like.dtype).square().sum() + sum(part.sum() for part in states)
    return [y, *states, *torch.autograd.grad(loss, [x, *cell.parameters()])]


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
