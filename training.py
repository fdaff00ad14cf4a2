"""Training and evaluation: random sequence lengths, one step, one epoch, the loss of a text.

"Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils import get_batch, repackage_hidden


def draw_seq_len(rng: np.random.RandomState, bptt: int, max_seq_len: int | None = None) -> int:
    """A random sequence length: about `bptt`, or one time in twenty about half of that.

    Section 4.1. The length is at least 5 and, if given, at most `max_seq_len`.
    """
    base = bptt if rng.random() < 0.95 else bptt / 2
    seq_len = max(5, int(rng.normal(base, 5)))
    return seq_len if max_seq_len is None else min(seq_len, max_seq_len)


class TrainingStep:
    """Steps of `optimizer` along `source` (rows, batch), the corpus in columns.

    `network` is a loss.TrainingLoss. The gradient over all of the optimiser's parameters is clipped
    to the norm `clip`, unless that is 0.

    `row` is the next step's first row, `batches` the number of steps since the text's start and
    `since` the number since the last log line. `hidden` is the carried-over state. `total` is the
    sum of the rows' mean raw cross-entropy so far, and `interval` the sum of the steps' means since
    the last log line, both in nats, as float64 tensors on the device; `norm` is the norm of the
    last gradient.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        source: Tensor,
        *,
        bptt: int,
        clip: float,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.source = source
        self.bptt = bptt
        self.clip = clip
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.norm = torch.full((), torch.nan, device=source.device)
        self.total = torch.zeros((), dtype=torch.float64, device=source.device)
        self.interval = self.total.clone()
        self.begin()

    def begin(self, position: Mapping[str, Any] | None = None) -> None:
        """Go to the start of the text, or to a `position` in it: values of the attributes by name.

        The values are those of `row`, `batches`, `since`, `hidden`, `total` and `interval`.
        """
        if position is None:
            hidden = self.network.init_hidden(self.source.size(1))
            position = {"row": 0, "batches": 0, "since": 0, "hidden": hidden}
        self.row, self.batches = position["row"], position["batches"]
        self.since, self.hidden = position["since"], position["hidden"]
        self.total.fill_(position.get("total", 0.0))
        self.interval.fill_(position.get("interval", 0.0))

    def take(self, rows: int, seq_len: int) -> None:
        """Train on the next `rows` rows; `seq_len` is the length that scales the rate."""
        scale, groups = seq_len / self.bptt, self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * scale
        data, targets = get_batch(self.source, self.row, rows)
        raw_loss = self.compute(data, targets)
        self.total += raw_loss * rows
        self.interval += raw_loss
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        self.row += rows
        self.batches += 1
        self.since += 1

    def compute(self, data: Tensor, targets: Tensor) -> Tensor:
        """Forward, backward and update on one batch; returns its raw cross-entropy, as float64."""
        # The state is detached, so that gradients end at the batch's first token.
        hidden = repackage_hidden(self.hidden)
        self.optimizer.zero_grad()
        loss, raw_loss, self.hidden = self.network(data, targets, hidden)
        loss.backward()
        self.update()
        return raw_loss.double()

    def refresh(self) -> None:
        """Do nothing: only a step recorded on a GPU must be told that a number has changed."""

    def update(self) -> None:
        """Clip the gradient, then let the optimiser take its step."""
        if self.clip:
            self.norm = nn.utils.clip_grad_norm_(self.params, self.clip)
        self.optimizer.step()


def train_epoch(
    step: TrainingStep,
    rng: np.random.RandomState,
    *,
    max_seq_len: int | None = None,
    fixed_length: bool = False,
    max_batches: int | None = None,
) -> Iterator[int]:
    """Train from the position of `step` to the end of its text; yields each batch's number.

    With `fixed_length` every sequence is the step's `bptt` long, and `rng` is not used;
    `max_batches` ends the epoch early.
    """
    step.network.train()
    length = step.source.size(0)
    # The last batch has at least two rows of inputs, so that TAR is defined.
    while step.row < length - 2 and (max_batches is None or step.batches < max_batches):
        seq_len = step.bptt if fixed_length else draw_seq_len(rng, step.bptt, max_seq_len)
        step.take(min(seq_len, length - 1 - step.row), seq_len)
        yield step.batches


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    source: Tensor,
    bptt: int,
    max_batches: int | None = None,
    after_chunk: Callable[[int], None] = lambda tokens: None,
) -> float:
    """Mean cross-entropy, nats a predicted token, over `source` (rows, bsz) in chunks of `bptt`.

    The hidden state is carried from chunk to chunk. The mean is over the `rows - 1` positions that
    have a next word. `max_batches` stops early; `after_chunk` gets the number of tokens of each
    chunk and may raise to end the evaluation.
    """
    network.eval()
    hidden = network.init_hidden(source.size(1))
    total = torch.zeros((), dtype=torch.float64, device=source.device)
    rows = 0
    for chunk, i in enumerate(range(0, source.size(0) - 1, bptt)):
        if chunk == max_batches:
            break
        data, targets = get_batch(source, i, bptt)
        _, raw_loss, hidden = network(data, targets, hidden)
        total += raw_loss.double() * len(data)
        rows += len(data)
        after_chunk(data.numel())
    return total.item() / rows
