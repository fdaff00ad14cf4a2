"""The recurrence of the QRNN as its paper gives it, one time step after another.

    h_t = f_t * x_t + (1 - f_t) * h_{t-1}

"Quasi-Recurrent Neural Networks", arXiv 1611.01576, section 2.1; `f` is one minus the paper's.
"""

import torch
from torch import Tensor


def forget_mult(
    f: Tensor, x: Tensor, hidden_init: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """Every state `h` (seq_len, batch, hidden) of `f` and `x` of the same shape.

    `hidden_init` is (batch, hidden) or None for zeros. `reverse` walks time from its end.
    """
    if reverse:
        f, x = f.flip(0), x.flip(0)
    h = torch.zeros_like(x[0]) if hidden_init is None else hidden_init
    states = []
    for f_t, x_t in zip(f, x, strict=True):
        h = f_t * x_t + (1 - f_t) * h
        states.append(h)
    return torch.stack(states[::-1] if reverse else states)


def pool(
    y: Tensor,
    c_init: Tensor | None = None,
    zoneout: Tensor | float | None = None,
    output_gate: bool = True,
    reverse: bool = False,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A QRNN layer after its linear map: the output (seq_len, batch, hidden) and the last state.

    `y` (seq_len, batch, 3 * hidden) holds Z | F | O, or Z | F without `output_gate`. With
    `f = sigmoid(F) * zoneout` (zeros and ones (seq_len, batch, hidden), a number, or None for 1)
    and `c = forget_mult(f, tanh(Z), c_init, reverse)` the output is `sigmoid(O) * c`. `c_init` and
    the last state are (batch, hidden). `lengths` (batch,), int64, ends columns early: a column's
    output is 0 beyond its length, and its last state is the state at its last valid step.
    """
    z, f, *o = y.chunk(3 if output_gate else 2, dim=2)
    f = f.sigmoid()
    if zoneout is not None:
        f = f * zoneout
    if lengths is not None:
        # A forget gate of 0 keeps the state.
        f = f * valid_steps(lengths, f)
    c = forget_mult(f, z.tanh(), c_init, reverse)
    h = o[0].sigmoid() * c if output_gate else c
    if lengths is not None:
        h = h * valid_steps(lengths, h)
    return h, c[0 if reverse else -1]


def valid_steps(lengths: Tensor, like: Tensor) -> Tensor:
    """Ones within each column's length, zeros beyond: (seq_len, batch, 1).

    `lengths` is (batch,), `like` (seq_len, batch, ...) gives dtype and device.
    """
    steps = torch.arange(like.size(0), device=lengths.device).unsqueeze(1)
    return (steps < lengths).unsqueeze(2).to(like)
