"""The update of dynamic_evaluation.py block by block: a block stays in the CPU's cache."""

from collections.abc import Iterator

from torch import Tensor

from dynamic_evaluation import DynamicEvaluation
from qrnn.check import numbers

# Numbers updated at a time.
BLOCK = 2**18


class FastDynamicEvaluation(DynamicEvaluation):
    """DynamicEvaluation in one pass over each parameter on a CPU."""

    def update(self, p: Tensor, grad: Tensor, start: Tensor, rms: Tensor | None = None) -> None:
        """As the definition."""
        if p.is_cuda or not p.is_contiguous():
            super().update(p, grad, start, rms)
            return
        tensors = [tensor for tensor in (p, grad, start, rms) if tensor is not None]
        blocks = [tensor.contiguous().view(-1).split(BLOCK) for tensor in tensors]
        for block in zip(*blocks, strict=True):
            super().update(*block)


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
