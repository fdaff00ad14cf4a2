"""The recurrence and the fused layer as registered operators, for torch.compile.

torch.compile can trace neither CuPy's launches nor a loop over a thousand steps; it treats each
operator as one operation. Outside compilation the autograd functions are called directly, which
saves the dispatcher's time. Importing this module registers `awd_qrnn::forget_mult`,
`awd_qrnn::pool` and their backward operators.
"""

import torch
from torch import Tensor

from qrnn import forget_mult as eager


@torch.library.custom_op("awd_qrnn::forget_mult", mutates_args=())
def forget_mult(f: Tensor, x: Tensor, h0: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """`h_t = f_t * x_t + (1 - f_t) * h_{t-1}` of `f` and `x` (seq_len, batch, hidden).

    `h0` is (batch, hidden) or None for zeros. Returns `h` (seq_len, batch, hidden), and the
    kernels' states for the backward operator, empty without kernels.
    """
    kernels = eager._kernels_for(x)
    if kernels:
        return kernels.forget_mult_forward(f, x, h0, reverse)
    # A copy, because an operator must not return a view of a longer tensor.
    return eager.forget_mult(f, x, h0, reverse, use_cuda=False).clone(), x.new_empty(0)


@forget_mult.register_fake
def _(f, x, h0, reverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format), _fake_states(x, x.shape)


@torch.library.custom_op("awd_qrnn::forget_mult_backward", mutates_args=())
def forget_mult_backward(
    grad: Tensor, f: Tensor, x: Tensor, h0: Tensor | None, states: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `f`, `x` and `h0`; the last is empty without `h0`."""
    kernels = eager._kernels_for(x)
    if kernels:
        need_h0 = h0 is not None
        grads = kernels.forget_mult_backward(grad, f, x, states, reverse, need_h0)
        grad_f, grad_x, grad_h0 = grads
    else:
        inputs = [t.detach().requires_grad_() for t in (f, x, h0) if t is not None]
        with torch.enable_grad():
            again = eager.forget_mult(*inputs, reverse=reverse, use_cuda=False)
        grad_f, grad_x, *rest = torch.autograd.grad(again, inputs, grad)
        grad_h0 = rest[0] if rest else None
    return grad_f, grad_x, x.new_empty(0) if grad_h0 is None else grad_h0


@forget_mult_backward.register_fake
def _(grad, f, x, h0, states, reverse):
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like), x.new_empty(0 if h0 is None else h0.shape)


def _keep_forget_mult(ctx, inputs, output) -> None:
    f, x, h0, ctx.reverse = inputs
    ctx.save_for_backward(f, x, h0, output[1])


def _forget_mult_gradients(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    f, x, h0, states = ctx.saved_tensors
    grads = forget_mult_backward(grad.contiguous(), f, x, h0, states, ctx.reverse)
    return *grads[:2], None if h0 is None else grads[2], None


forget_mult.register_autograd(_forget_mult_gradients, setup_context=_keep_forget_mult)


@torch.library.custom_op("awd_qrnn::pool", mutates_args=())
def pool(
    y: Tensor,
    c0: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    gate: bool,
    reverse: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused layer, as `qrnn.forget_mult.qrnn_pool` with `mask` or `scale` as its zoneout.

    Returns the output (seq_len, batch, hidden), the last state (batch, hidden), and the kernels'
    states for the backward operator, empty without kernels.
    """
    kernels = eager._kernels_for(y)
    if kernels:
        return kernels.qrnn_forward(y, c0, mask, scale, gate, reverse, lengths)
    zoneout = scale if mask is None else mask
    h, last = eager.qrnn_pool(y, c0, zoneout, gate, reverse, lengths, use_cuda=False)
    return h, last.squeeze(0).clone(), y.new_empty(0)


@pool.register_fake
def _(y, c0, mask, scale, gate, reverse, lengths):
    seq_len, batch, width = y.shape
    sizes = torch.Size((seq_len, batch, width // (3 if gate else 2)))
    return y.new_empty(sizes), y.new_empty(sizes[1:]), _fake_states(y, sizes)


@torch.library.custom_op("awd_qrnn::pool_backward", mutates_args=())
def pool_backward(
    grad_h: Tensor,
    grad_last: Tensor,
    y: Tensor,
    states: Tensor,
    c0: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    gate: bool,
    reverse: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `y` and `c0`; the second is empty without `c0`."""
    kernels = eager._kernels_for(y)
    if kernels:
        options = (mask, scale, gate, reverse, lengths, c0 is not None)
        grad_y, grad_c0, _ = kernels.qrnn_backward(grad_h, grad_last, y, states, *options)
    else:
        inputs = [t.detach().requires_grad_() for t in (y, c0) if t is not None]
        initial = inputs[1] if c0 is not None else None
        zoneout = scale if mask is None else mask
        options = (zoneout, gate, reverse, lengths)
        with torch.enable_grad():
            again = eager.qrnn_pool(inputs[0], initial, *options, use_cuda=False)
        grad_y, *rest = torch.autograd.grad(again, inputs, (grad_h, grad_last.unsqueeze(0)))
        grad_c0 = rest[0] if rest else None
    return grad_y, y.new_empty(0) if grad_c0 is None else grad_c0


@pool_backward.register_fake
def _(grad_h, grad_last, y, states, c0, *options):
    kernels = eager._kernels_for(y)
    like = kernels._empty_rows(y.shape, y) if kernels else y.new_empty(y.shape)
    return like, y.new_empty(0 if c0 is None else c0.shape)


def _keep_pool(ctx, inputs, output) -> None:
    y, c0, mask, ctx.scale, ctx.gate, ctx.reverse, lengths = inputs
    ctx.save_for_backward(y, output[2], c0, mask, lengths)


def _pool_gradients(ctx, grad_h: Tensor, grad_last: Tensor, _: Tensor) -> tuple:
    y, states, c0, mask, lengths = ctx.saved_tensors
    options = (c0, mask, ctx.scale, ctx.gate, ctx.reverse, lengths)
    grads = pool_backward(grad_h.contiguous(), grad_last.contiguous(), y, states, *options)
    return grads[0], None if c0 is None else grads[1], *[None] * 5


pool.register_autograd(_pool_gradients, setup_context=_keep_pool)


def _fake_states(like: Tensor, sizes: torch.Size) -> Tensor:
    kernels = eager._kernels_for(like)
    if kernels is None:
        return like.new_empty(0)
    shape, dtype = kernels.kept_states(like.dtype, sizes)
    return like.new_empty(shape, dtype=dtype)
