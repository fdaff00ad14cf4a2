"""The update of dynamic_evaluation.py in chunks, which stay in the cache between operations."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dynamic_evaluation import DynamicEvaluation
from qrnn.check import numbers

# Numbers updated at a time.
_CHUNK = {"cpu": 2**18, "cuda": 2**21}


class FastDynamicEvaluation(DynamicEvaluation):
    """DynamicEvaluation in one pass over each parameter."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (group,) = self.param_groups
        params = [p for p in group["params"] if p.grad is not None]
        chunk = _CHUNK[params[0].device.type]
        scratch = params[0].new_empty(min(chunk, max(p.numel() for p in params)))
        for p in params:
            start, rms = self.state[p]["start"], self.state[p].get("rms")
            for parts in _chunks((p, start, rms, p.grad.contiguous()), len(scratch)):
                self._update(*parts, group, scratch)

    def _update(
        self,
        p: Tensor,
        start: Tensor,
        rms: Tensor | None,
        grad: Tensor,
        group: dict[str, Any],
        scratch: Tensor,
    ) -> None:
        scratch, lr = scratch[: len(p)], group["lr"]
        if rms is None:
            p.lerp_(start, min(group["lamb"], 1.0)).sub_(torch.mul(grad, lr, out=scratch))
            return
        pull = torch.mul(rms, group["lamb"] / self.mean, out=scratch).clamp_(max=1.0)
        p.lerp_(start, pull)
        # A rate of 0 makes the divisor infinite and the step 0. The rate may be a tensor.
        p.addcdiv_(grad, torch.add(rms, group["epsilon"], out=scratch).div_(lr), value=-1)


def _chunks(tensors: Sequence[Tensor | None], size: int) -> Iterator[tuple[Tensor | None, ...]]:
    """Matching chunks of several tensors of one size, from the first to the last."""
    flat = [None if tensor is None else tensor.view(-1) for tensor in tensors]
    for first in range(0, len(flat[0]), size):
        yield tuple(None if tensor is None else tensor[first : first + size] for tensor in flat)


def compare(like: Tensor) -> Iterator[list[Tensor]]:
    """Parameters after two steps, with and without statistics, of both classes."""
    for kind in (FastDynamicEvaluation, DynamicEvaluation):
        results = []
        for with_rms in (True, False):
            params = [numbers(*shape, like=like).requires_grad_() for shape in ((5, 4), (7,))]
            rms = [numbers(*p.shape, like=like).abs() for p in params] if with_rms else None
            optimizer = kind(params, rms, lr=0.1, lamb=0.6, epsilon=0.1)
            for step in range(2):
                for p in params:
                    p.grad = numbers(*p.shape, like=like, phase=step + 1)
                optimizer.step()
            results += params
        yield results
