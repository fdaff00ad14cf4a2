"""The CUDA kernels of the QRNN (`forget_mult.cu`): launching them, and autograd.

"Quasi-Recurrent Neural Networks", arXiv 1611.01576, section 2.1.

Everything here takes tensors of one dtype (float64, float32, float16 or bfloat16) on one device,
and raises TypeError for another dtype, ValueError for a wrong shape or device, and
KernelUnavailable where CuPy is missing or unusable.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qrnn import cuda
from qrnn.cuda import SCALARS, wide

# Steps per chunk. The forward kernel stores the state before each chunk; the backward kernel holds
# two chunks of every stream in registers. float64 is for checking gradients, not for speed.
_CHUNK = {torch.float64: 4, torch.float32: 8, torch.float16: 8, torch.bfloat16: 8}
# By (output gate, mask given as a tensor).
_STEMS = {
    (False, False): "qrnn",
    (False, True): "qrnn_mask",
    (True, False): "qrnn_gate",
    (True, True): "qrnn_gate_mask",
}
_FORWARD = {flags: f"{stem}_forward" for flags, stem in _STEMS.items()}
_BACKWARD = {flags: f"{stem}_backward" for flags, stem in _STEMS.items()}
KERNEL_NAMES = (
    "forget_mult_forward",
    "forget_mult_backward",
    *_FORWARD.values(),
    *_BACKWARD.values(),
)
SOURCE = cuda.Source(
    Path(__file__).with_name("forget_mult.cu"), KERNEL_NAMES, "the QRNN's CUDA kernels"
)
BLOCK = 64  # threads per block, the kernels' launch bound
_MAX_STEPS = 2**31 - 64  # the kernels count steps, and look two chunks ahead, in 32 bits


def forget_mult(
    f: Tensor, x: Tensor, hidden_init: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """As definition.forget_mult."""
    return ForgetMultFunction.apply(f, x, hidden_init, reverse)


def pool(
    y: Tensor,
    c_init: Tensor | None = None,
    zoneout: Tensor | float | None = None,
    output_gate: bool = True,
    reverse: bool = False,
    lengths: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As definition.pool of `y + bias`."""
    mask, scale = (zoneout, None) if isinstance(zoneout, Tensor) else (None, zoneout)
    return QRNNFunction.apply(y, c_init, mask, scale, output_gate, reverse, lengths, bias)


def compile_options(dtype: torch.dtype) -> tuple[str, ...]:
    """Compiler options for tensors of `dtype`."""
    return f"-DSCALAR={SCALARS[dtype]}", f"-DCHUNK={_CHUNK[dtype]}"


def kept_states(dtype: torch.dtype, sizes: torch.Size) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype of the states that a forward pass over tensors of `dtype` keeps.

    `sizes` are (seq_len, batch, hidden). The state before each chunk of steps is kept: (chunks,
    batch, hidden), in float64 if `dtype` is float64 and else in float32.
    """
    chunks = -(-sizes[0] // _CHUNK[dtype])
    return torch.Size((chunks, *sizes[1:])), wide(dtype)


def forget_mult_forward(
    f: Tensor, x: Tensor, h0: Tensor | None = None, reverse: bool = False, keep: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`h_t = f_t * x_t + (1 - f_t) * h_{t-1}` from `f` and `x`, both (seq_len, batch, hidden).

    `h0` is (batch, hidden), or None for zeros. With `reverse`, time runs from the end and `h_{t+1}`
    takes the place of `h_{t-1}`. Returns `h` (seq_len, batch, hidden) and, with `keep`, the states
    for the backward pass.
    """
    sizes = _sizes(x, 1)
    inputs = _forget_mult_inputs(f, x, sizes)
    _check(x, ("h0", h0, sizes[1:]))
    h = _empty(sizes, x)
    states = _empty_states(x, sizes) if keep else None
    outputs = (_contiguous(h0), h, sizes[2], states, None)
    _launch_columns("forget_mult_forward", x, sizes, reverse, (*inputs, *outputs))
    return h, states


def forget_mult_backward(
    grad_h: Tensor,
    f: Tensor,
    x: Tensor,
    states: Tensor,
    reverse: bool = False,
    need_h0: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `f`, `x` and, if `need_h0`, the initial state, from the gradient of `h`.

    `states` is the second result of `forget_mult_forward`; `grad_h` is (seq_len, batch, hidden).
    """
    sizes = _sizes(x, 1)
    inputs = _forget_mult_inputs(f, x, sizes)
    _check(x, ("grad_h", grad_h, sizes))
    _check_states(states, x, sizes)
    grad_f, grad_x = _empty(sizes, x), _empty(sizes, x)
    grad_h0 = _empty(sizes[1:], x) if need_h0 else None
    incoming = (states.contiguous(), *_rows(grad_h), None)
    outputs = (grad_x, grad_f, None, sizes[2], grad_h0, None)
    _launch_columns("forget_mult_backward", x, sizes, reverse, (*inputs, *incoming, *outputs))
    return grad_f, grad_x, grad_h0


def qrnn_forward(
    y: Tensor,
    c0: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    gate: bool,
    reverse: bool = False,
    lengths: Tensor | None = None,
    keep: bool = True,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A QRNN layer after its linear map, in one pass over memory.

    `y` is (seq_len, batch, 3 * hidden), Z | F | O, or without `gate` (seq_len, batch, 2 * hidden),
    Z | F; `bias` (3 * hidden,) or (2 * hidden,), in any dtype, is added to it first. `c0` is
    (batch, hidden), or None for zeros. With `f = sigmoid(F) * mask` (zoneout in training: zeros and
    ones, (seq_len, batch, hidden)) or `f = sigmoid(F) * scale` (in evaluation; None is 1)

        c_t = f_t * tanh(Z_t) + (1 - f_t) * c_{t-1},    h_t = sigmoid(O_t) * c_t,

    or `h_t = c_t` without `gate`. `reverse` walks time from the end. `lengths`, int64 or int32
    (batch,), ends a batch column early: beyond its length `h` is 0 and nothing is read; a reverse
    walk starts at the last valid step. `y` may be a slice of the columns of a wider tensor.

    Returns `h` (seq_len, batch, hidden), the last state (batch, hidden) and, with `keep`, the
    states for the backward pass.
    """
    y, sizes, inputs = _layer_inputs(y, mask, scale, gate, lengths, bias)
    _check(y, ("c0", c0, sizes[1:]))
    h, c_last = _empty(sizes, y), _empty(sizes[1:], y)
    states = _empty_states(y, sizes) if keep else None
    outputs = (_contiguous(c0), h, sizes[2], states, c_last)
    _launch_columns(_FORWARD[gate, mask is not None], y, sizes, reverse, (*inputs, *outputs))
    return h, c_last, states


def qrnn_backward(
    grad_h: Tensor | None,
    grad_c_last: Tensor | None,
    y: Tensor,
    states: Tensor,
    mask: Tensor | None,
    scale: float | None,
    gate: bool,
    reverse: bool = False,
    lengths: Tensor | None = None,
    need_c0: bool = True,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `qrnn_forward`: of `y`, the initial state (or None) and the bias (or None).

    `grad_h` (seq_len, batch, hidden) and `grad_c_last` (batch, hidden) may be None for zeros;
    `states` is the third result of `qrnn_forward`. The initial state's gradient is computed if
    `need_c0`, the bias's if there is a bias. The rows of the gradient of `y` begin at multiples of
    16 bytes, as the fastest matrix products require.
    """
    y, sizes, inputs = _layer_inputs(y, mask, scale, gate, lengths, bias)
    _check(y, ("grad_h", grad_h, sizes), ("grad_c_last", grad_c_last, sizes[1:]))
    _check_states(states, y, sizes)
    grad_y = _empty_rows(y.shape, y)
    grad_c0 = _empty(sizes[1:], y) if need_c0 else None
    sums = None if bias is None else _empty(y.shape[1:], y, states.dtype)
    incoming = (states.contiguous(), *_rows(grad_h), _contiguous(grad_c_last))
    outputs = (*_parts(grad_y, sizes[2], gate), grad_y.stride(1), grad_c0, sums)
    arguments = (*inputs, *incoming, *outputs)
    _launch_columns(_BACKWARD[gate, mask is not None], y, sizes, reverse, arguments)
    return grad_y, grad_c0, None if sums is None else sums.sum(dim=0)


class ForgetMultFunction(torch.autograd.Function):
    """`ForgetMultFunction.apply(f, x, h0, reverse)`: `forget_mult_forward` with its gradient."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, x: Tensor, h0: Tensor | None, reverse: bool = False) -> Tensor:
        h, states = forget_mult_forward(f, x, h0, reverse, any(ctx.needs_input_grad))
        ctx.save_for_backward(f, x, states)
        ctx.reverse = reverse
        ctx.set_materialize_grads(False)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_h is None:
            return None, None, None, None
        need_h0 = ctx.needs_input_grad[2]
        return *forget_mult_backward(grad_h, *ctx.saved_tensors, ctx.reverse, need_h0), None


class QRNNFunction(torch.autograd.Function):
    """`QRNNFunction.apply(y, c0, mask, scale, gate, reverse, lengths, bias)`: a layer.

    The arguments are those of `qrnn_forward`; gradients reach `y`, `c0` and `bias`. Returns `h`
    (seq_len, batch, hidden) and the last state (batch, hidden).
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        c0: Tensor | None,
        mask: Tensor | None = None,
        scale: float | None = None,
        gate: bool = True,
        reverse: bool = False,
        lengths: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        options = {"keep": any(ctx.needs_input_grad), "bias": bias}
        h, c_last, states = qrnn_forward(y, c0, mask, scale, gate, reverse, lengths, **options)
        ctx.save_for_backward(y, states, mask, lengths, bias)
        ctx.options = scale, gate, reverse
        ctx.set_materialize_grads(False)
        return h, c_last

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_h: Tensor | None, grad_c_last: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_h is None and grad_c_last is None:
            return (None,) * 8
        y, states, mask, lengths, bias = ctx.saved_tensors
        options = (mask, *ctx.options, lengths, ctx.needs_input_grad[1], bias)
        grads = qrnn_backward(grad_h, grad_c_last, y, states, *options)
        return *grads[:2], *(None,) * 5, grads[2]


def _forget_mult_inputs(f: Tensor, x: Tensor, sizes: torch.Size) -> tuple:
    _check(x, ("f", f, sizes))
    return x.contiguous(), f.contiguous(), None, sizes[2], None, 1.0, None, None


def _layer_inputs(
    y: Tensor,
    mask: Tensor | None,
    scale: float | None,
    gate: bool,
    lengths: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, torch.Size, tuple]:
    """The checked `y`, its (seq_len, batch, hidden), and the first arguments of both kernels."""
    sizes = _sizes(y, 3 if gate else 2)
    _check(y, ("mask", mask, sizes))
    if mask is not None and scale is not None:
        raise ValueError("zoneout takes a mask (training) or a scale (evaluation), not both")
    if lengths is not None:
        if lengths.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"lengths must be int64 or int32, not {lengths.dtype}")
        if lengths.shape != sizes[1:2] or lengths.device != y.device:
            raise ValueError(
                f"lengths must have the shape {tuple(sizes[1:2])} (batch,) on {y.device}, "
                f"not {tuple(lengths.shape)} on {lengths.device}"
            )
        lengths = lengths.to(torch.int64).contiguous()
    if bias is not None:
        if bias.shape != y.shape[2:] or bias.device != y.device:
            raise ValueError(
                f"bias must have the shape {tuple(y.shape[2:])} on {y.device}, "
                f"not {tuple(bias.shape)} on {bias.device}"
            )
        bias = bias.to(wide(y.dtype)).contiguous()
    y, y_row = _rows(y)
    factors = (_contiguous(mask), 1.0 if scale is None else float(scale), lengths, bias)
    return y, sizes, (*_parts(y, sizes[2], gate), y_row, *factors)


def _parts(y: Tensor, hidden: int, gate: bool) -> tuple[int, int, int | None]:
    """Addresses of Z, F and O in `y`: cheaper than slices, but `y` must outlive them."""
    z, size = y.data_ptr(), hidden * y.element_size()
    return z, z + size, z + 2 * size if gate else None


def _sizes(y: Tensor, parts: int) -> torch.Size:
    """(seq_len, batch, hidden) of a tensor (seq_len, batch, parts * hidden), checked."""
    if y.dtype not in SCALARS:
        raise TypeError(f"the QRNN kernels take {_dtype_names()}, not {y.dtype}")
    if y.dim() != 3 or 0 in y.shape or y.size(2) % parts or y.size(0) > _MAX_STEPS:
        raise ValueError(
            f"expected a non-empty tensor (seq_len, batch, {parts} * hidden), not {tuple(y.shape)}"
        )
    return torch.Size((y.size(0), y.size(1), y.size(2) // parts))


def _check(like: Tensor, *tensors: tuple[str, Tensor | None, torch.Size]) -> None:
    """Check dtype and device of the named tensors against `like`, and their shapes; skip None."""
    for name, tensor, shape in tensors:
        if tensor is None:
            continue
        if tensor.dtype != like.dtype:
            raise TypeError(
                f"{name} must be {like.dtype} like the other tensors, not {tensor.dtype}"
            )
        if tensor.shape != shape or tensor.device != like.device:
            raise ValueError(
                f"{name} must have the shape {tuple(shape)} on {like.device}, "
                f"not {tuple(tensor.shape)} on {tensor.device}"
            )


def _check_states(states: Tensor, like: Tensor, sizes: torch.Size) -> None:
    shape, dtype = kept_states(like.dtype, sizes)
    if (states.shape, states.dtype, states.device) != (shape, dtype, like.device):
        raise ValueError(
            f"states must be what the forward pass returned, {tuple(shape)} {dtype} on "
            f"{like.device}, not {tuple(states.shape)} {states.dtype} on {states.device}"
        )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _rows(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """A (seq_len, batch, hidden) tensor and its row stride, in elements.

    The tensor itself if its rows are dense and evenly spaced, as in a slice of columns, and
    otherwise a contiguous copy: an expanded gradient, for instance, has a row stride of 0.
    """
    if tensor is None:
        return None, 0
    seq_len, batch, hidden = tensor.shape
    time_stride, batch_stride, stride = tensor.stride()
    # The stride of a dimension of size 1 is arbitrary.
    row = batch_stride if batch > 1 else time_stride if seq_len > 1 else hidden
    even = seq_len == 1 or time_stride == batch * row
    if even and row >= hidden and (stride == 1 or hidden == 1):
        return tensor, row
    return tensor.contiguous(), hidden


def _empty(shape: torch.Size, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def _empty_rows(shape: torch.Size, like: Tensor) -> Tensor:
    """As `_empty`, with aligned rows."""
    line = max(1, 16 // like.element_size())
    padded = torch.Size((*shape[:-1], -(-shape[-1] // line) * line))
    return _empty(padded, like)[..., : shape[-1]]


def _empty_states(like: Tensor, sizes: torch.Size) -> Tensor:
    shape, dtype = kept_states(like.dtype, sizes)
    return _empty(shape, like, dtype)


def _launch_columns(
    name: str, like: Tensor, sizes: torch.Size, reverse: bool, arguments: tuple
) -> None:
    """Launch a kernel with one thread per batch column and feature.

    Every argument is passed 64 bits wide, as the kernel declares it: tensors and addresses as
    pointers, None as the null pointer, int as long long, float as double. `arguments` keeps
    temporary tensors alive until the launch; afterwards the stream's order protects their memory.
    """
    seq_len, batch, hidden = sizes
    values = [cuda.value(argument) for argument in arguments]
    values += (seq_len, batch, hidden, int(reverse))
    grid = ((batch * hidden + BLOCK - 1) // BLOCK,)
    SOURCE.launch(name, compile_options(like.dtype), like.device, grid, (BLOCK,), values)


def _dtype_names() -> str:
    return ", ".join(str(dtype) for dtype in SCALARS)
