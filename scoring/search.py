"""The continuous cache at many settings at once, over stored outputs.

The attention scores of a block of positions are computed once, and their exponentials once for each
theta. Windows are nested, so each window's sum is a sum over rings of ages. The best lambda of a
theta and a window is the root of a decreasing function of per-token probabilities.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from continuous_cache import ContinuousCache
from scoring.stream import Piece, with_cache

# A block of b positions needs a few times b * (b + window) numbers at a time.
_BLOCK = 256
# A sum of exponentials below this has lost its digits; it is recomputed for its window alone.
_TINY = 1e-30

WINDOWS = (100, 250, 500, 1000, 2000, 3785)
THETAS = (0.1, 0.2, 0.3, 0.45, 0.6625523432485668, 1.0, 1.5, 2.2)
_MAX_LAMBDA = 0.999


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

    `outputs` (n, size) and `words` (n,) are as for ContinuousCache.target_prob. Returns
    (windows, thetas, n); the first position, which has no history, has 0. `tick` gets the number of
    positions of each block done.
    """
    n, device = len(words), outputs.device
    ascending = sorted(set(windows))
    width = min(ascending[-1], max(1, n - 1))
    # Columns 0 to width - 1 hold a position's history, oldest first. Ring r is the columns from
    # starts[r] to starts[r - 1]: the ages in window r but not in window r - 1.
    starts = [max(0, width - window) for window in ascending]
    ends = [width, *starts[:-1]]
    edges = torch.tensor([width - start for start in starts], device=device)
    result = outputs.new_zeros(len(ascending), len(thetas), n)
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
        position = torch.arange(first, first + rows, device=device).unsqueeze(1)
        outside = column < width - position
        top = band.masked_fill(outside, -torch.inf).amax(dim=1, keepdim=True).nan_to_num(neginf=0.0)
        band = (band - top).masked_fill_(outside, 0.0)  # any number that is finite at every theta
        matches = band[row, col]
        # The cell of a match: its row, and the smallest window that reaches back to it.
        cell = row * len(ascending) + torch.bucketize(width - col, edges)
        powers = torch.empty_like(band)
        for k, theta in enumerate(thetas):
            torch.mul(band, theta, out=powers).exp_()
            if first < width:
                powers.masked_fill_(outside, 0.0)
            rings = [powers[:, a:b].sum(dim=1) for a, b in zip(starts, ends, strict=True)]
            total = torch.stack(rings).cumsum(dim=0)
            hits = powers.new_zeros(rows * len(ascending))
            hits.index_add_(0, cell, matches.mul(theta).exp_())
            hits = hits.view(rows, len(ascending)).t().cumsum(dim=0)
            probs = torch.where(total > _TINY, hits / total, 0.0)
            for w, i in (total <= _TINY).nonzero().tolist():
                # The largest score was outside this window and far larger: relative to it, those
                # inside the window vanished.
                seen = slice(max(starts[w], width - first - i), width)
                match = past_words[first + i : first + i + width][seen] == words[first + i]
                probs[w, i] = (theta * band[i, seen]).softmax(dim=0)[match].sum()
            result[:, k, queries] = probs
        tick(rows)
    order = torch.tensor([ascending.index(window) for window in windows], device=device)
    return result[order]


def best_lambda(logprob: Tensor, p_cache: Tensor) -> tuple[float, float]:
    """The lambda in [0, 0.999] at which the mixture's loss is lowest, and the gain in log p.

    `logprob` (n,) is the model's log p in nats, `p_cache` (n,) the cache's p, both at the positions
    where the cache is in use. The gain is the sum of `log(mixture) - logprob`, 0 or more.
    """
    # With r = p_cache / p - 1 the gain is the sum of log(1 + lambda r), which is concave.
    r = (p_cache.double() * logprob.double().clamp(min=-700).neg().exp()).sub_(1)

    def slope(x: float) -> float:
        return (r / (r * x + 1)).sum().item()

    if not len(r) or slope(0.0) <= 0:
        return 0.0, 0.0
    low, high = 0.0, _MAX_LAMBDA
    if slope(high) >= 0:
        low = high
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return high, (r * high).log1p_().sum().item()


def first_used(window: int, from_start: bool) -> int:
    """The first position at which a cache of `window` is in use."""
    return 1 if from_start else window + 1


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
        start = first_used(window, from_start)
        for k, theta in enumerate(thetas):
            lambdasm, gain = best_lambda(piece.logprob[start:], probs[w, k, start:])
            settings.append(Setting(window, theta, lambdasm, -(total + gain) / n))
    return settings


def around(values: Sequence[float], best: float) -> list[float]:
    """Values to try between `best` and its neighbours in `values`; without one, beyond `best`."""
    values = sorted(set(values))
    at = values.index(best)
    if best == 0:  # a uniform cache: nothing below, and no logarithm
        return [fraction * values[1] for fraction in (1 / 3, 2 / 3)] if values[1:] else []
    tried = []
    below = values[at - 1] if at else best / 4
    above = values[at + 1] if at + 1 < len(values) else best * 4
    for other in (below, above):
        # Even steps of the logarithm.
        ratio = max(other, best / 16) / best
        tried += [best * ratio**fraction for fraction in (1 / 3, 2 / 3)]
        tried += [other] if other not in values else []
    return sorted(tried)


@torch.inference_mode()
def search(
    piece: Piece, given: Setting, from_start: bool, tick: Callable[[int], None] = lambda n: None
) -> tuple[list[Setting], Setting]:
    """The settings of the grid, and the best setting: of the grid, near its best, or `given`.

    `given.loss` is ignored; the loss at the given setting is computed. `given` is one of the
    candidates, so the best setting is at least as good. `tick` gets the number of positions of each
    block done; two grids go over all positions.
    """
    windows = sorted({*WINDOWS, given.window})
    thetas = sorted({*THETAS, given.theta})
    table = grid(piece, windows, thetas, from_start, tick)
    best = min(table, key=lambda setting: setting.loss)
    near = {round(window) for window in around(windows, best.window)}
    near = sorted({w for w in near if 0 < w < windows[-1]} | {best.window})
    finer = grid(piece, near, [*around(thetas, best.theta), best.theta], from_start, tick)
    best = min([best, *finer], key=lambda setting: setting.loss)
    # Rounded, so that they can be typed as flags.
    rounded = best._replace(
        theta=float(f"{best.theta:.4g}"), lambdasm=round(best.lambdasm, 4), loss=math.nan
    )
    candidates = [given] if given[:3] == rounded[:3] else [given, rounded]
    candidates = [s._replace(loss=loss_at(piece, s, from_start)) for s in candidates]
    return table, min(candidates, key=lambda setting: setting.loss)


def logprobs_at(piece: Piece, setting: Setting, from_start: bool) -> Tensor:
    """`log p` (n,) of the words in nats, with the cache at `setting`."""
    cache = ContinuousCache(setting.window, setting.theta, from_start)
    return with_cache(piece, cache, setting.lambdasm)[0]


def loss_at(piece: Piece, setting: Setting, from_start: bool) -> float:
    """The mean loss in nats a token, with the cache at `setting`."""
    return -logprobs_at(piece, setting, from_start).double().mean().item()
