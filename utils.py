"""Small things every stage needs: batches, hidden states, seeds, perplexity."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ToolkitError(Exception):
    """A problem the user can fix; its text is one sentence: the problem and the fix."""


def batchify(data: Tensor, bsz: int) -> Tensor:
    """Lay a stream of ids (n,) out in `bsz` columns: (n // bsz, bsz).

    Each column is a separate stream, read downwards; the tail of the data that does not fill `bsz`
    equal columns is dropped::

        a b c d e f g  in 3 columns:  a c e
                                      b d f
    """
    rows = data.size(0) // bsz
    return data[: rows * bsz].view(bsz, rows).t().contiguous()


def get_batch(source: Tensor, i: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Inputs (n, bsz) from row `i` of `source` (rows, bsz) on, and their next words (n * bsz,).

    `n = min(seq_len, rows - 1 - i)`. Both are int64, whatever the ids are stored as.
    """
    n = min(seq_len, source.size(0) - 1 - i)
    window = source[i : i + n + 1].long()
    return window[:-1], window[1:].flatten()


def check_length(source: Tensor, name: str, cure: str, columns: int | None = None) -> None:
    """Raise ToolkitError if `source` (rows, bsz) is too short to train on or to evaluate.

    `columns` is the number over all processes, by default the number in `source`.
    """
    if source.size(0) < 3:
        columns = columns or source.size(1)
        raise ToolkitError(
            f"{name} is too short for {columns} columns of 3 or more tokens each: {cure}"
        )


def map_state(function: Callable[..., Any], state: Any, *others: Any) -> Any:
    """Apply `function` to each tensor of a hidden state and its counterparts in the `others`.

    A state is a tensor, or lists, tuples or dictionaries of states; the result has its structure.
    Raises ValueError, TypeError or KeyError if the structure of the others differs.
    """
    if isinstance(state, Tensor):
        return function(state, *others)
    if type(state) not in (dict, list, tuple):
        kind = type(state).__qualname__
        raise TypeError(f"a state holds tensors, lists, tuples and dictionaries, not a {kind}")
    if isinstance(state, dict):
        return {k: map_state(function, state[k], *(other[k] for other in others)) for k in state}
    return type(state)(map_state(function, *parts) for parts in zip(state, *others, strict=True))


def check_state(state: Any, bsz: int) -> None:
    """Raise ToolkitError if a hidden state is not one of tensors with `bsz` columns."""

    def check(part: Tensor) -> None:
        if part.dim() < 2 or part.size(1) != bsz:
            raise TypeError(f"it holds a tensor of the shape {tuple(part.shape)}")

    try:
        map_state(check, state)
    except TypeError as error:
        raise ToolkitError(
            f"the network's initial state cannot be carried from batch to batch ({error}): make "
            f"it of tensors with the batch in dimension 1, here {bsz} columns"
        ) from None


def repackage_hidden(hidden: Any) -> Any:
    """The same state, detached from the graph that computed it."""
    return map_state(Tensor.detach, hidden)


def seed_everything(seed: int) -> np.random.RandomState:
    """Seed PyTorch, numpy and `random`, and return the generator of the sequence lengths.

    It is numpy's legacy generator, so that a seed gives the same lengths as in the original.
    """
    torch.manual_seed(seed)
    # The global generators are for a researcher's change; the toolkit draws nothing from them.
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    return np.random.RandomState(seed)


def predicted(source: Tensor, bptt: int, max_batches: int | None) -> int:
    """The rows of `source` that are predicted, at most those of `max_batches` chunks of `bptt`."""
    most = source.size(0) - 1
    return most if max_batches is None else min(most, max_batches * bptt)


def perplexity(loss: float) -> float:
    """`exp(loss)` for a loss in nats a token; infinite on overflow."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits(loss: float) -> float:
    """A loss in nats a token as bits a token: bits per character on a character corpus."""
    return loss / math.log(2)
