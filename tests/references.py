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


def naive_forget_mult(f, x, h0, reverse):
    """`h_t = f_t * x_t + (1 - f_t) * h_{t-1}` (`h_{t+1}` in reverse), step by step."""
    steps = range(len(x) - 1, -1, -1) if reverse else range(len(x))
    h = torch.zeros_like(x[0]) if h0 is None else h0
    result = [None] * len(x)
    for t in steps:
        h = f[t] * x[t] + (1 - f[t]) * h
        result[t] = h
    return torch.stack(result)


def naive_qrnn(y, c0, mask, scale, gate, reverse, lengths):
    """A layer's recurrence on its linear map's output `y`, column by column and step by step."""
    hidden = y.size(2) // (3 if gate else 2)
    z, f, *o = y.split(hidden, dim=2)
    f = f.sigmoid() * (1 if mask is None else mask) * (1 if scale is None else scale)
    z, o = z.tanh(), o[0].sigmoid() if gate else torch.ones_like(z)
    # One unbind, because each indexing step would have a full tensor of zeros as its gradient.
    zs, fs, os = ([column.unbind() for column in part.unbind(1)] for part in (z, f, o))
    h_columns, last_columns = [], []
    for b in range(y.size(1)):
        length = len(y) if lengths is None else int(lengths[b])
        c = torch.zeros_like(z[0, 0]) if c0 is None else c0[b]
        h = [torch.zeros_like(c)] * len(y)
        for t in range(length - 1, -1, -1) if reverse else range(length):
            c = fs[b][t] * zs[b][t] + (1 - fs[b][t]) * c
            h[t] = os[b][t] * c
        h_columns.append(torch.stack(h))
        last_columns.append(c)
    return torch.stack(h_columns, dim=1), torch.stack(last_columns)


def assert_near(actual, expected, tolerance, what):
    """Shapes equal, and no error above `tolerance` relative to 1 + |expected|."""
    assert actual.shape == expected.shape, what
    error = ((actual.double().cpu() - expected).abs() / (1 + expected.abs())).max().item()
    assert error <= tolerance, f"{what}: off by {error:.2e}, more than {tolerance:.0e}"


def eager_and_compiled(layer, x):
    """Output, last state and gradients of a QRNN layer, eagerly and through torch.compile."""
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        output, last = call(x)
        grads = torch.autograd.grad(output.sum() + last.sum(), [x, *layer.parameters()])
        results.append([output, last, *grads])
    return results


def naive_update(
    p: Tensor,
    grad: Tensor | None,
    average: Tensor | None,
    lr: float,
    decay: float,
    scale: float,
    weight: float,
) -> tuple[Tensor, Tensor | None]:
    """NT-ASGD's step in float64; what has no gradient, or no average, stays as it is."""
    p = p.detach().double()
    if grad is not None:
        p = p - lr * (scale * grad.double() + decay * p)
    if average is not None:
        average = average.double() + weight * (p - average.double())
    return p, average
