"""aligned.py: the values of plain products, in rows that begin on cache lines."""

import pytest
import torch

from kernels import aligned


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
