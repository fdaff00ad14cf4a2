"""The loss of splitcross.py without its logits in memory: their gradient is computed with them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast import cross_entropy, linear
from qrnn.check import numbers
from splitcross import SplitCrossEntropyLoss

# The most logits in one block of rows: a long evaluation chunk over a large vocabulary would
# otherwise need gigabytes at once. Smaller blocks, which fit the cache, were measured no faster.
MAX_LOGITS = 2**24


class FastSplitCrossEntropyLoss(SplitCrossEntropyLoss):
    """SplitCrossEntropyLoss in blocks of rows, with its gradient in the same pass."""

    def forward(self, weight: Tensor, bias: Tensor, hiddens: Tensor, targets: Tensor) -> Tensor:
        head, *tails = self.buckets(weight, bias)
        if not tails:
            return _LinearCrossEntropy.apply(*head, hiddens, targets) / len(targets)
        bucket, in_head = self.places(targets, len(head[1]))
        total = _LinearCrossEntropy.apply(*head, hiddens, in_head)
        for k, tail in enumerate(tails, start=1):
            rows = (bucket == k).nonzero().squeeze(1)
            if len(rows):
                in_tail = targets[rows] - self.splits[k]
                total = total + _LinearCrossEntropy.apply(*tail, hiddens[rows], in_tail)
        return total / len(targets)

    def target_logprob(
        self, weight: Tensor, bias: Tensor, hiddens: Tensor, targets: Tensor
    ) -> Tensor:
        """As the definition; where no gradient is recorded, rows are computed in blocks."""
        if torch.is_grad_enabled() and hiddens.requires_grad:
            return super().target_logprob(weight, bias, hiddens, targets)
        definition, rows = super().target_logprob, max(1, MAX_LOGITS // len(weight))
        pairs = zip(hiddens.split(rows), targets.split(rows), strict=True)
        return torch.cat([definition(weight, bias, *pair) for pair in pairs])


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed softmax cross-entropy of `hiddens @ weight.t() + bias`; the logits are not kept.

    The gradient of a softmax depends on the softmax alone, so the gradient of each block of logits
    replaces the block and is multiplied out at once. This saves the three copies of all logits that
    separate operations write and read. Under autocast the products are in its dtype;
    sums, and on the CPU logits, stay in that of `bias`.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, hiddens: Tensor, targets: Tensor) -> Tensor:
        device = hiddens.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else bias.dtype
        need_weight, need_bias, need_hiddens, _ = needed = ctx.needs_input_grad
        softmax = _one_kernel if cross_entropy.is_usable(hiddens.device, low) else _operations
        matrix = weight.to(low)
        total = bias.new_zeros(())
        d_weight = None
        d_bias = torch.zeros_like(bias) if need_bias else None
        d_hiddens = torch.empty_like(hiddens) if need_hiddens else None
        rows = max(1, MAX_LOGITS // weight.size(0))
        for start in range(0, len(hiddens), rows):
            block = slice(start, start + rows)
            inputs = hiddens[block].to(low)
            loss, d_logits, sums = softmax(inputs, matrix, bias, targets[block], any(needed))
            total += loss
            if need_bias:
                d_bias += sums
            if need_hiddens:
                d_hiddens[block] = linear.matmul(d_logits, matrix)
            if need_weight and d_weight is None:
                d_weight = linear.matmul(d_logits.t(), inputs).to(weight.dtype)
            elif need_weight and low == weight.dtype and not linear.uses_onednn(inputs):
                d_weight.addmm_(d_logits.t(), inputs)
            elif need_weight:
                d_weight += linear.matmul(d_logits.t(), inputs)
        ctx.save_for_backward(d_weight, d_bias, d_hiddens)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if d is None else d * gradient for d in ctx.saved_tensors), None


def _one_kernel(
    inputs: Tensor, matrix: Tensor, bias: Tensor, targets: Tensor, gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Summed loss, gradient of the logits `inputs @ matrix.t() + bias`, and its sum over rows.

    `inputs` (n, hidden_size), `matrix` (ntoken, hidden_size) and the gradient (n, ntoken) have one
    dtype; the loss and the sum (ntoken,) have the dtype of `bias`. Without `gradient` only the loss
    is meaningful.
    """
    logits = linear.matmul(inputs, matrix.t())
    losses, sums = cross_entropy.loss_and_gradient_(logits, targets, bias, gradient)
    return losses.sum(), logits, sums


def _operations(
    inputs: Tensor, matrix: Tensor, bias: Tensor, targets: Tensor, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_one_kernel`, in PyTorch's operations."""
    logits = linear.matmul(inputs, matrix.t())
    loss, sums = bias.new_zeros(()), torch.zeros_like(bias)
    low = logits.dtype != bias.dtype
    # Few rows stay in a CPU's cache.
    rows = 64 if logits.device.type == "cpu" else len(logits)
    for part, some in zip(logits.split(rows), targets.split(rows), strict=True):
        # Not addmm: that copies the bias to every row first, at seven times the sum's time.
        block = part + bias if low else part.add_(bias)
        loss += _loss_and_gradient_(block, some, gradient)
        if gradient:
            sums += block.sum(dim=0)
            if low:
                part.copy_(block)
    return loss, logits, sums


def _loss_and_gradient_(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """Summed cross-entropy of `logits`, which become its gradient if `gradient` is set."""
    target = targets.unsqueeze(1)
    top = logits.amax(dim=1, keepdim=True)
    # Read now: the exponentials replace the logits.
    chosen = logits.gather(1, target)
    mass = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
    if gradient:
        logits.div_(mass)
        # Not scatter_add_, which need not give the same bits twice on a GPU.
        logits.scatter_(1, target, logits.gather(1, target) - 1)
    return (mass.log() + top - chosen).sum()


def compare(like: Tensor) -> Iterator[list[Tensor]]:
    """Losses, their gradients and log p of FastSplitCrossEntropyLoss, then of its definition."""
    for kind in (FastSplitCrossEntropyLoss, SplitCrossEntropyLoss):
        results = []
        for splits in ([], [9, 20]):
            criterion = kind(8, splits).to(like)
            shapes = ((40, 8), (40,), (12, 8))
            weight, bias, hiddens = (
                numbers(*shape, like=like, phase=shape[0]).requires_grad_() for shape in shapes
            )
            targets = torch.arange(12, device=like.device) * 7 % 40
            loss = criterion(weight, bias, hiddens, targets)
            wanted = [weight, bias, hiddens, *criterion.parameters()]
            results += [loss, *torch.autograd.grad(loss, wanted)]
            with torch.no_grad():
                results.append(criterion.target_logprob(weight, bias, hiddens, targets))
        yield results
