"""Cross-entropy over a vocabulary cut into a frequent head and rarer tails.

"An Analysis of Neural Language Modeling at Multiple Scales", arXiv 1803.08240, section 3; after
"Efficient softmax approximation for GPUs", arXiv 1609.04309.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

# Where no gradient is needed, rows of logits are made in blocks of at most so many numbers: a long
# evaluation chunk over a large vocabulary would otherwise need gigabytes at once.
_MAX_LOGITS = 2**24


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
            return functional.cross_entropy(functional.linear(hiddens, weight, bias), targets)
        return -self._target_logprob(weight, bias, hiddens, targets).mean()

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
            logits = functional.linear(hiddens, weight, bias)
            return -functional.cross_entropy(logits, targets, reduction="none")
        # The bucket as an integer: summing boolean masks would stop at one.
        cuts = torch.tensor(self.splits[1:], device=targets.device)
        bucket = torch.bucketize(targets, cuts, right=True)
        head = self._head(weight, bias, hiddens)
        # In the head a word of tail k stands at the tombstone, k-th from the end.
        in_head = torch.where(bucket == 0, targets, head.size(1) - bucket)
        result = head.gather(1, in_head.unsqueeze(1)).squeeze(1)
        for k in range(1, self.nsplits):
            rows = (bucket == k).nonzero().squeeze(1)
            if len(rows):
                tail = self._tail(k, weight, bias, hiddens[rows])
                local = (targets[rows] - self.splits[k]).unsqueeze(1)
                result = result.index_add(0, rows, tail.gather(1, local).squeeze(1))
        return result

    def _head(self, weight: Tensor, bias: Tensor, hiddens: Tensor) -> Tensor:
        """`log p` of the head's words, then of the tombstones: (n, splits[0] + number of tails)."""
        if self.nsplits > 1:
            if self.splits[-1] >= weight.size(0):
                raise ValueError(
                    f"the split at {self.splits[-1]} leaves no word of {weight.size(0)} in its tail"
                )
            # Against the two concatenations: they copy the head's rows only, not the vocabulary.
            weight = torch.cat([weight[: self.splits[1]], self.tail_vectors])
            bias = torch.cat([bias[: self.splits[1]], self.tail_bias])
        return functional.log_softmax(functional.linear(hiddens, weight, bias), dim=1)

    def _tail(self, k: int, weight: Tensor, bias: Tensor, hiddens: Tensor) -> Tensor:
        """`log p` of tail k's words within the tail: (n, size of tail k)."""
        end = self.splits[k + 1] if k + 1 < self.nsplits else weight.size(0)
        words = slice(self.splits[k], end)
        return functional.log_softmax(functional.linear(hiddens, weight[words], bias[words]), dim=1)


def default_splits(ntoken: int) -> list[int]:
    """Where a vocabulary of `ntoken` words is cut; cuts beyond its end are left out."""
    if ntoken > 500_000:
        splits = [4200, 35_000, 180_000]
    elif ntoken > 75_000:
        splits = [2800, 20_000, 76_000]
    else:
        splits = []
    return [cut for cut in splits if cut < ntoken]
