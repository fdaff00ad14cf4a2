"""Dynamic evaluation: a trained model that goes on learning from the text it is scored on.

"Dynamic Evaluation of Neural Sequence Models", arXiv 1709.07432: a step of gradient descent after
each segment, scaled by how large each weight's gradients were in training, and a pull back to the
trained weights, stronger where those gradients were large.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Numbers worked on at a time, so that all but the first read of each comes from a cache.
_CHUNK = {"cpu": 2**18, "cuda": 2**21}


class GradientStatistics(torch.optim.Optimizer):
    """Sums up the squares of gradients in the place of a step; the weights stay as they are."""

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
        """The root of the mean square of every weight's gradient over so many steps."""
        params = self.param_groups[0]["params"]
        return [(self.state[p]["squares"] / steps).sqrt_() for p in params]


class DynamicEvaluation(torch.optim.Optimizer):
    """`p += d * (start - p) - lr * gradient / (rms + epsilon)`, with `d = min(lamb * rms / m, 1)`.

    `start` are the parameters as they are now, `rms` the gradients' root mean squares, one tensor
    for each parameter, and `m` the mean over tensors of their means. Without `rms` every one of
    them is 1 and epsilon 0: plain gradient descent that is pulled back to the start.
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
        # A rate of 0 makes the divisor infinite, and so no step. It may be a tensor.
        p.addcdiv_(grad, torch.add(rms, group["epsilon"], out=scratch).div_(lr), value=-1)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back to where they started."""
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["start"])


def _chunks(tensors: Sequence[Tensor | None], size: int) -> Iterator[tuple[Tensor | None, ...]]:
    """The same part of each of several tensors of one size, from the first to the last."""
    flat = [None if tensor is None else tensor.view(-1) for tensor in tensors]
    for first in range(0, len(flat[0]), size):
        yield tuple(None if tensor is None else tensor[first : first + size] for tensor in flat)
