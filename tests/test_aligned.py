"""kernels/aligned.py: results equal plain products, with rows that begin on cache lines."""

import pytest
import torch

from kernels import aligned
from weight_drop import WeightDrop


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 7), (4, 16, 32), (6, 33, 17)])
def test_matmul_in_plain_numbers(sizes, dtype):
    torch.manual_seed(0)
    rows, inner, columns = sizes
    a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype).t()
    result = aligned.matmul(a, b)
    for i in range(rows):
        for j in range(columns):
            expected = sum(float(a[i, k]) * float(b[k, j]) for k in range(inner))
            assert result[i, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert result.shape == (rows, columns)
    assert result.stride(0) * result.element_size() % 64 == 0
    assert 0 <= result.stride(0) - columns < 64 // result.element_size()


@pytest.mark.parametrize("bias", [True, False])
def test_gradients(bias):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    layer = aligned.Linear(5, 7, bias=bias).double()
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *layer.parameters()))


def test_what_needs_no_gradient_gets_none():
    x, weight = torch.randn(4, 5), torch.randn(3, 5, requires_grad=True)
    aligned.linear(x, weight).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(dim=0).expand(3, 5))


def test_inputs_of_any_layout():
    torch.manual_seed(0)
    weight, bias = torch.randn(7, 5), torch.randn(7)
    for x in (torch.randn(5), torch.randn(3, 2, 5).transpose(0, 1), torch.randn(4, 1, 5)[:, :, :]):
        expected = (x.unsqueeze(-2) * weight).sum(-1) + bias
        torch.testing.assert_close(aligned.linear(x, weight, bias), expected)


def test_narrow_types_and_autocast_are_left_to_pytorch():
    layer = aligned.Linear(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 5)).dtype == torch.bfloat16
    assert layer.bfloat16()(torch.randn(3, 5).bfloat16()).dtype == torch.bfloat16


class TestRowsForAGPU:
    """The GPU's rule, rows at multiples of 16 bytes, on the CPU."""

    @pytest.fixture(autouse=True)
    def as_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(aligned, "suits", lambda tensor: True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_sizes_stay_and_rows_are_aligned(self, dtype):
        per_line = 16 // dtype.itemsize
        for columns in (1, 7, 8, 1550, 4650):
            tensor = aligned.empty((2, 3, columns), torch.zeros(1, dtype=dtype))
            assert tensor.shape == (2, 3, columns)
            assert tensor.stride(1) % per_line == 0
            assert 0 <= tensor.stride(1) - columns < per_line
            assert tensor.stride(0) == 3 * tensor.stride(1)

    def test_products_see_aligned_operands_only(self, monkeypatch):
        seen = []
        mm = torch.mm

        def watched(a, b, out):
            seen.extend([a, b, out])
            return mm(a, b, out=out)

        monkeypatch.setattr(torch, "mm", watched)
        torch.manual_seed(0)
        layer = aligned.Linear(7, 5).double()
        contiguous = torch.randn(3, 2, 7, dtype=torch.float64)
        # The row stride is aligned, but the rows begin 8 bytes late.
        late = torch.randn(6, 8, dtype=torch.float64)[:, 1:]
        for x in (contiguous.requires_grad_(), late.requires_grad_()):
            inputs = (x, layer.weight)
            assert torch.autograd.gradcheck(lambda x, _: layer(x, with_bias=False), inputs)
        assert len(seen) > 9
        for matrix in seen:
            rows = matrix if matrix.stride(1) == 1 else matrix.t()
            assert rows.stride(1) == 1
            assert rows.stride(0) * 8 % 16 == 0
            assert rows.data_ptr() % 16 == 0

    def test_aligned_operands_are_not_copied(self):
        x, weight = torch.randn(6, 8), torch.randn(4, 8, requires_grad=True)
        y = aligned.linear(x, weight)
        saved = y.grad_fn.next_functions[0][0].saved_tensors
        assert [t.data_ptr() for t in saved] == [x.data_ptr(), weight.data_ptr()]

    def test_with_a_bias_it_is_the_plain_product(self):
        torch.manual_seed(0)
        layer, x = aligned.Linear(7, 5), torch.randn(3, 7)
        expected = (x.unsqueeze(1) * layer.weight).sum(dim=2) + layer.bias
        torch.testing.assert_close(layer(x), expected)
        assert layer(x).is_contiguous()

    def test_dropout_of_a_weight(self):
        torch.manual_seed(0)
        raw = torch.randn(300, 7, requires_grad=True)
        dropped = aligned.dropout(raw, 0.25)
        assert dropped.stride() == (8, 1)
        kept = dropped != 0
        assert kept.float().mean() == pytest.approx(0.75, abs=0.03)
        torch.testing.assert_close(dropped[kept], raw[kept] / 0.75)
        weight = torch.randn(300, 7)
        (grad,) = torch.autograd.grad(dropped, raw, weight)
        torch.testing.assert_close(grad, torch.where(kept, weight / 0.75, 0.0))

    def test_the_qrnn_s_dropped_weight_is_aligned_and_an_lstm_s_is_not(self):
        for module, name, strides in (
            (aligned.Linear(7, 5), "weight", {(8, 1)}),
            (torch.nn.LSTM(7, 5), "weight_hh_l0", {(5, 1)}),
        ):
            cell = WeightDrop(module, [name], 0.5)
            raw = getattr(module, f"{name}_raw")
            assert {cell._dropped(raw).stride()} == strides
