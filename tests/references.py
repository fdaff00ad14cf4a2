"""Naive reference implementations, one number or one step at a time."""

import math

import torch
from torch import Tensor


def lstm(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor) -> Tensor:
    """An LSTM step by step: x (seq_len, batch, n_in), h and c (batch, n) -> (seq_len, batch, n)."""
    outputs = []
    for x_t in x:
        i, f, g, o = (x_t @ w_ih.t() + h @ w_hh.t() + bias).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs)


def qrnn_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: int,
    hidden: int,
    c: Tensor,
    before: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """A gated QRNN layer, step by step; `before[k]` (batch, n_in) is the input k + 1 steps back."""
    steps = [*reversed(before), *x]
    outputs = []
    for t in range(len(x)):
        now = t + len(before)
        window_t = torch.cat([steps[now - k] for k in range(window)], dim=1)
        z, f, o = (window_t @ weight.t() + bias).split(hidden, dim=1)
        f = f.sigmoid()
        c = f * z.tanh() + (1 - f) * c
        outputs.append(o.sigmoid() * c)
    return torch.stack(outputs), c


def split_softmax(
    weight: Tensor, bias: Tensor, tails: Tensor, tail_bias: Tensor, splits: list[int], h: Tensor
) -> list[float]:
    """`p(word)` of every word for one output `h` (size,), by the definition, in Python floats."""

    def softmax(logits: list[float]) -> list[float]:
        top = max(logits)
        exps = [math.exp(x - top) for x in logits]
        return [e / sum(exps) for e in exps]

    def logit(w: Tensor, b: Tensor) -> float:
        return float(w.double() @ h.double() + b.double())

    ends = [*splits[1:], len(weight)]
    head = [logit(weight[i], bias[i]) for i in range(splits[0])]
    p_head = softmax(head + [logit(tails[j], tail_bias[j]) for j in range(len(tails))])
    probs = p_head[: splits[0]]
    for k, (start, end) in enumerate(zip(splits, ends, strict=True), start=1):
        tail = softmax([logit(weight[i], bias[i]) for i in range(start, end)])
        # The k-th tail's entry in the head is the k-th from the end.
        probs += [p_head[-k] * p for p in tail]
    return probs


def pointer_losses(
    outputs: Tensor,
    words: Tensor,
    p_vocabulary: Tensor,
    window: int,
    theta: float,
    lambdasm: float,
    from_start: bool = False,
) -> list[float]:
    """`-log p` of every word under the cache mixture, token by token over the whole vocabulary.

    `outputs` (n, size), `words` (n,), `p_vocabulary` (n, ntoken).
    """
    losses = []
    for t in range(len(words)):
        p = p_vocabulary[t].double()
        if t > (0 if from_start else window):
            past = range(max(0, t - window), t)
            scores = theta * (outputs[list(past)].double() @ outputs[t].double())
            attention = scores.softmax(dim=0)
            p_cache = torch.zeros_like(p)
            for a, i in zip(attention, past, strict=True):
                p_cache[words[i]] += a
            p = lambdasm * p_cache + (1 - lambdasm) * p
        losses.append(-math.log(p[words[t]]))
    return losses


def assert_near(actual, expected, tolerance, what):
    """Shapes equal, and no error above `tolerance` relative to 1 + |expected|."""
    assert actual.shape == expected.shape, what
    error = ((actual.double().cpu() - expected).abs() / (1 + expected.abs())).max().item()
    assert error <= tolerance, f"{what}: off by {error:.2e}, more than {tolerance:.0e}"
