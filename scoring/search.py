"""The continuous cache at many settings at once, over stored outputs.

The attention scores of a block of positions are computed once, and their exponentials once for each
theta. Windows are nested, so each window's sum is a sum over rings of ages. The best lambda of a
theta and a window is the root of a decreasing function of per-token probabilities.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from continuous_cache import ContinuousCache
from scoring.stream import Piece, with_cache

# A block of b positions needs a few times b * (b + window) numbers at a time.
_BLOCK = 128

WINDOWS = (100, 250, 500, 1000, 2000, 3785)
THETAS = (0.1, 0.2, 0.3, 0.45, 0.6625523432485668, 1.0, 1.5, 2.2)
_MAX_LAMBDA = 0.999
# The finer grid has these multiples of the best window and theta.
_NEAR = (0.63, 0.794, 1.0, 1.26, 1.587)


class Setting(NamedTuple):
    """A setting of the cache, and the mean loss with it, in nats a token."""

    window: int
    theta: float
    lambdasm: float
    loss: float


def target_probs(
    outputs: Tensor,
    words: Tensor,
    windows: Sequence[int],
    thetas: Sequence[float],
    tick: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """The cache's probability of each of `words` at every window and theta, from the start on.

    `outputs` (n, size) and `words` (n,) are as for ContinuousCache.target_prob; `windows` ascend.
    Returns (windows, thetas, n); the first position, which has no history, has 0. `tick` gets the
    number of positions of each block done.
    """
    n, device = len(words), outputs.device
    width = min(windows[-1], max(1, n - 1))
    # Columns 0 to width - 1 hold a position's history, oldest first. Ring r is the columns from
    # starts[r] to starts[r - 1]: the ages in window r but not in window r - 1.
    starts = [max(0, width - window) for window in windows]
    rings = list(zip(starts, [width, *starts], strict=False))
    result = outputs.new_zeros(len(windows), len(thetas), n)
    column = torch.arange(width, device=device)
    # Before the stream's start there is a history that no query may see.
    past = functional.pad(outputs, (0, 0, width, 0))
    past_words = functional.pad(words, (width, 0), value=-1)
    for first in range(0, n, _BLOCK):
        rows = min(_BLOCK, n - first)
        history, queries = slice(first, first + width + rows - 1), slice(first, first + rows)
        scores = outputs[queries] @ past[history].t()
        same = words[queries].unsqueeze(1) == past_words[history]
        # Row i's history starts i columns further right; a stride one larger aligns the rows.
        band = scores.as_strided((rows, width), (width + rows, 1))
        row, col = same.as_strided((rows, width), (width + rows, 1)).nonzero(as_tuple=True)
        # The rows and scores of the equal words within each window.
        equal = band[row, col]
        matches = [(row[col >= a], equal[col >= a]) for a in starts]
        position = torch.arange(first, first + rows, device=device).unsqueeze(1)
        outside = column < width - position
        for k, theta in enumerate(thetas):
            powers = band.mul(theta)
            if first < width:
                powers.masked_fill_(outside, -torch.inf)
            sums = torch.stack([powers[:, a:b].logsumexp(dim=1) for a, b in rings])
            totals = sums.logcumsumexp(dim=0)
            for w, (at, found) in enumerate(matches):
                result[w, k, queries].index_add_(0, at, (found * theta - totals[w, at]).exp())
        tick(rows)
    return result


def best_lambda(logprob: Tensor, p_cache: Tensor) -> tuple[float, float]:
    """The lambda in [0, 0.999] at which the mixture's loss is lowest, and the gain in log p.

    `logprob` (n,) is the model's log p in nats, `p_cache` (n,) the cache's p, both at the positions
    where the cache is in use. The gain is the sum of `log(mixture) - logprob`, 0 or more.
    """
    # With r = p_cache / p - 1 the gain is the sum of log(1 + lambda r), which is concave.
    r = (p_cache.double() * logprob.double().clamp(min=-700).neg().exp()).sub_(1)

    def rises(x: float) -> bool:
        return (r / (r * x + 1)).sum().item() > 0

    if not rises(0.0):
        return 0.0, 0.0
    low, high = 0.0, _MAX_LAMBDA
    # Twenty halvings: to the sixth digit.
    for _ in range(0 if rises(high) else 20):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) else (low, middle)
    return high, (r * high).log1p_().sum().item()


def grid(
    piece: Piece,
    windows: Sequence[int],
    thetas: Sequence[float],
    from_start: bool,
    tick: Callable[[int], None] = lambda n: None,
) -> list[Setting]:
    """The settings of every window with every theta, each at its best lambda."""
    probs = target_probs(piece.outputs, piece.words, windows, thetas, tick)
    n = len(piece.words)
    total = piece.logprob.double().sum().item()
    settings = []
    for w, window in enumerate(windows):
        start = 1 if from_start else window + 1  # where the cache is first in use
        for k, theta in enumerate(thetas):
            lambdasm, gain = best_lambda(piece.logprob[start:], probs[w, k, start:])
            settings.append(Setting(window, theta, lambdasm, -(total + gain) / n))
    return settings


@torch.inference_mode()
def search(
    piece: Piece, given: Setting, from_start: bool, tick: Callable[[int], None] = lambda n: None
) -> tuple[list[Setting], Setting]:
    """The settings of the grid, and the best setting: of the grid, near its best, or `given`.

    `given` has its loss and is one of the candidates, so the best setting is at least as good.
    `tick` gets the number of positions of each block done; two grids go over all positions.
    """
    windows = sorted({*WINDOWS, given.window})
    table = grid(piece, windows, sorted({*THETAS, given.theta}), from_start, tick)
    best = min(table, key=lambda setting: setting.loss)
    near = sorted({min(round(best.window * factor), windows[-1]) for factor in _NEAR})
    finer = grid(piece, near, [best.theta * factor for factor in _NEAR], from_start, tick)
    best = min([best, *finer], key=lambda setting: setting.loss)
    # Rounded, so that they can be typed as flags.
    best = best._replace(theta=float(f"{best.theta:.4g}"), lambdasm=round(best.lambdasm, 4))
    best = best._replace(loss=loss_at(piece, best, from_start))
    return table, min([given, best], key=lambda setting: setting.loss)


def logprobs_at(piece: Piece, setting: Setting, from_start: bool) -> Tensor:
    """`log p` (n,) of the words in nats, with the cache at `setting`."""
    cache = ContinuousCache(setting.window, setting.theta, from_start)
    return with_cache(piece, cache, setting.lambdasm)[0]


def loss_at(piece: Piece, setting: Setting, from_start: bool) -> float:
    """The mean loss in nats a token, with the cache at `setting`."""
    return -logprobs_at(piece, setting, from_start).double().mean().item()
