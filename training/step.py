"""One eager training step: forward, loss, backward, clipping and update."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loss import TrainingLoss
from nt_asgd import NTASGD
from training.parallel import ALONE, Ranks
from utils import ToolkitError, get_batch, map_state, repackage_hidden

# Rows of text compared at resumption, to detect a different order of the text.
_ROWS_TO_COMPARE = 16


class TrainingStep:
    """Steps of `optimizer` over `source` (rows, batch), the corpus in columns, and their position.

    The rate is scaled by `seq_len / bptt` for each step. The gradient over all of the optimiser's
    parameters is clipped to the norm `clip`, unless that is 0. Among several `ranks`, `source` is
    this rank's columns, `batch_fraction` their fraction of the batch, and `network` the wrapper
    that averages gradients; otherwise `network` is the TrainingLoss itself.

    `row` is the next step's first row, `batches` the number of steps since the epoch's start and
    `since` the number since the last log line. These tensors are updated in place on the device:
    `hidden`, the carried-over state; `total`, the sum of the rows' mean raw cross-entropy in the
    epoch, and `interval`, the sum of the steps' means since the last log line, both in nats and
    this rank's fraction; `norm`, the norm of the last gradient.
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
        """Start an epoch, or resume it at a `position`, which holds all ranks' columns.

        Raises ToolkitError if the text at that position differs from the recorded text.
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
            # Older files lack `text`.
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
        """The position in the epoch, for `begin`, as plain values and CPU tensors.

        Every rank must call this. It returns all ranks' columns on the first rank, and None on the
        others.
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
        """The loss of this rank's next batch; weights, buffers and generators stay unchanged."""
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
        self._compute(rows, seq_len)
        self.row += rows

    def _compute(self, rows: int, seq_len: int) -> None:
        self._first_row.fill_(self.row)
        scale = seq_len / self.bptt
        with self.rates([group["lr"] * scale for group in self.optimizer.param_groups]):
            self.work(rows)

    @contextlib.contextmanager
    def rates(self, rates: list[float | Tensor]) -> Iterator[None]:
        """A context in which the optimiser's groups have the given `rates`."""
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
        """The step itself, at the rates in the optimiser's groups.

        `averaging_weight` is 1 / number of averaged steps, as a device tensor. With it, and with
        rates that are tensors, the step never waits for the device.
        """
        index = self._first_row + self._rows[: rows + 1]
        data, targets = get_batch(self.source.index_select(0, index), 0, rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss, raw_loss, hidden = self.network(data, targets, repackage_hidden(self.hidden))
        # The ranks' gradients are averaged, so a batch fraction of 1 / world has weight 1.
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
            # Scaling within the update saves a pass over the gradients.
            self.optimizer.step(gradient_scale=scale, averaging_weight=averaging_weight)
        else:
            if self.clip:
                torch._foreach_mul_(grads, scale)
            self.optimizer.step()


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
