"""One epoch of training, and evaluation: mechanics without policy."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data import Corpus
from model import Hidden, RNNModel
from parallel import Ranks
from utils import (
    ToolkitError,
    batch_line,
    batchify,
    check_length,
    get_batch,
    repackage_hidden,
)

ALONE = Ranks()

EVAL_BATCH_SIZE = 10
TEST_BATCH_SIZE = 1


def in_columns(
    corpus: Corpus, batch_size: int, device: torch.device, ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor, Tensor]:
    """Train, valid and test of `corpus` in columns on `device`, of several `ranks` this one's.

    Raises ToolkitError if one of them is too short for its columns.
    """
    train = batchify(corpus.train, batch_size)
    valid = batchify(corpus.valid, EVAL_BATCH_SIZE)
    test = batchify(corpus.test, TEST_BATCH_SIZE)
    check_length(train, "train.txt", "lower --batch_size or bring a longer text")
    check_length(valid, "valid.txt", "bring a longer text")
    check_length(test, "test.txt", "bring a longer text")
    train, valid, test = (ranks.own(part).to(device) for part in (train, valid, test))
    return train, valid, test


def draw_seq_len(rng: np.random.RandomState, bptt: int, max_seq_len: int | None = None) -> int:
    """A random sequence length: about `bptt`, one time in twenty about half of it.

    arXiv 1708.02182, section 4.1. At least 5 and, if given, at most `max_seq_len`.
    """
    base = bptt if rng.random() < 0.95 else bptt / 2
    seq_len = max(5, int(rng.normal(base, 5)))
    return seq_len if max_seq_len is None else min(seq_len, max_seq_len)


def regularisation(raw: Tensor, dropped: Tensor, alpha: float, beta: float) -> Tensor | float:
    """Activation and temporal activation regularisation, arXiv 1708.02182, section 4.6.

    `alpha` times the mean square of the dropped output plus `beta` times the mean square of the
    differences between successive steps of the raw output, both (seq_len, batch, size).
    """
    penalty: Tensor | float = 0.0
    if alpha:
        penalty = penalty + alpha * dropped.pow(2).mean()
    if beta and raw.size(0) > 1:
        penalty = penalty + beta * (raw[1:] - raw[:-1]).pow(2).mean()
    return penalty


class TrainingLoss(nn.Module):
    """Model, criterion and activation penalties as one module, whose gradients can be shared.

    Every trained parameter is used within its forward, as DistributedDataParallel needs it.
    """

    def __init__(self, model: RNNModel, criterion: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion

    def forward(
        self, data: Tensor, targets: Tensor, hidden: Hidden, alpha: float, beta: float
    ) -> tuple[Tensor, Tensor, Hidden]:
        """The loss to minimise, its raw cross-entropy (both nats a token), the new hidden state.

        `data` is (seq_len, batch), `targets` (seq_len * batch,).
        """
        model = self.model
        output, hidden, raw, dropped = model(data, hidden, return_h=True)
        raw_loss = self.criterion(model.decoder.weight, model.decoder.bias, output, targets)
        loss = raw_loss + regularisation(raw[-1], dropped[-1], alpha, beta)
        return loss, raw_loss.detach(), hidden


@dataclass
class Position:
    """Where an epoch stands between two batches; a new one is the epoch's start.

    `row` is the next batch's first row. `hidden` is the state carried over, None at the start, and
    `kept` what each QRNN layer keeps of its inputs. `total` is the raw cross-entropy of the rows so
    far, the sum of each row's mean in nats; `interval` that of the batches since the last log line,
    each a mean. Both count this rank's share. `norm` is the last gradient norm.
    """

    row: int = 0
    batches: int = 0
    total: float | Tensor = 0.0
    interval: float | Tensor = 0.0
    norm: float | Tensor = math.nan
    hidden: Hidden | None = None
    kept: list[Tensor | None] = field(default_factory=list)

    def state(self, ranks: Ranks = ALONE) -> dict[str, Any] | None:
        """As plain values and CPU tensors, all ranks' columns together; None off the first rank."""
        parts = ranks.gathered((_on_cpu(self.hidden), _on_cpu(self.kept)))
        total, interval = ranks.total(float(self.total)), ranks.total(float(self.interval))
        if parts is None:
            return None
        return {
            "row": self.row,
            "batches": self.batches,
            "total": total,
            "interval": interval,
            "hidden": _joined([hidden for hidden, _ in parts]),
            "kept": _joined([kept for _, kept in parts]),
        }

    @classmethod
    def from_state(
        cls, state: dict[str, Any], device: torch.device, ranks: Ranks = ALONE
    ) -> "Position":
        """The position that `state` was made from, or this rank's share of it."""

        def own(value: Any) -> Any:
            if isinstance(value, Tensor):
                return ranks.own(value).to(device)
            return value if value is None else type(value)(own(part) for part in value)

        sums = {name: state[name] if ranks.first else 0.0 for name in ("total", "interval")}
        counts = {name: state[name] for name in ("row", "batches")}
        return cls(**counts, **sums, hidden=own(state["hidden"]), kept=own(state["kept"]))


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return value if value is None else type(value)(_on_cpu(part) for part in value)


def _joined(parts: Sequence[Any]) -> Any:
    """The columns of every rank's (n, columns, size) side by side, within lists and pairs."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts), dim=1)
    if parts[0] is None:
        return None
    return type(parts[0])(_joined(same) for same in zip(*parts, strict=True))


def _nothing(position: Position) -> None:
    """What is done after a batch unless something else is asked for."""


def train_epoch(
    model: RNNModel,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: Tensor,
    *,
    epoch: int,
    bptt: int,
    clip: float,
    alpha: float,
    beta: float,
    rng: np.random.RandomState,
    max_seq_len: int | None = None,
    fixed_length: bool = False,
    max_batches: int | None = None,
    log_interval: int = 200,
    log: Callable[[str], None] = lambda line: None,
    report: Callable[..., None] = lambda **numbers: None,
    position: Position | None = None,
    after_batch: Callable[[Position], None] = _nothing,
    network: nn.Module | None = None,
    ranks: Ranks = ALONE,
    share: float = 1.0,
) -> float:
    """Train one pass over `source` (rows, bsz); return the mean raw cross-entropy, nats a token.

    The optimiser's rate is scaled by `seq_len / bptt` for each batch. The gradient over all of the
    optimiser's parameters is clipped to the norm `clip`, unless that is 0. `log` is given the
    classic line every `log_interval` batches, and `report` its numbers by name: `row` and `batch`
    within the epoch, `lr`, `loss`, `tokens_per_second`, `grad_norm`. `max_batches` stops early.
    With `fixed_length` every sequence is `bptt` long, and `rng` is not used.

    `position` is where to go on within the epoch; it is kept up to date, and `after_batch` is given
    it after every batch. Among several `ranks`, `source` is this rank's columns, `share` their part
    of the batch, and `network` the TrainingLoss of `model` and `criterion` that averages gradients.

    Raises ToolkitError when the loss is no longer a number.
    """
    model.train()
    model.reset()
    network = TrainingLoss(model, criterion) if network is None else network.train()
    at = Position() if position is None else position
    hidden = model.init_hidden(source.size(1)) if at.hidden is None else at.hidden
    _set_kept(model, at.kept)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    batches = max(1, (source.size(0) - 1) // bptt) if max_batches is None else max_batches
    at.total = torch.as_tensor(at.total, dtype=torch.float64, device=source.device)
    at.interval = torch.as_tensor(at.interval, dtype=torch.float64, device=source.device)
    start = time.perf_counter()
    timed_from, timed_row = at.batches, at.row
    # The last batch has at least two rows of inputs, so that TAR is defined.
    while at.row < source.size(0) - 2 and (max_batches is None or at.batches < max_batches):
        seq_len = bptt if fixed_length else draw_seq_len(rng, bptt, max_seq_len)
        data, targets = get_batch(source, at.row, seq_len)
        optimizer.zero_grad(set_to_none=True)
        loss, raw_loss, hidden = network(data, targets, repackage_hidden(hidden), alpha, beta)
        # The ranks' gradients are averaged, so a share of 1 / world needs no weight.
        (loss * (share * ranks.world) if ranks.world > 1 else loss).backward()
        if clip:
            at.norm = nn.utils.clip_grad_norm_(params, clip)
        _step_at_rate(optimizer, seq_len / bptt)

        raw_loss = raw_loss.double() * share
        at.interval += raw_loss
        at.total += raw_loss * len(data)
        at.row += len(data)
        at.batches += 1
        at.hidden = hidden
        at.kept = _kept(model)
        if at.batches % log_interval == 0:
            mean = ranks.total(at.interval.item()) / log_interval
            _check_finite(mean, at, optimizer)
            elapsed = time.perf_counter() - start
            lr = optimizer.param_groups[0]["lr"]
            ms = elapsed * 1000 / (at.batches - timed_from)
            log(batch_line(epoch, at.batches, batches, lr, ms, mean))
            report(
                row=at.row,
                batch=at.batches,
                lr=lr,
                loss=mean,
                tokens_per_second=(at.row - timed_row) * source.size(1) / share / elapsed,
                grad_norm=float(at.norm),
            )
            at.interval.zero_()
            start = time.perf_counter()
            timed_from, timed_row = at.batches, at.row
        after_batch(at)
    mean = ranks.total(at.total.item()) / at.row
    _check_finite(mean, at, optimizer)
    return mean


def check_finite(
    position: Position, optimizer: torch.optim.Optimizer, ranks: Ranks = ALONE
) -> None:
    """Raise ToolkitError if the loss of a batch before `position` was not a number."""
    _check_finite(ranks.total(float(position.total)), position, optimizer)


@torch.inference_mode()
def evaluate(
    model: RNNModel,
    criterion: nn.Module,
    source: Tensor,
    bptt: int,
    max_batches: int | None = None,
    after_chunk: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> float:
    """Mean cross-entropy, nats a predicted token, over `source` (rows, bsz) in chunks of `bptt`.

    The hidden state is carried from chunk to chunk. The mean is over the `rows - 1` positions that
    have a next word. `max_batches` stops early. `after_chunk` may end it by raising. Among several
    `ranks`, `source` is this rank's columns, and the mean is over those of all.
    """
    model.eval()
    model.reset()
    hidden = model.init_hidden(source.size(1))
    total = torch.zeros((), dtype=torch.float64, device=source.device)
    rows = 0
    for chunk, i in enumerate(range(0, source.size(0) - 1, bptt)):
        if chunk == max_batches:
            break
        data, targets = get_batch(source, i, bptt)
        output, hidden = model(data, hidden)
        loss = criterion(model.decoder.weight, model.decoder.bias, output, targets)
        total += loss.double() * len(data)
        rows += len(data)
        after_chunk()
    # What the QRNN kept was made in inference mode and must not reach training.
    model.reset()
    return ranks.mean(total.item() / rows, weight=source.size(1))


def _kept(model: RNNModel) -> list[Tensor | None]:
    """What each layer of a QRNN keeps of its last inputs; nothing for other cells."""
    return [layer.prevX for layer in model.rnns] if model.rnn_type == "QRNN" else []


def _set_kept(model: RNNModel, kept: Sequence[Tensor | None]) -> None:
    for layer, inputs in zip(model.rnns, kept, strict=False):
        layer.prevX = inputs


def _step_at_rate(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """One step with every rate scaled for this batch alone."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * scale
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _check_finite(loss: float, position: Position, optimizer: torch.optim.Optimizer) -> None:
    if not math.isfinite(loss):
        raise ToolkitError(
            f"the training loss became {loss} by batch {position.batches} at the rate "
            f"{optimizer.param_groups[0]['lr']:g} (last gradient norm {float(position.norm):g}): "
            "lower --lr or set --clip; the saved model is the last good one"
        )
