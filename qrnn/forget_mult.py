"""The recurrence of the QRNN: its definition, and its fast form in PyTorch operations.

    h_t = f_t * x_t + (1 - f_t) * h_{t-1}

"Quasi-Recurrent Neural Networks", arXiv 1611.01576, section 2.1; this `f` is one minus the paper's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input


def forget_mult_loop(f: Tensor, x: Tensor, hidden_init: Tensor | None = None) -> Tensor:
    """The definition, for reading and for tests: one small autograd node per time step.

    `f` and `x` are (seq_len, batch, hidden), `hidden_init` (batch, hidden) or None for zeros; the
    result is (seq_len, batch, hidden).
    """
    h = hidden_init
    result = []
    for f_t, x_t in zip(f, x, strict=True):
        h = f_t * x_t if h is None else f_t * x_t + (1 - f_t) * h
        result.append(h)
    return torch.stack(result)


def forget_mult(f: Tensor, x: Tensor, hidden_init: Tensor | None = None) -> Tensor:
    """ForgetMult of `f` and `x` (seq_len, batch, hidden): (seq_len, batch, hidden).

    `hidden_init` is (batch, hidden), (1, batch, hidden) or None for zeros. Raises ValueError if the
    shapes do not fit.
    """
    if f.dim() != 3 or f.shape != x.shape:
        raise ValueError(
            "forget_mult takes f and x of one shape (seq_len, batch, hidden), "
            f"not {tuple(f.shape)} and {tuple(x.shape)}"
        )
    return _ForgetMult.apply(f, x, initial_state(hidden_init, x))


class ForgetMult(nn.Module):
    """`h_t = f_t * x_t + (1 - f_t) * h_{t-1}` as a module, with the original's call."""

    def forward(
        self, f: Tensor, x: Tensor, hidden_init: Tensor | None = None, use_cuda: bool = True
    ) -> Tensor:
        """As `forget_mult`; `use_cuda=False` keeps to PyTorch operations also on a GPU."""
        return forget_mult(f, x, hidden_init)


def qrnn_pool(
    y: Tensor, c_init: Tensor | None, zoneout: Tensor | float | None, output_gate: bool
) -> tuple[Tensor, Tensor]:
    """From a QRNN layer's linear map to its output, in one autograd node.

    `y` (seq_len, batch, 3 * hidden) holds Z | F | O, or Z | F without `output_gate`. With
    `f = sigmoid(F) * zoneout` (a tensor (seq_len, batch, hidden), a number, or None for 1) and
    `c = forget_mult(f, tanh(Z), c_init)` the result is `sigmoid(O) * c` (seq_len, batch, hidden)
    and the last `c` (1, batch, hidden). `c_init` is (batch, hidden), (1, batch, hidden) or None for
    zeros.
    """
    hidden = y.size(2) // (3 if output_gate else 2)
    return _QRNNPool.apply(y, initial_state(c_init, y[..., :hidden]), zoneout, output_gate)


def initial_state(hidden_init: Tensor | None, x: Tensor) -> Tensor | None:
    """`hidden_init` as (batch, hidden), checked against `x` (seq_len, batch, hidden)."""
    if hidden_init is None:
        return None
    if hidden_init.dim() == 3 and hidden_init.size(0) == 1:
        hidden_init = hidden_init[0]
    if hidden_init.shape != x.shape[1:]:
        raise ValueError(
            f"the initial state must have the shape {tuple(x.shape[1:])} (batch, hidden), "
            f"not {tuple(hidden_init.shape)}"
        )
    return hidden_init


def _scan(f: Tensor, x: Tensor, hidden_init: Tensor | None) -> Tensor:
    """All states, the initial one first: (seq_len + 1, batch, hidden)."""
    states = x.new_empty(x.size(0) + 1, *x.shape[1:])
    if hidden_init is None:
        states[0].zero_()
    else:
        states[0] = hidden_init
    # Unbound once: indexing a tensor at every step would cost as much as the step itself.
    rows = states.unbind()
    for h, x_t, f_t, out in zip(rows[:-1], x.unbind(), f.unbind(), rows[1:], strict=True):
        torch.lerp(h, x_t, f_t, out=out)
    return states


def _scan_backward(grad: Tensor, keep: Tensor) -> None:
    """Turn gradients of the outputs into gradients of the states, in place, last to first.

    `keep` is `1 - f`. Both are (seq_len, batch, hidden).
    """
    rows, keeps = grad.unbind(), keep.unbind()
    for t in range(len(rows) - 2, -1, -1):
        rows[t].addcmul_(keeps[t + 1], rows[t + 1])


class _ForgetMult(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, x: Tensor, hidden_init: Tensor | None) -> Tensor:
        states = _scan(f, x, hidden_init)
        ctx.save_for_backward(f, x, states)
        return states[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        f, x, states = ctx.saved_tensors
        keep = 1 - f
        # A copy: the incoming gradient may be expanded, and is not ours to change.
        grad = torch.empty_like(x, memory_format=torch.contiguous_format).copy_(grad_output)
        _scan_backward(grad, keep)
        grad_init = keep[0] * grad[0] if ctx.needs_input_grad[2] else None
        return (x - states[:-1]).mul_(grad), grad * f, grad_init


class _QRNNPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        c_init: Tensor | None,
        zoneout: Tensor | float | None,
        output_gate: bool,
    ) -> tuple[Tensor, Tensor]:
        parts = 3 if output_gate else 2
        gates = torch.empty_like(y, memory_format=torch.contiguous_format)
        z, f, *o = gates.chunk(parts, dim=2)
        torch.tanh(y[..., : z.size(2)], out=z)
        torch.sigmoid(y[..., z.size(2) :], out=gates[..., z.size(2) :])
        states = _scan(f if zoneout is None else f * zoneout, z, c_init)
        ctx.zoneout = None if isinstance(zoneout, Tensor) else zoneout
        ctx.output_gate = output_gate
        mask = zoneout if isinstance(zoneout, Tensor) else None
        ctx.save_for_backward(gates, states, mask)
        h = o[0] * states[1:] if output_gate else states[1:].clone()
        return h, states[-1:].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        gates, states, mask = ctx.saved_tensors
        zoneout = ctx.zoneout if mask is None else mask
        parts = 3 if ctx.output_gate else 2
        z, f, *o = gates.chunk(parts, dim=2)
        grad_y = torch.empty_like(gates)
        grad_z, grad_f, *grad_o = grad_y.chunk(parts, dim=2)
        if ctx.output_gate:
            torch.mul(grad_h, states[1:], out=grad_o[0])
            _sigmoid_backward(grad_o[0], o[0], grad_input=grad_o[0])
            grad = grad_h * o[0]
        else:
            grad = grad_h.clone(memory_format=torch.contiguous_format)
        grad[-1] += grad_last[0]
        effective = f if zoneout is None else f * zoneout
        keep = 1 - effective
        _scan_backward(grad, keep)
        torch.mul(grad, effective, out=grad_z)
        _tanh_backward(grad_z, z, grad_input=grad_z)
        torch.sub(z, states[:-1], out=grad_f)
        grad_f.mul_(grad)
        if zoneout is not None:
            grad_f.mul_(zoneout)
        _sigmoid_backward(grad_f, f, grad_input=grad_f)
        grad_init = keep[0] * grad[0] if ctx.needs_input_grad[1] else None
        return grad_y, grad_init, None, None
