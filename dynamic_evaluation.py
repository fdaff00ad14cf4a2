"""Dynamic evaluation: a trained model that keeps learning from the text it is scored on.

"Dynamic Evaluation of Neural Sequence Models", arXiv 1709.07432. After each segment comes a step
of gradient descent, divided by the root mean square of each weight's gradients in training, and a
decay to the trained weights, which is stronger where that root mean square is large.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from utils import Optimizer

# Numbers updated at a time: few enough to stay in the processor's cache between operations.
_CHUNK = {"cpu": 2**18, "cuda": 2**21}


class GradientStatistics(Optimizer):
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


class DynamicEvaluation(Optimizer):
    """`p += d * (start - p) - lr * gradient / (rms + epsilon)`, with `d = min(lamb * rms / m, 1)`.

    `start` are the parameters at construction, `rms` the root mean squares of the gradients, one
    tensor for each parameter, and `m` the mean over tensors of their means. Without `rms` all root
    mean squares are 1 and epsilon is 0: plain gradient descent with decay to the start.
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
        means = [scale.mean() for scale in rms or ()]
        self._mean = torch.stack(means).mean().item() if means else 1.0
        chunk = _CHUNK[own[0].device.type]
        self._scratch = own[0].new_empty(min(chunk, max(p.numel() for p in own)))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter in one pass over it, chunk by chunk."""
        (group,) = self.param_groups
        for p in group["params"]:
            if p.grad is None:
                continue
            start, rms = self.state[p]["start"], self.state[p].get("rms")
            tensors = (p, start, rms, p.grad.contiguous())
            for parts in _chunks(tensors, len(self._scratch)):
                self._update(*parts, group)

    def _update(
        self, p: Tensor, start: Tensor, rms: Tensor | None, grad: Tensor, group: dict[str, Any]
    ) -> None:
        scratch, lr = self._scratch[: len(p)], group["lr"]
        if rms is None:
            p.lerp_(start, min(group["lamb"], 1.0)).sub_(torch.mul(grad, lr, out=scratch))
            return
        pull = torch.mul(rms, group["lamb"] / self._mean, out=scratch).clamp_(max=1.0)
        p.lerp_(start, pull)
        # A rate of 0 makes the divisor infinite and the step 0. The rate may be a tensor.
        p.addcdiv_(grad, torch.add(rms, group["epsilon"], out=scratch).div_(lr), value=-1)

    @torch.no_grad()
    def restore(self) -> None:
        """Set the parameters back to `start`."""
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["start"])


def _chunks(tensors: Sequence[Tensor | None], size: int) -> Iterator[tuple[Tensor | None, ...]]:
    """Matching chunks of several tensors of one size, from the first to the last."""
    flat = [None if tensor is None else tensor.view(-1) for tensor in tensors]
    for first in range(0, len(flat[0]), size):
        yield tuple(None if tensor is None else tensor[first : first + size] for tensor in flat)
