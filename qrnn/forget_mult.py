"""The recurrence of the QRNN: its definition, and a fast form in PyTorch operations.

    h_t = f_t * x_t + (1 - f_t) * h_{t-1}

"Quasi-Recurrent Neural Networks", arXiv 1611.01576, section 2.1; `f` is one minus the paper's.
"""

import functools
import warnings
from types import ModuleType
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


def forget_mult(
    f: Tensor,
    x: Tensor,
    hidden_init: Tensor | None = None,
    reverse: bool = False,
    use_cuda: bool = True,
) -> Tensor:
    """ForgetMult of `f` and `x` (seq_len, batch, hidden): (seq_len, batch, hidden).

    `hidden_init` is (batch, hidden), (1, batch, hidden) or None for zeros. `reverse` walks time
    from its end. On a GPU it runs as one kernel, unless `use_cuda` is False or CuPy is missing.
    Raises ValueError if the shapes do not fit.
    """
    if f.dim() != 3 or f.shape != x.shape:
        raise ValueError(
            "forget_mult takes f and x of one shape (seq_len, batch, hidden), "
            f"not {tuple(f.shape)} and {tuple(x.shape)}"
        )
    initial = initial_state(hidden_init, x)
    if use_cuda and torch.compiler.is_compiling():
        return _registered().forget_mult(f, x, initial, reverse)[0]
    kernels = _kernels_for(x) if use_cuda else None
    if kernels:
        return kernels.ForgetMultFunction.apply(f, x, initial, reverse)
    return _ForgetMult.apply(f, x, initial, reverse)


class ForgetMult(nn.Module):
    """`h_t = f_t * x_t + (1 - f_t) * h_{t-1}` as a module, with the original's call."""

    def forward(
        self, f: Tensor, x: Tensor, hidden_init: Tensor | None = None, use_cuda: bool = True
    ) -> Tensor:
        """As `forget_mult`, forwards in time."""
        return forget_mult(f, x, hidden_init, use_cuda=use_cuda)


def qrnn_pool(
    y: Tensor,
    c_init: Tensor | None,
    zoneout: Tensor | float | None,
    output_gate: bool,
    reverse: bool = False,
    lengths: Tensor | None = None,
    use_cuda: bool = True,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A QRNN layer after its linear map, as one autograd node.

    `y` (seq_len, batch, 3 * hidden) holds Z | F | O, or Z | F without `output_gate`; `bias`
    (3 * hidden,) or (2 * hidden,) is added to it first. With `f = sigmoid(F) * zoneout` (zeros and
    ones (seq_len, batch, hidden), a number, or None for 1) and
    `c = forget_mult(f, tanh(Z), c_init, reverse)` the result is `sigmoid(O) * c`
    (seq_len, batch, hidden) and the last `c` (1, batch, hidden). `c_init` is (batch, hidden),
    (1, batch, hidden) or None for zeros. `lengths` (batch,), int64, ends columns early: a column's
    output is 0 beyond its length, and its last state is the state at its last valid step.
    """
    hidden = y.size(2) // (3 if output_gate else 2)
    initial = initial_state(c_init, y[..., :hidden])
    mask, scale = (zoneout, None) if isinstance(zoneout, Tensor) else (None, zoneout)
    options = (mask, scale, output_gate, reverse, lengths)
    if adds_bias(y, use_cuda):
        h, last = _kernels_for(y).QRNNFunction.apply(y, initial, *options, bias)
        return h, last.unsqueeze(0)
    if bias is not None:
        y = y + bias
    if use_cuda and torch.compiler.is_compiling():
        h, last, _ = _registered().pool(y, initial, *options)
        return h, last.unsqueeze(0)
    valid = None if lengths is None else valid_steps(lengths, y)
    return _QRNNPool.apply(y, initial, zoneout, output_gate, reverse, valid)


def adds_bias(x: Tensor, use_cuda: bool = True) -> bool:
    """Whether `qrnn_pool` of `x` runs as a CUDA kernel, which adds a bias at no cost."""
    return use_cuda and not torch.compiler.is_compiling() and _kernels_for(x) is not None


def qrnn_pool_both_ways(
    y: Tensor,
    y_reverse: Tensor,
    c_init: Tensor | None,
    zoneout: tuple[Tensor | float | None, Tensor | float | None],
    output_gate: bool,
    lengths: Tensor | None = None,
    use_cuda: bool = True,
) -> tuple[Tensor, Tensor]:
    """`qrnn_pool` of `y` forwards and of `y_reverse` backwards, side by side.

    `c_init` is (2, batch, hidden), forwards first, or None; `zoneout` is each direction's. Returns
    (seq_len, batch, 2 * hidden) and the last states (2, batch, hidden).
    """
    kernels = _kernels_for(y) if use_cuda and not torch.compiler.is_compiling() else None
    if kernels:
        if c_init is not None:
            c_init = c_init.to(y.dtype)
        masks = [z if isinstance(z, Tensor) else None for z in zoneout]
        scale = None if isinstance(zoneout[0], Tensor) else zoneout[0]
        return kernels.BidirectionalQRNNFunction.apply(
            y, y_reverse, c_init, *masks, scale, output_gate, lengths
        )
    results = []
    for reverse, source in ((False, y), (True, y_reverse)):
        side = int(reverse)
        initial = None if c_init is None else c_init[side]
        options = (zoneout[side], output_gate, reverse, lengths, use_cuda)
        results.append(qrnn_pool(source, initial, *options))
    (h, last), (h_reverse, last_reverse) = results
    return torch.cat([h, h_reverse], dim=2), torch.cat([last, last_reverse])


def valid_steps(lengths: Tensor, like: Tensor) -> Tensor:
    """Ones within each column's length, zeros beyond: (seq_len, batch, 1).

    `lengths` is (batch,), `like` (seq_len, batch, ...) gives dtype and device.
    """
    steps = torch.arange(like.size(0), device=lengths.device).unsqueeze(1)
    return (steps < lengths).unsqueeze(2).to(like)


def initial_state(hidden_init: Tensor | None, x: Tensor) -> Tensor | None:
    """`hidden_init` as (batch, hidden) in the dtype of `x`, checked against its shape."""
    if hidden_init is None:
        return None
    if hidden_init.dim() == 3 and hidden_init.size(0) == 1:
        hidden_init = hidden_init[0]
    if hidden_init.shape != x.shape[1:]:
        raise ValueError(
            f"the initial state must have the shape {tuple(x.shape[1:])} (batch, hidden), "
            f"not {tuple(hidden_init.shape)}"
        )
    # Under autocast the linear map's result has fewer bits than the carried-over state.
    return hidden_init.to(x.dtype)


def _registered() -> ModuleType:
    """The operators for torch.compile, registered at first use."""
    from qrnn import operators  # it imports this module

    return operators


def _kernels_for(x: Tensor) -> ModuleType | None:
    """The CUDA kernels if `x` is on a GPU and CuPy is usable, else None."""
    if not x.is_cuda:
        return None
    from qrnn import kernels  # imported only for GPU tensors, to keep CPU runs fast

    if kernels.available():
        return kernels
    _warn_without_kernels(kernels.requirement())
    return None


@functools.cache
def _warn_without_kernels(requirement: str) -> None:
    warnings.warn(
        f"the QRNN runs on PyTorch operations, slower than its CUDA kernels: {requirement}",
        stacklevel=4,
    )


def _scan(f: Tensor, x: Tensor, hidden_init: Tensor | None, reverse: bool) -> Tensor:
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


def _scan_backward(grad: Tensor, keep: Tensor, reverse: bool) -> Tensor:
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
    def forward(
        ctx: Any, f: Tensor, x: Tensor, hidden_init: Tensor | None, reverse: bool
    ) -> Tensor:
        states = _scan(f, x, hidden_init, reverse)
        ctx.save_for_backward(f, x, states)
        ctx.reverse = reverse
        return _split(states, reverse)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        f, x, states = ctx.saved_tensors
        before, _ = _split(states, ctx.reverse)
        # A copy, because the incoming gradient may be expanded and must not change.
        grad = torch.empty_like(x, memory_format=torch.contiguous_format).copy_(grad_output)
        keep = 1 - f
        grad_init = _scan_backward(grad, keep, ctx.reverse)
        # Reuses the memory of `keep`: new memory costs more than the arithmetic.
        grad_f = torch.sub(x, before, out=keep).mul_(grad)
        return grad_f, grad.mul_(f), grad_init if ctx.needs_input_grad[2] else None, None


class _QRNNPool(torch.autograd.Function):
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
        return h, (after[:1] if reverse else after[-1:]).clone()

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
        grad[0 if ctx.reverse else -1] += grad_last[0]
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
