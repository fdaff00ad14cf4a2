"""The LSTM and the GRU in bfloat16 on a CPU: products step by step, gates and states in float32.

PyTorch's own LSTM takes over three times as long as its products in bfloat16
(results/train-step.md). Here the inputs of all steps are one product, and so is each weight's
gradient; a step has one product with the recurrent weight, in oneDNN's own layout.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fast.linear import in_bfloat16, low_rows, transposed
from model import GRU, LSTM
from qrnn.check import cell_results

_BF16 = torch.bfloat16
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class _InBfloat16(nn.RNNBase):
    steps: type[torch.autograd.Function]

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        if hx is None or input.dim() != 3 or not in_bfloat16(input):
            return super().forward(input, hx)
        self.check_forward_args(input, hx, None)
        states = [part[0].float() for part in (hx if isinstance(hx, tuple) else [hx])]
        weights = [getattr(self, name) for name in self._flat_weights_names]
        with torch.autocast("cpu", enabled=False):
            output, *states = self.steps.apply(input, *weights, *states)
        states = [part.unsqueeze(0) for part in states]
        return output, tuple(states) if isinstance(hx, tuple) else states[0]


class _LSTMSteps(torch.autograd.Function):
    """A layer's steps from its states (batch, n_out); the gates are i, f, g, o, as in nn.LSTM."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
        h_0: Tensor,
        c_0: Tensor,
    ) -> tuple[Tensor, ...]:
        steps, w_ih, w_hh = len(x), w_ih.to(_BF16), w_hh.to(_BF16)
        recurrent = _Recurrent(w_hh, len(h_0))
        rows, inputs = _from_inputs(x, w_ih, b_ih + b_hh)
        gates = torch.empty_like(inputs, dtype=torch.float32)
        h, c = _sequence(h_0, steps, _BF16), _sequence(c_0, steps)
        tanh_c = torch.empty_like(c[1:])
        for t in range(steps):
            i, f, g, o = gates[t].copy_(recurrent(h[t], plus=inputs[t])).chunk(4, dim=1)
            for gate in (i, f, o):
                gate.sigmoid_()
            torch.mul(f, c[t], out=c[t + 1]).addcmul_(i, g.tanh_())
            torch.mul(o, torch.tanh(c[t + 1], out=tanh_c[t]), out=h[t + 1])
        ctx.save_for_backward(rows, w_ih, w_hh, gates, h, c, tanh_c)
        return h[1:], h[-1].float(), c[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_h: Tensor, d_c: Tensor) -> tuple[Tensor, ...]:
        rows, w_ih, w_hh, gates, h, c, tanh_c = ctx.saved_tensors
        recurrent, d_y = _Recurrent(transposed(w_hh), len(d_h)), d_y.float()
        d_gates, d_gate = torch.empty_like(gates, dtype=_BF16), torch.empty_like(gates[0])
        d_i, d_f, d_g, d_o = d_gate.chunk(4, dim=1)
        d_bias, d_c, part = torch.zeros_like(d_gate), d_c.clone(), torch.empty_like(d_c)
        for t in reversed(range(len(d_y))):
            i, f, g, o = gates[t].chunk(4, dim=1)
            d_h = d_y[t] + d_h
            _sigmoid_backward(torch.mul(d_h, tanh_c[t], out=part), o, grad_input=d_o)
            d_c += _tanh_backward(torch.mul(d_h, o, out=part), tanh_c[t], grad_input=part)
            _sigmoid_backward(torch.mul(d_c, g, out=part), i, grad_input=d_i)
            _sigmoid_backward(torch.mul(d_c, c[t], out=part), f, grad_input=d_f)
            _tanh_backward(torch.mul(d_c, i, out=part), g, grad_input=d_g)
            d_c *= f
            d_bias += d_gate
            d_h = recurrent(d_gates[t].copy_(d_gate))
        d_rows = d_gates.flatten(0, 1)
        columns = transposed(d_rows)
        d_ih, d_hh = columns @ rows, columns @ h[:-1].flatten(0, 1)
        d_x = (d_rows @ w_ih).view(*d_y.shape[:2], -1)
        d_bias = d_bias.sum(dim=0)
        return d_x, d_ih, d_hh, d_bias, d_bias.clone(), d_h.float(), d_c


class _GRUSteps(torch.autograd.Function):
    """A layer's steps from its state (batch, n_out); the gates are r, z, n, as in nn.GRU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
        h_0: Tensor,
    ) -> tuple[Tensor, ...]:
        steps, w_ih, w_hh = len(x), w_ih.to(_BF16), w_hh.to(_BF16)
        recurrent = _Recurrent(w_hh, len(h_0), b_hh.to(_BF16))
        rows, inputs = _from_inputs(x, w_ih, b_ih)
        gates = inputs.float()
        h, low_h = _sequence(h_0, steps), _sequence(h_0, steps, _BF16)
        from_h = torch.empty_like(h[1:])  # the part of n that r multiplies
        for t in range(steps):
            r, z, n = gates[t].chunk(3, dim=1)
            to_r, to_z, to_n = recurrent(low_h[t]).chunk(3, dim=1)
            r.add_(to_r).sigmoid_()
            z.add_(to_z).sigmoid_()
            n.addcmul_(r, from_h[t].copy_(to_n)).tanh_()
            low_h[t + 1] = torch.lerp(n, h[t], z, out=h[t + 1])
        ctx.save_for_backward(rows, w_ih, w_hh, gates, h, low_h, from_h)
        return low_h[1:], h[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_h: Tensor) -> tuple[Tensor, ...]:
        rows, w_ih, w_hh, gates, h, low_h, from_h = ctx.saved_tensors
        recurrent, d_y = _Recurrent(transposed(w_hh), len(d_h)), d_y.float()
        d_inputs = torch.empty_like(gates, dtype=_BF16)
        d_recurrent = torch.empty_like(d_inputs)
        d_gate, part = torch.empty_like(gates[0]), torch.empty_like(d_h)
        d_r, d_z, d_n = d_gate.chunk(3, dim=1)
        d_bias_ih, d_bias_hh = torch.zeros_like(d_gate), torch.zeros_like(d_gate)
        for t in reversed(range(len(d_y))):
            r, z, n = gates[t].chunk(3, dim=1)
            d_h = d_y[t] + d_h
            _sigmoid_backward(torch.sub(h[t], n, out=part).mul_(d_h), z, grad_input=d_z)
            kept = d_h * z
            _tanh_backward(torch.sub(d_h, kept, out=part), n, grad_input=d_n)
            _sigmoid_backward(torch.mul(d_n, from_h[t], out=part), r, grad_input=d_r)
            d_inputs[t] = d_gate
            d_bias_ih += d_gate
            d_n *= r
            d_bias_hh += d_gate
            d_h = kept.add_(recurrent(d_recurrent[t].copy_(d_gate)))
        d_rows = d_inputs.flatten(0, 1)
        d_ih = transposed(d_rows) @ rows
        d_hh = transposed(d_recurrent.flatten(0, 1)) @ low_h[:-1].flatten(0, 1)
        d_x = (d_rows @ w_ih).view(*d_y.shape[:2], -1)
        return d_x, d_ih, d_hh, d_bias_ih.sum(dim=0), d_bias_hh.sum(dim=0), d_h


class FastLSTM(_InBfloat16, LSTM):
    """The cell LSTM on a CPU in bfloat16."""

    steps = _LSTMSteps


class FastGRU(_InBfloat16, GRU):
    """The cell GRU on a CPU in bfloat16."""

    steps = _GRUSteps


class _Recurrent:
    """`rows @ weight.t() + bias` for the `batch` rows of each step, in oneDNN's own layout."""

    def __init__(self, weight: Tensor, batch: int, bias: Tensor | None = None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
        self.bias = bias

    def __call__(self, rows: Tensor, plus: Tensor | None = None) -> Tensor:
        """The product, to which `plus` is added before the sums are rounded."""
        product = torch.ops.mkldnn._linear_pointwise
        if plus is None:
            return product(rows, self.weight, self.bias, "none", [], "")
        return product.binary(rows, plus, self.weight, self.bias, "add")


def _from_inputs(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (steps, batch, n_in) as rows of a product, and `x @ weight.t() + bias` of all steps."""
    rows = low_rows(x.flatten(0, 1))
    return rows, torch.addmm(bias.to(_BF16), rows, weight.t()).view(*x.shape[:2], -1)


def _sequence(first: Tensor, steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """States (steps + 1, batch, n_out), of which the `first` is filled in."""
    states = first.new_empty(steps + 1, *first.shape, dtype=dtype)
    states[0] = first
    return states


def compare(like: Tensor) -> Iterator[list[Tensor]]:
    """Outputs, states and gradients of FastLSTM and FastGRU, then of LSTM and GRU in float32."""
    for low, kinds in ((True, (FastLSTM, FastGRU)), (False, (LSTM, GRU))):
        cells = [kind(8, 16, 0).to(like) for kind in kinds]
        with torch.autocast("cpu", torch.bfloat16, low):
            results = [cell_results(cell, like, scale=0.25) for cell in cells]
        yield [part for parts in results for part in parts]
