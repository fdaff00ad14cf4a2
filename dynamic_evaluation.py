"""Dynamic evaluation: a trained model that keeps learning from the text it is scored on.

"Dynamic Evaluation of Neural Sequence Models", arXiv 1709.07432. After each segment comes a step
of gradient descent, divided by the root mean square of each weight's gradients in training, and a
decay to the trained weights, which is stronger where that root mean square is large.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class GradientStatistics(torch.optim.Optimizer):
    """An optimiser whose step sums up the squares of the gradients; weights do not change."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": 0.0})
        for p in self.param_groups[0]["params"]:
            self.state[p]["squares"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Add the squares of every gradient."""
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p]["squares"].addcmul_(p.grad, p.grad)

    def rms(self, steps: int) -> list[Tensor]:
        """The root mean square of every weight's gradient over `steps` steps."""
        params = self.param_groups[0]["params"]
        return [(self.state[p]["squares"] / steps).sqrt_() for p in params]


class DynamicEvaluation(torch.optim.Optimizer):
    """`p += d * (start - p) - lr * gradient / (rms + epsilon)`, with `d = min(lamb * rms / m, 1)`.

    `start` are the parameters at construction, `rms` the root mean squares of the gradients, one
    tensor for each parameter, and `m`, the attribute `mean`, the mean over tensors of their means;
    a tensor of zeros, of a parameter that never had a gradient, is left out of it. Without `rms`
    all root mean squares are 1 and epsilon is 0: plain gradient descent with decay to the start.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        rms: Sequence[Tensor] | None,
        lr: float,
        lamb: float,
        epsilon: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "lamb": lamb, "epsilon": epsilon})
        own = self.param_groups[0]["params"]
        for p, scale in zip(own, rms or [None] * len(own), strict=True):
            self.state[p]["start"] = p.detach().clone()
            if scale is not None:
                self.state[p]["rms"] = scale
        means = [scale.mean() for scale in rms or () if scale.any()]
        self.mean = torch.stack(means).mean().item() if means else 1.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.update(p, p.grad, **self.state[p])

    def update(self, p: Tensor, grad: Tensor, start: Tensor, rms: Tensor | None = None) -> None:
        """Decay one parameter to its `start` and take a step against its gradient, in place."""
        (group,) = self.param_groups
        if rms is None:
            decay, step = min(group["lamb"], 1.0), grad
        else:
            decay = (group["lamb"] / self.mean * rms).clamp(max=1.0)
            step = grad / (rms + group["epsilon"])
        p.lerp_(start, decay).sub_(group["lr"] * step)

    @torch.no_grad()
    def restore(self) -> None:
        """Set the parameters back to `start`."""
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["start"])
