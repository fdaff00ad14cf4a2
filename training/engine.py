"""One epoch of training, and evaluation: mechanics without policy."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from cli.progress import Bar
from data import Corpus
from model import RNNModel
from training.parallel import ALONE, Ranks
from training.step import TrainingStep
from utils import check_length, get_batch

EVAL_BATCH_SIZE = 10
TEST_BATCH_SIZE = 1


def in_columns(
    corpus: Corpus, batch_size: int, device: torch.device, ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor, Tensor]:
    """Train, valid and test of `corpus` in columns on `device`; with `ranks`, this rank's columns.

    Raises ToolkitError if one of them is too short for its columns.
    """
    counts = {"train": batch_size, "valid": EVAL_BATCH_SIZE, "test": TEST_BATCH_SIZE}
    parts = []
    for split, count in counts.items():
        own = corpus.columns(split, count, *ranks.span(count))
        cure = (
            "lower --batch_size or bring a longer text"
            if split == "train"
            else "bring a longer text"
        )
        check_length(own, f"{split}.txt", cure, count)
        parts.append(own.to(device))
    return tuple(parts)


def draw_seq_len(rng: np.random.RandomState, bptt: int, max_seq_len: int | None = None) -> int:
    """A random sequence length: about `bptt`, or one time in twenty about half of that.

    arXiv 1708.02182, section 4.1. The length is at least 5 and, if given, at most `max_seq_len`.
    """
    base = bptt if rng.random() < 0.95 else bptt / 2
    seq_len = max(5, int(rng.normal(base, 5)))
    return seq_len if max_seq_len is None else min(seq_len, max_seq_len)


def train_epoch(
    step: TrainingStep,
    rng: np.random.RandomState,
    *,
    max_seq_len: int | None = None,
    fixed_length: bool = False,
    max_batches: int | None = None,
) -> Iterator[None]:
    """Train from the position of `step` to the end of its text, and yield after every batch.

    With `fixed_length` every sequence is the step's `bptt` long, and `rng` is not used;
    `max_batches` ends the epoch early.
    """
    length = step.source.size(0)
    # The last batch has at least two rows of inputs, so that TAR is defined.
    while step.row < length - 2 and (max_batches is None or step.batches < max_batches):
        seq_len = step.bptt if fixed_length else draw_seq_len(rng, step.bptt, max_seq_len)
        step.take(min(seq_len, length - 1 - step.row), seq_len)
        yield


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
    have a next word. `max_batches` stops early; `after_chunk` may raise to end the evaluation. With
    several `ranks`, `source` has this rank's columns, and the mean is over all columns. If `what`,
    a name for the source, is given, a terminal shows a progress bar.
    """
    model.eval()
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
    return ranks.mean(total.item() / rows, weight=source.size(1))
