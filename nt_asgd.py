"""NT-ASGD: plain SGD that turns into averaged SGD when the validation loss stops falling.

"Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182, section 3 and algorithm 1.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class NonMonotonicTrigger:
    """Fires when a loss is worse than the best of more than `nonmono` epochs ago.

    It never fires before `nonmono` + 1 earlier losses. `losses` is the history, in nats.
    """

    def __init__(self, nonmono: int, losses: Iterable[float] = ()) -> None:
        self.nonmono = nonmono
        self.losses = list(losses)

    def update(self, loss: float) -> bool:
        """Add a validation loss to the history and return whether it fires the trigger."""
        older = self.losses[: max(0, len(self.losses) - self.nonmono)]
        self.losses.append(loss)
        return bool(older) and loss > min(older)


class NTASGD(torch.optim.Optimizer):
    """SGD with weight decay, and a running average of the iterates after `start_averaging`.

    The average after n averaged steps is the mean of the n iterates since the switch;
    torch.optim.ASGD with t0 = 0 and lambd = 0 leaves out the first of them. The parameters hold the
    raw iterates, and the average within `averaged()`.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        # averaged_steps is None before the switch; a group's entries are saved in model files.
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

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient, then the average of every parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * (p.grad + group["weight_decay"] * p)
            if group["averaged_steps"] is not None:
                group["averaged_steps"] += 1
                for p in group["params"]:
                    average = self.state[p]["average"]
                    average += (p - average) / group["averaged_steps"]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the parameters hold the average, if there is one."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for group in self.param_groups if self.averaging else ():
            for p in group["params"]:
                average = self.state[p]["average"]
                raw = p.clone()
                p.copy_(average)
                average.copy_(raw)
