"""One epoch of training, and evaluation: mechanics without policy."""

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from model import RNNModel
from utils import ToolkitError, batch_line, get_batch, repackage_hidden


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
    max_batches: int | None = None,
    log_interval: int = 200,
    log: Callable[[str], None] = lambda line: None,
) -> float:
    """Train one pass over `source` (rows, bsz); return the mean raw cross-entropy, nats a token.

    The optimiser's rate is scaled by `seq_len / bptt` for each batch. The gradient over all of the
    optimiser's parameters is clipped to the norm `clip`, unless that is 0. `log` is given the
    classic line every `log_interval` batches. `max_batches` stops early.

    Raises ToolkitError when the loss is no longer a number.
    """
    model.train()
    model.reset()
    hidden = model.init_hidden(source.size(1))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    batches = max(1, (source.size(0) - 1) // bptt) if max_batches is None else max_batches
    total = torch.zeros((), dtype=torch.float64, device=source.device)
    interval = torch.zeros_like(total)
    tokens = done = 0
    norm: Tensor | float = math.nan
    start = time.perf_counter()
    i = 0
    # The last batch has at least two rows of inputs, so that TAR is defined.
    while i < source.size(0) - 2 and (max_batches is None or done < max_batches):
        seq_len = draw_seq_len(rng, bptt, max_seq_len)
        data, targets = get_batch(source, i, seq_len)
        hidden = repackage_hidden(hidden)
        optimizer.zero_grad(set_to_none=True)
        output, hidden, raw, dropped = model(data, hidden, return_h=True)
        raw_loss = criterion(model.decoder.weight, model.decoder.bias, output, targets)
        loss = raw_loss + regularisation(raw[-1], dropped[-1], alpha, beta)
        loss.backward()
        if clip:
            norm = nn.utils.clip_grad_norm_(params, clip)
        _step_at_rate(optimizer, seq_len / bptt)

        raw_loss = raw_loss.detach().double()
        interval += raw_loss
        total += raw_loss * len(targets)
        tokens += len(targets)
        i += len(data)
        done += 1
        if done % log_interval == 0:
            mean = interval.item() / log_interval
            _check_finite(mean, done, optimizer, norm)
            elapsed = time.perf_counter() - start
            lr = optimizer.param_groups[0]["lr"]
            log(batch_line(epoch, done, batches, lr, elapsed * 1000 / log_interval, mean))
            interval.zero_()
            start = time.perf_counter()
    mean = total.item() / tokens
    _check_finite(mean, done, optimizer, norm)
    return mean


@torch.inference_mode()
def evaluate(
    model: RNNModel,
    criterion: nn.Module,
    source: Tensor,
    bptt: int,
    max_batches: int | None = None,
) -> float:
    """Mean cross-entropy, nats a predicted token, over `source` (rows, bsz) in chunks of `bptt`.

    The hidden state is carried from chunk to chunk. The mean is over the `rows - 1` positions that
    have a next word. `max_batches` stops early.
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
    # What the QRNN kept was made in inference mode and must not reach training.
    model.reset()
    return total.item() / rows


def _step_at_rate(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """One step with every rate scaled for this batch alone."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * scale
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _check_finite(
    loss: float, batch: int, optimizer: torch.optim.Optimizer, norm: Tensor | float
) -> None:
    if not math.isfinite(loss):
        raise ToolkitError(
            f"the training loss became {loss} by batch {batch} at the rate "
            f"{optimizer.param_groups[0]['lr']:g} (last gradient norm {float(norm):g}): lower --lr "
            "or set --clip; the saved model is the last good one"
        )
