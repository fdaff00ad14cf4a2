"""weight_drop.py and its faster form: the dropped entries, and errors of the original."""

import copy

import pytest
import references
import torch
from torch import nn

from fast import cudnn
from fast import weight_drop as fast_weight_drop
from fast.weight_drop import FastWeightDrop
from model import GRU, LSTM
from weight_drop import WeightDrop


@pytest.fixture(params=[WeightDrop, FastWeightDrop], ids=["plain", "fast"])
def kind(request):
    return request.param


def lstm(kind=WeightDrop, dropout=0.5, variational=False, cell=nn.LSTM):
    torch.manual_seed(1)
    return kind(cell(5, 7), ["weight_hh_l0"], dropout, variational)


def test_uses_the_dropped_weight_on_nn_lstm(kind):
    drop = lstm(kind)
    x = torch.randn(6, 3, 5)
    output, _ = drop(x)
    inner = drop.module
    assert (inner.weight_hh_l0 == 0).any()
    zeros = torch.zeros(3, 7)
    bias = inner.bias_ih_l0 + inner.bias_hh_l0
    expected = references.lstm(x, zeros, zeros, inner.weight_ih_l0, inner.weight_hh_l0, bias)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


def test_kept_entries_are_scaled_and_the_share_is_right(kind):
    torch.manual_seed(0)
    drop = kind(nn.Linear(300, 200), ["weight"], 0.3)
    drop(torch.randn(2, 300))
    first = drop.module.weight
    drop(torch.randn(2, 300))
    raw, dropped = drop.module.weight_raw, drop.module.weight
    assert not torch.equal(first, dropped)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], raw[kept] / 0.7)
    assert abs(kept.float().mean().item() - 0.7) < 0.01


@pytest.mark.parametrize("dropout", [1e-12, 0.1, 0.5, 0.9, 1 - 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_mask_of_the_cpu(dropout, dtype):
    # An odd number of entries, as two entries share one drawn number.
    torch.manual_seed(3)
    raw = torch.ones(301, 203, dtype=dtype)
    mask = fast_weight_drop._kept(raw, dropout, dtype).div_(1 - dropout)
    assert mask.dtype == dtype
    assert mask.shape == raw.shape
    kept = mask != 0
    assert (mask[kept] == torch.tensor(1 / (1 - dropout), dtype=dtype)).all()
    assert abs(kept.double().mean().item() - (1 - dropout)) < 0.006
    # Entries are independent of their neighbours in the row and in the column.
    for a, b in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1])):
        both = (a & b).double().mean().item()
        assert abs(both - (1 - dropout) ** 2) < 0.01


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_dropped_weight_is_a_plain_tensor_and_the_raw_one_trains(kind, cell):
    # A common fix of the original makes the dropped weight a Parameter, and then the raw weight
    # gets no gradient.
    module = cell(5, 7)
    weight = module.weight_hh_l0
    drop = kind(module, ["weight_hh_l0"], 0.5)
    output, _ = drop(torch.randn(6, 3, 5))
    dropped = module.weight_hh_l0
    assert not isinstance(dropped, nn.Parameter)
    assert not dropped.is_leaf
    # An optimiser that was made before holds the raw weight.
    assert module.weight_hh_l0_raw is weight
    output.pow(2).sum().backward()
    assert torch.equal(weight.grad == 0, dropped == 0)


def test_gradient_of_the_raw_weight_against_finite_differences(kind):
    drop = lstm(kind).double()
    x = torch.randn(4, 2, 5, dtype=torch.float64)

    def output(_):
        torch.manual_seed(3)  # the same mask every time
        return drop(x)[0]

    assert torch.autograd.gradcheck(output, drop.module.weight_hh_l0_raw)


def test_training_step_after_an_evaluation(kind):
    # In the original the first training call after an evaluation fails.
    drop = lstm(kind)
    x = torch.randn(6, 3, 5)
    for _ in range(2):
        drop.train()
        drop(x)[0].sum().backward()
        drop.eval()
        with torch.no_grad():
            drop(x)
    with torch.inference_mode():
        drop(x)
    drop.train()
    drop(x)[0].sum().backward()


@pytest.mark.parametrize("variational", [False, True])
def test_nothing_is_dropped_in_evaluation(kind, variational):
    # With variational=True the original drops rows in evaluation too.
    drop = lstm(kind, variational=variational)
    x = torch.randn(6, 3, 5)
    drop(x)
    drop.eval()
    first, _ = drop(x)
    plain = nn.LSTM(5, 7)
    plain.load_state_dict(
        {k.removeprefix("module.").removesuffix("_raw"): v for k, v in drop.state_dict().items()}
    )
    torch.testing.assert_close(first, plain(x)[0])
    first.sum().backward()
    assert drop.module.weight_hh_l0_raw.grad.abs().sum() > 0


def test_variational_drops_whole_rows(kind):
    drop = lstm(kind, variational=True)
    rows = set()
    for _ in range(20):
        drop(torch.randn(2, 1, 5))
        zero = drop.module.weight_hh_l0 == 0
        assert torch.equal(zero.any(dim=1), zero.all(dim=1))
        rows |= set(zero.all(dim=1).nonzero().flatten().tolist())
    assert len(rows) == 28


def test_copy_and_move_after_a_call(kind):
    drop = lstm(kind)
    x = torch.randn(6, 3, 5)
    drop(x)
    twin = copy.deepcopy(drop)
    drop.eval(), twin.eval()
    torch.testing.assert_close(twin(x)[0], drop(x)[0])
    drop.double()
    assert drop(x.double())[0].dtype == torch.float64


def test_unknown_weight_name():
    with pytest.raises(AttributeError, match="weight_hh_l9"):
        WeightDrop(nn.LSTM(5, 7), ["weight_hh_l9"], 0.5)


def test_the_dropout_of_an_aligned_weight():
    torch.manual_seed(0)
    raw = torch.randn(300, 7, requires_grad=True)
    dropped = fast_weight_drop._AlignedDropout.apply(raw, 0.25)
    assert dropped.stride(0) * 4 % 16 == 0
    kept = dropped != 0
    assert kept.float().mean() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(dropped[kept], raw[kept] / 0.75)
    weight = torch.randn(300, 7)
    (grad,) = torch.autograd.grad(dropped, raw, weight)
    torch.testing.assert_close(grad, torch.where(kept, weight / 0.75, 0.0))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(("cell", "form"), [(LSTM, cudnn.FastLSTM), (GRU, cudnn.FastGRU)])
def test_from_one_buffer_a_cell_gives_the_same_in_float32(cell, form, low, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda input: True)
    torch.manual_seed(2)
    drop, x = WeightDrop(cell(5, 7, 0), ["weight_hh_l0"]), torch.randn(6, 3, 5)
    h, c = torch.randn(2, 1, 3, 7).unbind()
    weight = torch.randn(6, 3, 7)
    x.requires_grad_()
    given = x.bfloat16() if low else x
    results = []
    for kind, inputs in ((cell, given.float()), (form, given)):
        drop.module.__class__ = kind
        with torch.autocast("cpu", torch.bfloat16, low and kind is form):
            output, state = drop(inputs, (h, c) if cell is LSTM else h)
        assert output.dtype == torch.float32
        grads = torch.autograd.grad((output * weight).sum(), [x, *drop.parameters()])
        results.append([output, *(state if cell is LSTM else [state]), *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_buffer_is_one_and_in_the_order_of_cudnn():
    tensors = [torch.randn(4, 3, requires_grad=True), torch.randn(4), torch.randn(4)]
    views = cudnn._OneBuffer.apply(*tensors)
    address = views[0].data_ptr()
    for view, tensor in zip(views, tensors, strict=True):
        assert torch.equal(view, tensor)
        assert view.data_ptr() == address
        address += 4 * view.numel()
    assert views[0].untyped_storage().nbytes() == 4 * 20
