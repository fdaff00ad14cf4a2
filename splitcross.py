"""Cross-entropy over a vocabulary cut into a frequent head and rarer tails.

"An Analysis of Neural Language Modeling at Multiple Scales", arXiv 1803.08240, section 3; after
"Efficient softmax approximation for GPUs", arXiv 1609.04309.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernels import aligned, cross_entropy

# The most logits in one block of rows: a long evaluation chunk over a large vocabulary would
# otherwise need gigabytes at once. Smaller blocks, which fit the cache, were measured no faster.
_MAX_LOGITS = 2**24


# One thread takes the first exponentials of a process here: taken by two threads at once they are
# rounded otherwise in about one process in 60, and so is the whole run (results/determinism.md).
torch.zeros(1).exp_()


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
        softmax = _one_kernel if cross_entropy.suits(hiddens.device, low) else _operations
        matrix = weight.to(low)
        total = bias.new_zeros(())
        d_weight = torch.zeros_like(weight) if need_weight else None
        d_bias = torch.zeros_like(bias) if need_bias else None
        d_hiddens = torch.empty_like(hiddens) if need_hiddens else None
        rows = max(1, _MAX_LOGITS // weight.size(0))
        for start in range(0, len(hiddens), rows):
            block = slice(start, start + rows)
            inputs = hiddens[block].to(low)
            loss, d_logits, sums = softmax(
                inputs, matrix, bias, targets[block], gradient=any(needed), bias_gradient=need_bias
            )
            total += loss
            if need_bias:
                d_bias += sums
            if need_hiddens:
                d_hiddens[block] = d_logits @ matrix
            if need_weight:
                if low == weight.dtype:
                    d_weight.addmm_(d_logits.t(), inputs)
                else:
                    d_weight += d_logits.t() @ inputs
        ctx.save_for_backward(d_weight, d_bias, d_hiddens)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if d is None else d * gradient for d in ctx.saved_tensors), None


def _one_kernel(
    inputs: Tensor,
    matrix: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Summed loss, gradient of the logits `inputs @ matrix.t() + bias`, and its sum over rows.

    `inputs` (n, hidden_size), `matrix` (ntoken, hidden_size) and the gradient (n, ntoken) have one
    dtype; the loss and the sum (ntoken,) have the dtype of `bias`.
    """
    logits = aligned.matmul(inputs, matrix.t())
    losses, sums = cross_entropy.loss_and_gradient_(logits, targets, bias, gradient, bias_gradient)
    return losses.sum(), logits, sums


def _operations(
    inputs: Tensor,
    matrix: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `_one_kernel`, in PyTorch's operations."""
    target = targets.unsqueeze(1)
    if inputs.dtype != bias.dtype:
        logits = (inputs @ matrix.t()).to(bias.dtype).add_(bias)
    elif inputs.device.type == "cpu":
        # Not addmm: that copies the bias to every row first, at seven times the sum's time.
        logits = aligned.matmul(inputs, matrix.t()).add_(bias)
    else:
        logits = torch.addmm(bias, inputs, matrix.t())
    top = logits.amax(dim=1, keepdim=True)
    # Read now: the exponentials replace the logits.
    chosen = logits.gather(1, target)
    mass = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
    loss = (mass.log() + top - chosen).sum()
    if not gradient:
        return loss, logits, None
    d_logits = logits.div_(mass)
    # Not scatter_add_, which need not give the same bits twice on a GPU.
    d_logits.scatter_(1, target, d_logits.gather(1, target) - 1)
    return loss, d_logits.to(inputs.dtype), d_logits.sum(dim=0) if bias_gradient else None


class SplitCrossEntropyLoss(nn.Module):
    """Softmax cross-entropy that may be split in buckets of word ids, most frequent words first.

    `splits` are the ids at which the vocabulary is cut: words below `splits[0]` form the head, each
    further bucket is a tail. A tail k is one entry of the head's softmax, its tombstone, and
    `log p(w) = log p_head(tombstone_k) + log p_tail_k(w)`. The tombstone of the k-th tail is the
    k-th from the end of the head's logits. No splits: plain softmax cross-entropy.

    `hidden_size` is the width of the decoder's input. `verbose` is accepted for compatibility.
    Raises ValueError if `splits` are not positive and increasing.
    """

    def __init__(self, hidden_size: int, splits: Sequence[int], verbose: bool = False) -> None:
        super().__init__()
        if any(b <= a for a, b in zip([0, *splits], splits, strict=False)):
            raise ValueError(f"splits must be positive and increasing, not {list(splits)}")
        self.hidden_size = hidden_size
        self.splits = [0, *splits]
        self.nsplits = len(self.splits)
        self.verbose = verbose
        if self.nsplits > 1:
            self.tail_vectors = nn.Parameter(torch.zeros(self.nsplits - 1, hidden_size))
            self.tail_bias = nn.Parameter(torch.zeros(self.nsplits - 1))

    def forward(self, weight: Tensor, bias: Tensor, hiddens: Tensor, targets: Tensor) -> Tensor:
        """Mean negative log-likelihood in nats of `targets` (n,) given `hiddens` (n, hidden_size).

        `weight` (ntoken, hidden_size) and `bias` (ntoken,) are the decoder's.
        """
        if self.nsplits == 1:
            return _LinearCrossEntropy.apply(weight, bias, hiddens, targets) / len(targets)
        bucket = self._buckets(targets)
        head_weight, head_bias = self._head_parameters(weight, bias)
        in_head = self._in_head(targets, bucket, len(head_bias))
        total = _LinearCrossEntropy.apply(head_weight, head_bias, hiddens, in_head)
        for k in range(1, self.nsplits):
            rows = (bucket == k).nonzero().squeeze(1)
            if len(rows):
                words = self._words(k, len(weight))
                total = total + _LinearCrossEntropy.apply(
                    weight[words], bias[words], hiddens[rows], targets[rows] - self.splits[k]
                )
        return total / len(targets)

    def target_logprob(
        self, weight: Tensor, bias: Tensor, hiddens: Tensor, targets: Tensor
    ) -> Tensor:
        """`log p` in nats of each of `targets` (n,): (n,). Shapes as in `forward`.

        Where no gradient is recorded, memory is bounded: rows are worked off in blocks.
        """
        if torch.is_grad_enabled() and hiddens.requires_grad:
            return self._target_logprob(weight, bias, hiddens, targets)
        rows = max(1, _MAX_LOGITS // weight.size(0))
        pairs = zip(hiddens.split(rows), targets.split(rows), strict=True)
        return torch.cat([self._target_logprob(weight, bias, h, t) for h, t in pairs])

    def logprob(self, weight: Tensor, bias: Tensor, hiddens: Tensor) -> Tensor:
        """The full distribution, `log p` in nats of every word: (n, ntoken); else as `forward`."""
        head = self._head(weight, bias, hiddens)
        if self.nsplits == 1:
            return head
        parts = [head[:, : self.splits[1]]]
        for k in range(1, self.nsplits):
            parts.append(head[:, -k].unsqueeze(1) + self._tail(k, weight, bias, hiddens))
        return torch.cat(parts, dim=1)

    def _target_logprob(
        self, weight: Tensor, bias: Tensor, hiddens: Tensor, targets: Tensor
    ) -> Tensor:
        if self.nsplits == 1:
            logits = aligned.linear(hiddens, weight, bias)
            return -functional.cross_entropy(logits, targets, reduction="none")
        bucket = self._buckets(targets)
        head = self._head(weight, bias, hiddens)
        in_head = self._in_head(targets, bucket, head.size(1))
        result = head.gather(1, in_head.unsqueeze(1)).squeeze(1)
        for k in range(1, self.nsplits):
            rows = (bucket == k).nonzero().squeeze(1)
            if len(rows):
                tail = self._tail(k, weight, bias, hiddens[rows])
                local = (targets[rows] - self.splits[k]).unsqueeze(1)
                result = result.index_add(0, rows, tail.gather(1, local).squeeze(1))
        return result

    def _buckets(self, targets: Tensor) -> Tensor:
        """The bucket of each target: 0 for the head, k for tail k."""
        cuts = torch.tensor(self.splits[1:], device=targets.device)
        return torch.bucketize(targets, cuts, right=True)

    @staticmethod
    def _in_head(targets: Tensor, bucket: Tensor, size: int) -> Tensor:
        """Each word's index in a head of `size`; a word of tail k has its tombstone's index."""
        return torch.where(bucket == 0, targets, size - bucket)

    def _words(self, k: int, ntoken: int) -> slice:
        """The words of tail k."""
        return slice(self.splits[k], self.splits[k + 1] if k + 1 < self.nsplits else ntoken)

    def _head_parameters(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the head's words, then of the tombstones."""
        if self.nsplits == 1:
            return weight, bias
        if self.splits[-1] >= weight.size(0):
            raise ValueError(
                f"the split at {self.splits[-1]} leaves no word of {weight.size(0)} in its tail"
            )
        # These concatenations copy the head's rows only, not the whole vocabulary.
        weight = torch.cat([weight[: self.splits[1]], self.tail_vectors])
        return weight, torch.cat([bias[: self.splits[1]], self.tail_bias])

    def _head(self, weight: Tensor, bias: Tensor, hiddens: Tensor) -> Tensor:
        """`log p` of the head's words, then of the tombstones: (n, splits[0] + number of tails)."""
        weight, bias = self._head_parameters(weight, bias)
        return functional.log_softmax(aligned.linear(hiddens, weight, bias), dim=1)

    def _tail(self, k: int, weight: Tensor, bias: Tensor, hiddens: Tensor) -> Tensor:
        """`log p` of tail k's words within the tail: (n, size of tail k)."""
        words = self._words(k, len(weight))
        return functional.log_softmax(aligned.linear(hiddens, weight[words], bias[words]), dim=1)


def default_splits(ntoken: int) -> list[int]:
    """The cuts of a vocabulary of `ntoken` words, without cuts beyond its end."""
    if ntoken > 500_000:
        splits = [4200, 35_000, 180_000]
    elif ntoken > 75_000:
        splits = [2800, 20_000, 76_000]
    else:
        splits = []
    return [cut for cut in splits if cut < ntoken]
