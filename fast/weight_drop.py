"""The masks of weight_drop.py, drawn and applied faster."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fast import linear
from qrnn.check import numbers
from weight_drop import WeightDrop


class FastWeightDrop(WeightDrop):
    """WeightDrop with the same share of dropped entries, from fewer random bits on a CPU."""

    def drop(self, raw: Tensor) -> Tensor:
        # torch.compile cannot follow NumPy's generator.
        traced = torch.compiler.is_compiling()
        if self.training and self.dropout and not self.variational and not traced:
            if linear.in_bfloat16(raw):
                return _LowDropout.apply(raw, self.dropout)
            if raw.device.type == "cpu":
                kept = _kept(raw, self.dropout, raw.dtype)
                return raw * kept.div_(1 - self.dropout)
            if raw.is_cuda and isinstance(self.module, linear.FastLinear):
                return _AlignedDropout.apply(raw, self.dropout)
        return super().drop(raw)


def _kept(like: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
    """Ones for the entries that are kept and zeros for the others, on the CPU.

    PyTorch draws 64 random bits for each entry, one by one, which for a large matrix takes longer
    than most operations on it. Here PyTorch draws the seed of a faster generator, and four entries
    share 64 bits: the share of dropped entries is a multiple of 1 / 65536.
    """
    seed = int(torch.randint(2**62, ()))
    bits = np.random.SFC64(seed).random_raw((like.numel() + 3) // 4).view(np.int16)
    words = torch.from_numpy(bits)[: like.numel()].view(like.shape)
    below = min(round((1 - dropout) * 2**16) - 2**15, 2**15 - 1)
    return torch.lt(words, below, out=torch.empty(like.shape, dtype=dtype))


class _LowDropout(torch.autograd.Function):
    """`functional.dropout` of a matrix on the CPU, in training; the result is in bfloat16."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, p: float) -> Tensor:
        kept, ctx.scale = _kept(weight, p, torch.int16), 1 / (1 - p)
        ctx.save_for_backward(kept)
        out = torch.mul(weight, ctx.scale, out=weight.new_empty(weight.shape, dtype=torch.bfloat16))
        # As integers: a product of two bytes by 0 or 1 is faster than one in bfloat16.
        out.view(torch.int16).mul_(kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        d_weight = (grad.view(torch.int16) * kept).view(torch.bfloat16)
        return d_weight.float().mul_(ctx.scale), None


class _AlignedDropout(torch.autograd.Function):
    """`functional.dropout` of a matrix, in training; the result's rows are aligned."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, p: float) -> Tensor:
        mask = torch.empty_like(weight, dtype=torch.bool).bernoulli_(1 - p)
        ctx.save_for_backward(mask)
        ctx.scale = 1 / (1 - p)
        out = linear.empty(weight.shape, weight)
        return torch.addcmul(weight.new_zeros(()), weight, mask, value=ctx.scale, out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.ops.aten.native_dropout_backward(grad, mask, ctx.scale), None


def compare(like: Tensor) -> Iterator[list[Tensor]]:
    """The values of a mask, and a weight with the first mask, of both classes.

    Raises ValueError if the shares of dropped entries differ by more than chance, which is 0.5 %.
    """
    masks = []
    for kind in (FastWeightDrop, WeightDrop):
        module = linear.FastLinear(1, 1, bias=False)
        module.weight = nn.Parameter((numbers(512, 1, like=like) + 2).repeat(1, 512))
        weight_drop = kind(module, ["weight"], 0.3)
        raw = module.weight_raw
        weight = weight_drop.drop(raw)
        masks += torch.autograd.grad(weight.sum(), raw)
        # A weight is the raw one times its mask; the masks themselves differ.
        yield [masks[-1].unique(), raw * masks[0] + (weight - raw * masks[-1])]
    one, other = ((mask == 0).double().mean().item() for mask in masks)
    if abs(one - other) > 0.005:
        raise ValueError(f"it drops {one:.2%} of the entries in place of {other:.2%}")
