"""The step of nt_asgd.py in one pass over memory, clipping included."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nt_asgd import NTASGD
from qrnn.check import numbers


class FastNTASGD(NTASGD):
    """NTASGD whose step may also scale the gradients, and may be recorded in a CUDA graph.

    While a step is recorded, `averaging_weight` is 1 / number of averaged steps as a tensor, and
    rates are tensors: all numbers stay on the device. Such a step is not counted: call `count`
    before each replay.
    """

    averaging_weight: Tensor | None = None

    def count(self) -> None:
        """Count one step of the average."""
        for group in self.param_groups:
            if group["averaged_steps"] is not None:
                group["averaged_steps"] += 1

    @torch.no_grad()
    def step(self, closure: None = None, *, gradient_scale: Tensor | None = None) -> None:
        """As NTASGD's step on the gradients, times the number `gradient_scale` if it is given."""
        if self.averaging_weight is None:
            self.count()
        for group in self.param_groups:
            params, count = group["params"], group["averaged_steps"]
            trained = [p for p in params if p.grad is not None]
            if trained:
                _descend(trained, group["lr"], group["weight_decay"], gradient_scale)
            if count is None:
                continue
            averages = [self.state[p]["average"] for p in params]
            if self.averaging_weight is None:
                torch._foreach_lerp_(averages, params, 1 / count)
            else:
                for average, p in zip(averages, params, strict=True):
                    average.lerp_(p, self.averaging_weight)


def _descend(params: list[Tensor], lr: float | Tensor, decay: float, scale: Tensor | None) -> None:
    """`p -= lr * (scale * gradient + decay * p)` in one pass.

    If the rate is a tensor, or on a GPU, this also scales the gradients in place.
    """
    grads, divisor = [p.grad for p in params], None
    if scale is not None and params[0].device.type == "cpu" and not isinstance(lr, Tensor):
        factor = float(scale)
        if not factor:
            # The gradient's norm is infinite: the parameters must become nan, not stay.
            torch._foreach_add_(params, grads, alpha=0.0)
            return
        # `grad_scale` would also write the scaled gradients; scaling the factors does not.
        lr, decay = lr * factor, decay / factor
    elif scale is not None:
        divisor = (1 / scale).float()
    torch._fused_sgd_(
        params,
        grads,
        [],
        weight_decay=decay,
        momentum=0.0,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        grad_scale=divisor,
        found_inf=None,
    )


def compare(like: Tensor) -> Iterator[list[Tensor]]:
    """Parameters and averages after two steps, and two averaged ones, of both classes.

    fast/step.py compares steps with a factor for the gradients.
    """
    for kind in (FastNTASGD, NTASGD):
        params = [numbers(*shape, like=like).requires_grad_() for shape in ((5, 4), (7,))]
        optimizer = kind(params, lr=0.5, weight_decay=0.1)
        for step in range(4):
            if step == 2:
                optimizer.start_averaging()
            for p in params:
                p.grad = numbers(*p.shape, like=like, phase=step)
            optimizer.step()
        yield [*params, *(optimizer.state[p]["average"] for p in params)]
