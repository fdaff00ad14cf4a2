"""One epoch of training, and evaluation: mechanics without policy."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cli.progress import Bar
from data import Corpus
from model import Hidden, RNNModel
from training.parallel import ALONE, Ranks
from training.step import TrainingStep
from utils import (
    ToolkitError,
    batch_line,
    batchify,
    check_length,
    get_batch,
)

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


@dataclass
class Position:
    """Where an epoch stands between two batches; a new one is the epoch's start.

    `row` is the next batch's first row. `hidden` is the state carried over, None at the start, and
    `kept` what each QRNN layer keeps of its inputs. `total` is the raw cross-entropy of the rows so
    far, the sum of each row's mean in nats; `interval` that of the `since` batches since the last
    log line, each a mean. Both count this rank's share. `norm` is the last gradient norm.
    """

    row: int = 0
    batches: int = 0
    since: int = 0
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
            "since": self.since,
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
        counts = {name: state[name] for name in ("row", "batches", "since")}
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
    step: TrainingStep,
    *,
    epoch: int,
    rng: np.random.RandomState,
    max_seq_len: int | None = None,
    fixed_length: bool = False,
    max_batches: int | None = None,
    log_interval: int = 200,
    log: Callable[[str], None] = lambda line: None,
    report: Callable[..., None] = lambda **numbers: None,
    position: Position | None = None,
    after_batch: Callable[[Position], None] = _nothing,
) -> float:
    """Train one pass over the text of `step`; return the mean raw cross-entropy, nats a token.

    `log` is given the classic line every `log_interval` batches, and `report` its numbers by name:
    `row` and `batch` within the epoch, `lr`, `loss`, `tokens_per_second`, `grad_norm`.
    `max_batches` stops early. With `fixed_length` every sequence is the step's `bptt` long, and
    `rng` is not used.

    `position` is where to go on within the epoch; it is kept up to date, and `after_batch` is given
    it after every batch.

    Raises ToolkitError when the loss is no longer a number.
    """
    at = Position() if position is None else position
    ranks, optimizer, length = step.ranks, step.optimizer, step.source.size(0)
    step.begin(at.hidden, at.kept)
    step.total.fill_(at.total)
    step.interval.fill_(at.interval)
    at.hidden, at.kept = step.hidden, step.kept
    at.total, at.interval, at.norm = step.total, step.interval, step.norm
    batches = max(1, (length - 1) // step.bptt) if max_batches is None else max_batches
    start = time.perf_counter()
    timed_from, timed_row = at.batches, at.row
    # The last batch has at least two rows of inputs, so that TAR is defined.
    while at.row < length - 2 and (max_batches is None or at.batches < max_batches):
        seq_len = step.bptt if fixed_length else draw_seq_len(rng, step.bptt, max_seq_len)
        rows = min(seq_len, length - 1 - at.row)
        step.run(at.row, rows, seq_len)
        at.row += rows
        at.batches += 1
        at.since += 1
        if at.batches % log_interval == 0:
            # A run that was resumed may have had another interval.
            mean = ranks.total(at.interval.item()) / at.since
            _check_finite(mean, at, optimizer)
            elapsed = time.perf_counter() - start
            lr = optimizer.param_groups[0]["lr"]
            ms = elapsed * 1000 / (at.batches - timed_from)
            log(batch_line(epoch, at.batches, batches, lr, ms, mean))
            columns = step.source.size(1) / step.share
            report(
                row=at.row,
                batch=at.batches,
                lr=lr,
                loss=mean,
                tokens_per_second=(at.row - timed_row) * columns / elapsed,
                grad_norm=float(at.norm),
            )
            at.interval.zero_()
            at.since = 0
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
    what: str = "",
) -> float:
    """Mean cross-entropy, nats a predicted token, over `source` (rows, bsz) in chunks of `bptt`.

    The hidden state is carried from chunk to chunk. The mean is over the `rows - 1` positions that
    have a next word. `max_batches` stops early. `after_chunk` may end it by raising. Among several
    `ranks`, `source` is this rank's columns, and the mean is over those of all. On a terminal a bar
    is shown if it is told `what` this is.
    """
    model.eval()
    model.reset()
    hidden = model.init_hidden(source.size(1))
    total = torch.zeros((), dtype=torch.float64, device=source.device)
    rows = 0
    with Bar(source.numel(), what, wanted=bool(what) and ranks.first) as bar:
        for chunk, i in enumerate(range(0, source.size(0) - 1, bptt)):
            if chunk == max_batches:
                break
            data, targets = get_batch(source, i, bptt)
            output, hidden = model(data, hidden)
            loss = criterion(model.decoder.weight, model.decoder.bias, output, targets)
            total += loss.double() * len(data)
            rows += len(data)
            bar.update(data.numel())
            after_chunk()
    # What the QRNN kept was made in inference mode and must not reach training.
    model.reset()
    return ranks.mean(total.item() / rows, weight=source.size(1))


def _check_finite(loss: float, position: Position, optimizer: torch.optim.Optimizer) -> None:
    if not math.isfinite(loss):
        raise ToolkitError(
            f"the training loss became {loss} by batch {position.batches} at the rate "
            f"{optimizer.param_groups[0]['lr']:g} (last gradient norm {float(position.norm):g}): "
            "lower --lr or set --clip; the saved model is the last good one"
        )
