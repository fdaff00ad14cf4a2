"""bfloat16 on a CPU: products, cells and softmax of fast/ against their definitions in float32."""

import pytest
import torch
from torch import nn

import fast
from fast import linear, rnn_bf16
from fast.splitcross import FastSplitCrossEntropyLoss
from model import GRU, LSTM
from qrnn.check import distance
from run.device import has_bf16
from splitcross import SplitCrossEntropyLoss

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not has_bf16(CPU), reason="this CPU has no products in bfloat16")


def results(module, inputs, low):
    """Outputs of a module, and gradients of its inputs and parameters."""
    torch.manual_seed(5)
    inputs = [part.detach().clone().requires_grad_() for part in inputs]
    with torch.autocast("cpu", torch.bfloat16, low):
        x, *states = inputs
        state = tuple(states) if isinstance(module, nn.LSTM) else (states or [None])[0]
        outputs = module(x, state) if states else module(x)
    flat = [outputs] if isinstance(outputs, torch.Tensor) else [outputs[0], *outputs[1]]
    loss = sum((part.float() * torch.randn(part.shape)).sum() for part in flat)
    return flat + list(torch.autograd.grad(loss, [*inputs, *module.parameters()]))


@pytest.mark.parametrize(
    ("steps", "batch", "n_in", "n_out"), [(1, 1, 3, 5), (7, 3, 33, 50), (70, 20, 64, 66)]
)
@pytest.mark.parametrize(("kind", "form"), [(LSTM, rnn_bf16.FastLSTM), (GRU, rnn_bf16.FastGRU)])
def test_cells_against_float32(kind, form, steps, batch, n_in, n_out):
    torch.manual_seed(1)
    cell = kind(n_in, n_out, 0)
    states = [torch.randn(1, batch, n_out) / 3 for _ in range(2 if kind is LSTM else 1)]
    inputs = [torch.randn(steps, batch, n_in), *states]
    expected = results(cell, inputs, low=False)
    cell.__class__ = form
    found = results(cell, inputs, low=True)
    assert distance(found, expected) < 8e-3
    assert {part.dtype for part in found[1 : 1 + len(states)]} == {torch.float32}
    # Evaluation is outside of autocast, and in float32.
    assert distance(results(cell, inputs, low=False), expected) == 0


@pytest.mark.parametrize("size", [(1, 1, 1), (60, 33, 50), (300, 50, 129)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_maps_against_float32(size, bias, monkeypatch):
    """Two in a row: a result is the next one's left operand, and its gradient the other way."""
    rows, n_in, n_out = size
    torch.manual_seed(2)
    maps = nn.Sequential(nn.Linear(n_in, n_out, bias), nn.Linear(n_out, n_in, bias))
    x = torch.randn(rows, n_in)
    expected = results(maps, [x], low=False)
    for part in maps:
        part.__class__ = linear.FastLinear
    # Memory that was used before may hold anything.
    empty = linear.empty

    def used(shape, like, dtype=None):
        result = empty(shape, like, dtype)
        result.as_strided((shape[0], result.stride(0)), result.stride()).fill_(torch.nan)
        return result

    monkeypatch.setattr(linear, "empty", used)
    found = results(maps, [x], low=True)
    assert found[0].dtype == torch.bfloat16
    assert distance(found, expected) < 1.2e-2


def test_what_lies_between_aligned_rows_is_zero():
    # oneDNN's product multiplies it by zero, which is not zero for nan.
    rows = linear.low_rows(torch.randn(5, 33))
    assert rows.stride() == (64, 1)
    assert (rows.as_strided((5, 31), (64, 1), 33) == 0).all()


def test_a_softmax_over_several_blocks_against_float32():
    torch.manual_seed(3)
    weight, bias, hiddens = (torch.randn(size) for size in ((90, 8), (90,), (150, 8)))
    targets = torch.randint(90, (150,))

    def grads(kind, low):
        parts = [part.clone().requires_grad_() for part in (weight, bias, hiddens)]
        with torch.autocast("cpu", torch.bfloat16, low):
            loss = kind(8, [])(*parts, targets)
        return [loss, *torch.autograd.grad(loss, parts)]

    expected = grads(SplitCrossEntropyLoss, low=False)
    assert distance(grads(FastSplitCrossEntropyLoss, low=True), expected) < 8e-3


@pytest.mark.parametrize("form", [rnn_bf16.FastLSTM, rnn_bf16.FastGRU])
def test_a_state_of_another_batch_size_is_an_error_and_float64_stays(form):
    cell = form(3, 4, 0)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="Expected hidden"):
            cell(torch.randn(5, 3, 3), cell.initial_state(1))
        double = linear.FastLinear(3, 4).double()
        assert double(torch.randn(2, 3).double()).dtype == torch.float64


def test_the_cells_of_this_file_are_for_bfloat16_on_a_cpu_alone():
    for bf16, forms in ((True, [rnn_bf16.FastLSTM, rnn_bf16.FastGRU]), (False, [LSTM, GRU])):
        cells = nn.ModuleList([LSTM(3, 4, 0), GRU(3, 4, 0)])
        lines = fast.choose(cells, bf16=bf16)
        assert [type(cell) for cell in cells] == forms
        assert ("fast.rnn_bf16" in lines[0]) == bf16


def test_a_cell_that_is_wrong_is_found(monkeypatch):
    steps = rnn_bf16._LSTMSteps.forward

    def forgetful(ctx, *tensors):
        output, h, c = steps(ctx, *tensors)
        return output, h, c * 0.97

    monkeypatch.setattr(rnn_bf16._LSTMSteps, "forward", staticmethod(forgetful))
    problem = fast._problem.__wrapped__("fast.rnn_bf16.FastLSTM", CPU, torch.float32, True)
    assert "fast/rnn_bf16.py does not do what its definition does" in problem
