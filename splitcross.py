"""Cross-entropy over a vocabulary cut into a frequent head and rarer tails.

"An Analysis of Neural Language Modeling at Multiple Scales", arXiv 1803.08240, section 3; after
"Efficient softmax approximation for GPUs", arXiv 1609.04309.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax


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
        return -self.target_logprob(weight, bias, hiddens, targets).mean()

    def target_logprob(
        self, weight: Tensor, bias: Tensor, hiddens: Tensor, targets: Tensor
    ) -> Tensor:
        """`log p` in nats of each of `targets` (n,): (n,). Shapes as in `forward`."""
        head, *tails = self.buckets(weight, bias)
        logprob = log_softmax(linear(hiddens, *head), dim=1)
        if not tails:
            return logprob.gather(1, targets.unsqueeze(1)).squeeze(1)
        bucket, in_head = self.places(targets, logprob.size(1))
        result = logprob.gather(1, in_head.unsqueeze(1)).squeeze(1)
        for k, tail in enumerate(tails, start=1):
            rows = (bucket == k).nonzero().squeeze(1)
            in_tail = targets[rows] - self.splits[k]
            logprob = log_softmax(linear(hiddens[rows], *tail), dim=1)
            result = result.index_add(0, rows, logprob.gather(1, in_tail.unsqueeze(1)).squeeze(1))
        return result

    def logprob(self, weight: Tensor, bias: Tensor, hiddens: Tensor) -> Tensor:
        """The full distribution, `log p` in nats of every word: (n, ntoken); else as `forward`."""
        head, *tails = self.buckets(weight, bias)
        logprob = log_softmax(linear(hiddens, *head), dim=1)
        if not tails:
            return logprob
        parts = [logprob[:, : self.splits[1]]]
        for k, tail in enumerate(tails, start=1):
            in_tail = log_softmax(linear(hiddens, *tail), dim=1)
            parts.append(logprob[:, -k].unsqueeze(1) + in_tail)
        return torch.cat(parts, dim=1)

    def buckets(self, weight: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of the head's words and the tombstones, then of each tail's words."""
        if self.nsplits == 1:
            return [(weight, bias)]
        if self.splits[-1] >= len(weight):
            raise ValueError(
                f"the split at {self.splits[-1]} leaves no word of {len(weight)} in its tail"
            )
        ends = [*self.splits[1:], len(weight)]
        sizes = [end - start for start, end in zip(self.splits, ends, strict=True)]
        # Split at once: the gradient of a slice would be as large as that of the whole.
        weights, biases = weight.split(sizes), bias.split(sizes)
        head = torch.cat([weights[0], self.tail_vectors]), torch.cat([biases[0], self.tail_bias])
        return [head, *zip(weights[1:], biases[1:], strict=True)]

    def places(self, targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Each word's bucket, 0 for the head and k for tail k, and its index in a head of `size`.

        A word of tail k has its tombstone's index.
        """
        cuts = torch.tensor(self.splits[1:], device=targets.device)
        bucket = torch.bucketize(targets, cuts, right=True)
        return bucket, torch.where(bucket == 0, targets, size - bucket)


def default_splits(ntoken: int) -> list[int]:
    """The cuts of a vocabulary of `ntoken` words, without cuts beyond its end."""
    if ntoken > 500_000:
        splits = [4200, 35_000, 180_000]
    elif ntoken > 75_000:
        splits = [2800, 20_000, 76_000]
    else:
        splits = []
    return [cut for cut in splits if cut < ntoken]
