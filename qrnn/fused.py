"""The recurrence and the layer of definition.py as one autograd node each, in PyTorch's operations.

A loop of small autograd nodes takes two to four times as long. The gradients are written by hand.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qrnn.definition import valid_steps

_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input


def forget_mult(f: Tensor, x: Tensor, hidden_init: Tensor | None = None) -> Tensor:
    """As definition.forget_mult, forwards in time."""
    return _ForgetMult.apply(f, x, hidden_init)


def pool(
    y: Tensor,
    c_init: Tensor | None = None,
    zoneout: Tensor | float | None = None,
    output_gate: bool = True,
    reverse: bool = False,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As definition.pool."""
    valid = None if lengths is None else valid_steps(lengths, y)
    return _Pool.apply(y, c_init, zoneout, output_gate, reverse, valid)


def _scan(f: Tensor, x: Tensor, hidden_init: Tensor | None, reverse: bool = False) -> Tensor:
    """All states in order of time, with the initial one: (seq_len + 1, batch, hidden)."""
    states = x.new_empty(x.size(0) + 1, *x.shape[1:])
    # Indexing a tensor at every step would cost as much as the step itself.
    rows, fs, xs = states.unbind(), f.unbind(), x.unbind()
    if reverse:
        rows, fs, xs = rows[::-1], fs[::-1], xs[::-1]
    if hidden_init is None:
        rows[0].zero_()
    else:
        rows[0].copy_(hidden_init)
    for h, x_t, f_t, out in zip(rows[:-1], xs, fs, rows[1:], strict=True):
        torch.lerp(h, x_t, f_t, out=out)
    return states


def _split(states: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The states before and after each step, two views (seq_len, batch, hidden) of `_scan`'s."""
    return (states[1:], states[:-1]) if reverse else (states[:-1], states[1:])


def _scan_backward(grad: Tensor, keep: Tensor, reverse: bool = False) -> Tensor:
    """Turn gradients of the outputs into gradients of the states, in place, last to first.

    `keep` is `1 - f`. Both are (seq_len, batch, hidden). Returns the gradient of the initial state.
    """
    rows, keeps = grad.unbind(), keep.unbind()
    if reverse:
        rows, keeps = rows[::-1], keeps[::-1]
    for t in range(len(rows) - 2, -1, -1):
        rows[t].addcmul_(keeps[t + 1], rows[t + 1])
    return keeps[0] * rows[0]


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
        # A copy, because the incoming gradient may be expanded and must not change.
        grad = torch.empty_like(x, memory_format=torch.contiguous_format).copy_(grad_output)
        keep = 1 - f
        grad_init = _scan_backward(grad, keep)
        # Reuses the memory of `keep`: new memory costs more than the arithmetic.
        grad_f = torch.sub(x, states[:-1], out=keep).mul_(grad)
        return grad_f, grad.mul_(f), grad_init if ctx.needs_input_grad[2] else None


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        c_init: Tensor | None,
        zoneout: Tensor | float | None,
        output_gate: bool,
        reverse: bool,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        gates = torch.empty_like(y, memory_format=torch.contiguous_format)
        z, f, *o = gates.chunk(3 if output_gate else 2, dim=2)
        torch.tanh(y[..., : z.size(2)], out=z)
        torch.sigmoid(y[..., z.size(2) :], out=gates[..., z.size(2) :])
        if valid is not None:
            # Zoneout with a mask of zeros keeps a column's state beyond its length.
            zoneout = valid if zoneout is None else valid * zoneout
        states = _scan(f if zoneout is None else f * zoneout, z, c_init, reverse)
        ctx.zoneout = None if isinstance(zoneout, Tensor) else zoneout
        ctx.output_gate, ctx.reverse = output_gate, reverse
        mask = zoneout if isinstance(zoneout, Tensor) else None
        ctx.save_for_backward(gates, states, mask, valid)
        _, after = _split(states, reverse)
        h = o[0] * after if output_gate else after.clone()
        if valid is not None:
            h.mul_(valid)
        return h, after[0 if reverse else -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        gates, states, mask, valid = ctx.saved_tensors
        zoneout = ctx.zoneout if mask is None else mask
        before, after = _split(states, ctx.reverse)
        z, f, *o = gates.chunk(3 if ctx.output_gate else 2, dim=2)
        grad_y = torch.empty_like(gates)
        grad_z, grad_f, *grad_o = grad_y.chunk(3 if ctx.output_gate else 2, dim=2)
        if valid is not None:
            grad_h = grad_h * valid
        # The three parts of the result first hold intermediate values: new memory costs more than
        # the arithmetic.
        grad, keep = grad_z, grad_f
        if ctx.output_gate:
            torch.mul(grad_h, after, out=grad_o[0])
            _sigmoid_backward(grad_o[0], o[0], grad_input=grad_o[0])
            torch.mul(grad_h, o[0], out=grad)
        else:
            grad.copy_(grad_h)
        grad[0 if ctx.reverse else -1] += grad_last
        effective = f if zoneout is None else f * zoneout
        torch.sub(effective.new_ones(()), effective, out=keep)
        grad_init = _scan_backward(grad, keep, ctx.reverse)
        torch.sub(z, before, out=grad_f)
        grad_f.mul_(grad)
        if zoneout is not None:
            grad_f.mul_(zoneout)
        _sigmoid_backward(grad_f, f, grad_input=grad_f)
        grad_z.mul_(effective)
        _tanh_backward(grad_z, z, grad_input=grad_z)
        return grad_y, grad_init if ctx.needs_input_grad[1] else None, None, None, None, None
