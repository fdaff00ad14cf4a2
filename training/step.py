"""One step of training, eagerly: forward, loss, backward, clipping and update."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loss import TrainingLoss
from nt_asgd import NTASGD
from training.parallel import ALONE, Ranks
from utils import ToolkitError, get_batch, map_state, repackage_hidden

# Rows of text that tell whether a run is resumed on the order of text that it stopped in.
_ROWS_TO_COMPARE = 16


class TrainingStep:
    """Steps of `optimizer` over `source` (rows, batch), the corpus in columns, and where it stands.

    The rate is scaled by `seq_len / bptt` for each step. The gradient over all of the optimiser's
    parameters is clipped to the norm `clip`, unless that is 0. Among several `ranks`, `source` is
    this rank's columns, `batch_fraction` their fraction of the batch, and `network` the wrapper
    that averages gradients; otherwise `network` is the TrainingLoss itself.

    `row` is the next step's first row, `batches` the steps since the epoch's start and `since`
    those since the last log line. On the device and updated in place are `hidden`, the state that
    is carried over; `total` and `interval`, sums of the raw cross-entropy in nats, of each row's
    mean in the epoch and of each step's mean since the last log line, this rank's fraction of both;
    and `norm`, the last gradient's.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        source: Tensor,
        *,
        bptt: int,
        clip: float,
        ranks: Ranks = ALONE,
        batch_fraction: float = 1.0,
    ) -> None:
        self.network = network
        self.loss = network if isinstance(network, TrainingLoss) else network.module
        self.model = self.loss.model
        self.optimizer = optimizer
        self.source = source
        self.bptt = bptt
        self.clip = clip
        self.ranks = ranks
        self.batch_fraction = batch_fraction
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.row = self.batches = self.since = 0
        device = source.device
        self.hidden = map_state(torch.clone, self.model.init_hidden(source.size(1)))
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.interval = torch.zeros((), dtype=torch.float64, device=device)
        self.norm = torch.full((), torch.nan, device=device)
        self._first_row = torch.zeros((), dtype=torch.int64, device=device)
        self._rows = torch.arange(source.size(0), device=device)

    def begin(self, position: Mapping[str, Any] | None = None) -> None:
        """Stand at the start of an epoch, or at a `position` within it, all ranks' columns in it.

        Raises ToolkitError if the text does not go on as it did at that position.
        """
        self.network.train()
        columns, device = self.source.size(1), self.source.device
        hidden = self.model.init_hidden(columns)
        self.row = self.batches = self.since = 0
        total = interval = 0.0
        if position is not None and position["row"]:
            self.row, self.batches, self.since = (
                position[name] for name in ("row", "batches", "since")
            )
            if self.ranks.first:
                total, interval = position["total"], position["interval"]
            hidden = map_state(lambda part: self.ranks.own(part).to(device), position["hidden"])
            # Files from before it was recorded have no text.
            text = position.get("text")
            if text is not None and not torch.equal(self.ranks.own(text), self._next_text()):
                raise ToolkitError(
                    "the text does not go on as it did where the run stopped: resume it with the "
                    "flags that it had"
                )
        map_state(Tensor.copy_, self.hidden, hidden)
        self.total.fill_(total)
        self.interval.fill_(interval)

    def position(self) -> dict[str, Any] | None:
        """Where the epoch stands, for `begin`, as plain values and CPU tensors.

        To be called by every rank at once: all ranks' columns are in it, and it is None off the
        first.
        """
        mine = {"hidden": map_state(_on_cpu, self.hidden), "text": self._next_text()}
        parts = self.ranks.gathered(mine)
        total, interval = (self.ranks.total(float(t)) for t in (self.total, self.interval))
        if parts is None:
            return None
        return {
            "row": self.row,
            "batches": self.batches,
            "since": self.since,
            "total": total,
            "interval": interval,
            **map_state(lambda *columns: torch.cat(columns, dim=1), *parts),
        }

    @torch.no_grad()
    def next_loss(self) -> float:
        """The loss of this rank's next batch; weights, buffers and generators stay as they are."""
        device, row = self.source.device, self.row if self.row < len(self.source) - 1 else 0
        batch = get_batch(self.source, row, self.bptt)
        buffers = {name: buffer.clone() for name, buffer in self.loss.named_buffers()}
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            loss, _, _ = torch.func.functional_call(self.loss, buffers, (*batch, self.hidden))
        return float(loss)

    def _next_text(self) -> Tensor:
        return _on_cpu(self.source[self.row : self.row + _ROWS_TO_COMPARE])

    def take(self, rows: int, seq_len: int) -> None:
        """Train on the next `rows` rows; `seq_len` is the length that scales the rate."""
        self.batches += 1
        self.since += 1
        if isinstance(self.optimizer, NTASGD):
            self.optimizer.count()
        self._compute(rows, seq_len)
        self.row += rows

    def _compute(self, rows: int, seq_len: int) -> None:
        self._first_row.fill_(self.row)
        scale = seq_len / self.bptt
        with self.rates([group["lr"] * scale for group in self.optimizer.param_groups]):
            self.work(rows)

    @contextlib.contextmanager
    def rates(self, rates: list[float | Tensor]) -> Iterator[None]:
        """Within this context the optimiser's rates are those of one step."""
        groups = self.optimizer.param_groups
        own = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, rate in zip(groups, own, strict=True):
                group["lr"] = rate

    def work(self, rows: int, averaging_weight: Tensor | None = None) -> None:
        """The step itself, at the rates that the optimiser's groups hold.

        `averaging_weight` is 1 / number of averaged steps, as a device tensor. With it, and with
        rates that are tensors, nothing waits for a number from the device.
        """
        index = self._first_row + self._rows[: rows + 1]
        data, targets = get_batch(self.source.index_select(0, index), 0, rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss, raw_loss, hidden = self.network(data, targets, repackage_hidden(self.hidden))
        # The ranks' gradients are averaged: a fraction of 1 / world needs no weight.
        world = self.ranks.world
        (loss * (self.batch_fraction * world) if world > 1 else loss).backward()
        self._update(averaging_weight)
        raw_loss = raw_loss.double() * self.batch_fraction
        self.interval += raw_loss
        self.total += raw_loss * rows
        map_state(Tensor.copy_, self.hidden, repackage_hidden(hidden))

    def _update(self, averaging_weight: Tensor | None) -> None:
        grads = [p.grad for p in self.params if p.grad is not None]
        scale: Tensor | float = 1.0
        if self.clip:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            self.norm.copy_(norm)
            scale = (self.clip / (norm + 1e-6)).clamp(max=1.0)
        if isinstance(self.optimizer, NTASGD):
            # Scaled within the update: that saves a pass over the gradients.
            self.optimizer.update(scale, averaging_weight)
        else:
            if self.clip:
                torch._foreach_mul_(grads, scale)
            self.optimizer.step()


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
