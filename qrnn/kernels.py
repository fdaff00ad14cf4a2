"""The recurrence and the layer of definition.py as CUDA kernels, `forget_mult.cu`, with gradients.

"Quasi-Recurrent Neural Networks", arXiv 1611.01576, section 2.1.

All tensors are of one dtype (float64, float32, float16 or bfloat16) and on one GPU.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qrnn import cuda

SOURCE = Path(__file__).with_name("forget_mult.cu")
# Steps per chunk. The forward kernel stores the state before each chunk; the backward kernel holds
# two chunks of every stream in registers. float64 is for checking gradients, not for speed.
CHUNK = {torch.float64: 4, torch.float32: 8, torch.float16: 8, torch.bfloat16: 8}
BLOCK = 64  # threads per block, the kernels' launch bound


def forget_mult(f: Tensor, x: Tensor, hidden_init: Tensor | None = None) -> Tensor:
    """As definition.forget_mult, forwards in time.

    Raises ValueError if another tensor has a wrong shape, or another dtype or device than `x`.
    """
    f = _checked("f", f, x.shape, like=x)
    hidden_init = _checked("hidden_init", hidden_init, x.shape[1:], like=x)
    options = {"gate": False, "reverse": False, "scale": 1.0}
    h, _ = _Recurrence.apply(x.contiguous(), f, hidden_init, None, None, None, options)
    return h


def pool(
    y: Tensor,
    c_init: Tensor | None = None,
    zoneout: Tensor | float | None = None,
    output_gate: bool = True,
    reverse: bool = False,
    lengths: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As definition.pool of `y + bias`; `bias` is (3 * hidden,), or (2 * hidden,) without a gate.

    `y` may be a slice of the columns of a wider tensor, which is read in place. Raises ValueError
    if `c_init` or `zoneout` has a wrong shape, or another dtype or device than `y`.
    """
    sizes = torch.Size((*y.shape[:2], y.size(2) // (3 if output_gate else 2)))
    c_init = _checked("c_init", c_init, sizes[1:], like=y)
    mask, scale = None, 1.0
    if isinstance(zoneout, Tensor):
        mask = _checked("zoneout", zoneout, sizes, like=y)
    elif zoneout is not None:
        scale = float(zoneout)
    if lengths is not None:
        lengths = lengths.to(y.device, torch.int64).expand(y.size(1)).contiguous()
    if bias is not None:
        bias = bias.to(y.device, cuda.wide(y.dtype)).expand(y.size(2)).contiguous()
    options = {"gate": output_gate, "reverse": reverse, "scale": scale}
    return _Recurrence.apply(y, None, c_init, mask, lengths, bias, options)


@functools.cache
def compile_options(dtype: torch.dtype, fused: bool, gate: bool, mask: bool) -> tuple[str, ...]:
    """Compiler options for tensors of `dtype` and one variant of the kernels."""
    macros = {"SCALAR": cuda.SCALARS[dtype], "CHUNK": CHUNK[dtype]}
    macros |= {"FUSED": int(fused), "GATE": int(gate), "MASK": int(mask)}
    return tuple(f"-D{name}={value}" for name, value in macros.items())


class _Recurrence(torch.autograd.Function):
    """The outputs and, of a layer, the last state.

    `z` holds a layer's Z | F | O, without an `f`, or the `x` of ForgetMult. All tensors but a
    layer's `z` are contiguous.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        f: Tensor | None,
        c_init: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | None,
        bias: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        seq_len, batch, hidden = _parts(z, f, options["gate"])[0].shape
        h = z.new_empty(seq_len, batch, hidden)
        c_last = z.new_empty(batch, hidden) if f is None else None
        states = None
        if any(ctx.needs_input_grad):
            chunks = -(-seq_len // CHUNK[z.dtype])
            states = z.new_empty(chunks, batch, hidden, dtype=cuda.wide(z.dtype))
        inputs = {"z": z, "f": f, "mask": mask, "lengths": lengths, "bias": bias}
        _launch("qrnn_forward", **inputs, **options, others=(c_init, h, states, c_last))
        ctx.save_for_backward(states, *inputs.values())
        ctx.options = options
        ctx.set_materialize_grads(False)
        return h, c_last

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_h: Tensor | None, grad_last: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        states, z, f, mask, lengths, bias = ctx.saved_tensors
        seq_len, batch, width = z.shape
        grad_f, row = None, width
        if f is None:
            # Rows begin at multiples of 16 bytes, as the fastest matrix products require.
            line = 16 // z.element_size()
            row = -(-width // line) * line
        else:
            grad_f = f.new_empty(f.shape)
        grad_z = z.new_empty(seq_len, batch, row)[..., :width]
        _, _, need_init, _, _, need_bias, _ = ctx.needs_input_grad
        grad_init = z.new_empty(states.shape[1:]) if need_init else None
        grad_bias = z.new_empty(batch, width, dtype=states.dtype) if need_bias else None
        grad_h, grad_h_row = (None, 0) if grad_h is None else _rows(grad_h)
        grad_last = None if grad_last is None else grad_last.contiguous()
        incoming = (states, grad_h, grad_h_row, grad_last)
        outputs = (*_parts(grad_z, grad_f, ctx.options["gate"]), row, grad_init, grad_bias)
        inputs = {"z": z, "f": f, "mask": mask, "lengths": lengths, "bias": bias}
        _launch("qrnn_backward", **inputs, **ctx.options, others=(*incoming, *outputs))
        if grad_bias is not None:
            grad_bias = grad_bias.sum(dim=0)
        return grad_z, grad_f, grad_init, None, None, grad_bias, None


def _launch(
    name: str,
    *,
    z: Tensor,
    f: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
    gate: bool,
    reverse: bool,
    scale: float,
    others: tuple[Tensor | int | None, ...],
) -> None:
    """Launch a kernel with a thread for each batch column and feature.

    `others` are its parameters between the inputs and the sizes. The arguments keep temporary
    tensors alive until the launch; then the stream's order protects their memory.
    """
    options = compile_options(z.dtype, fused=f is None, gate=gate, mask=mask is not None)
    z, row = _rows(z)
    z, f, o = _parts(z, f, gate)
    if not z.numel():
        raise ValueError(f"the shape (seq_len, batch, hidden) has a zero: {tuple(z.shape)}")
    seq_len, batch, hidden = z.shape
    cuda.launch(
        SOURCE,
        name,
        options,
        z.device,
        grid=-(-batch * hidden // BLOCK),
        block=BLOCK,
        arguments=(
            *(z, f, o, row, mask, scale, lengths, bias),
            *others,
            *(seq_len, batch, hidden, int(reverse)),
        ),
    )


def _parts(z: Tensor, f: Tensor | None, gate: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Z, F and O, or without a gate None: views of a layer's `z`."""
    if f is not None:
        return z, f, None
    z, f, *o = z.chunk(3 if gate else 2, dim=2)
    return z, f, o[0] if gate else None


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor (seq_len, batch, hidden) and the distance of its rows, in elements.

    It is the tensor itself if its rows are dense and evenly spaced, as in a slice of columns, and
    otherwise a contiguous copy.
    """
    _, batch, hidden = tensor.shape
    row = tensor.stride(1)
    if tensor.stride() == (batch * row, row, 1):
        return tensor, row
    return tensor.contiguous(), hidden


def _checked(name: str, tensor: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor | None:
    """A contiguous tensor, or None; ValueError for another shape, dtype or device."""
    if tensor is None:
        return None
    if (tensor.shape, tensor.dtype, tensor.device) != (shape, like.dtype, like.device):
        raise ValueError(
            f"{name} must be {tuple(shape)}, {like.dtype} on {like.device}, "
            f"not {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
        )
    return tensor.contiguous()
