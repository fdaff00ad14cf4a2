"""NT-ASGD: plain SGD that turns into averaged SGD when the validation loss stops falling.

"Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182, section 3 and algorithm 1.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels import update as update_kernel
from utils import Optimizer


class NonMonotonicTrigger:
    """Fires if a validation loss exceeds the best earlier loss, the last `nonmono` left out.

    It never fires before `nonmono` + 1 earlier losses. `losses` is the history, in nats.
    """

    def __init__(self, nonmono: int, losses: Iterable[float] = ()) -> None:
        self.nonmono = nonmono
        self.losses = list(losses)

    def update(self, loss: float) -> bool:
        """Add a validation loss to the history and say whether it fires the trigger."""
        older = self.losses[: max(0, len(self.losses) - self.nonmono)]
        self.losses.append(loss)
        return bool(older) and loss > min(older)


class NTASGD(Optimizer):
    """SGD with weight decay, and a running average of the iterates after `start_averaging`.

    A step is `p -= lr * (gradient + weight_decay * p)`. The average after n averaged steps is the
    mean of the n iterates since the switch; torch.optim.ASGD with t0 = 0 and lambd = 0 leaves out
    the first of them. The parameters hold the raw iterates, and the average within `averaged()`.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        # averaged_steps is None before the switch; a group's entries are saved in checkpoints.
        defaults = {"lr": lr, "weight_decay": weight_decay, "averaged_steps": None}
        super().__init__(params, defaults)

    @property
    def averaging(self) -> bool:
        """Whether `start_averaging` has been called."""
        return self.param_groups[0]["averaged_steps"] is not None

    def start_averaging(self) -> None:
        """Average every iterate from the next step on."""
        for group in self.param_groups:
            group["averaged_steps"] = 0
            for p in group["params"]:
                self.state[p]["average"] = p.detach().clone()

    def count(self) -> None:
        """Count one step of the average."""
        for group in self.param_groups:
            if group["averaged_steps"] is not None:
                group["averaged_steps"] += 1

    @torch.no_grad()
    def step(
        self,
        closure: None = None,
        *,
        gradient_scale: float | Tensor = 1.0,
        averaging_weight: Tensor | None = None,
    ) -> None:
        """Update every parameter that has a gradient, then the average of every parameter.

        The gradients are taken times `gradient_scale`: clipping through it saves a pass over them.
        With a rate that is a tensor and `averaging_weight`, a tensor of 1 / counted steps, all
        numbers stay on the device, so that a CUDA graph can record the step. Such a step is not
        counted: call `count` before each replay.
        """
        if averaging_weight is None:
            self.count()
        for group in self.param_groups:
            params, count = group["params"], group["averaged_steps"]
            numbers = (group["lr"], group["weight_decay"], gradient_scale)
            averages, weight = None, 0.0
            if count is not None:
                averages = [self.state[p]["average"] for p in params]
                weight = 1 / count if averaging_weight is None else averaging_weight
            if update_kernel.suits(params):
                update_kernel.update(params, averages, *numbers, weight)
                continue
            trained = [p for p in params if p.grad is not None]
            if trained:
                self._descend(trained, *numbers)
            if isinstance(weight, Tensor):
                for average, p in zip(averages, params, strict=True):
                    average.lerp_(p, weight)
            elif averages is not None:
                torch._foreach_lerp_(averages, params, weight)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's; raises ValueError if the averages do not fit the parameters."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            count = group["averaged_steps"]
            if count is None:
                continue
            averages = [self.state[p]["average"] for p in group["params"]]
            pairs = zip(averages, group["params"], strict=True)
            if type(count) is not int or any(average.shape != p.shape for average, p in pairs):
                raise ValueError("its averages do not fit the weights")

    @staticmethod
    def _descend(
        params: list[Tensor], lr: float | Tensor, decay: float, scale: float | Tensor
    ) -> None:
        """`p -= lr * (scale * gradient + decay * p)` in one pass.

        If the rate is a tensor, or on a GPU, this also scales the gradients in place.
        """
        grads = [p.grad for p in params]
        if params[0].device.type == "cpu" and not isinstance(lr, Tensor):
            scale, divisor = float(scale), None
            if not scale:
                # The gradient's norm is infinite: the parameters must become nan, not stay.
                torch._foreach_add_(params, grads, alpha=0.0)
                return
            # `grad_scale` would also write the scaled gradients; scaling the factors does not.
            lr, decay = lr * scale, decay / scale
        else:
            divisor = (1 / scale).float() if isinstance(scale, Tensor) else None
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

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the parameters hold the average, if there is one."""
        if not self.averaging:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p]["average"]
                raw = p.clone()
                p.copy_(average)
                average.copy_(raw)
