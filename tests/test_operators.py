"""qrnn/operators.py: the QRNN's operators for torch.compile, compared with the definitions."""

import pytest
import torch
from references import eager_and_compiled, naive_forget_mult, naive_qrnn

from qrnn import QRNN, QRNNLayer
from qrnn import operators as registered
from qrnn.forget_mult import forget_mult


def leaf(*size):
    return torch.randn(size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_forget_mult_is_a_sound_operator(initial, reverse):
    torch.manual_seed(0)
    f = torch.rand(5, 2, 3, dtype=torch.float64, requires_grad=True)
    args = (f, leaf(5, 2, 3), leaf(2, 3) if initial else None, reverse)
    torch.library.opcheck(registered.forget_mult, args)
    assert torch.autograd.gradcheck(lambda *args: registered.forget_mult(*args)[0], args)
    expected = naive_forget_mult(*args)
    torch.testing.assert_close(registered.forget_mult(*args)[0], expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("zoneout", [None, 0.7, "mask"])
@pytest.mark.parametrize("initial", [False, True])
def test_pool_is_a_sound_operator(initial, zoneout, gate, reverse):
    torch.manual_seed(0)
    y = leaf(4, 2, 9 if gate else 6)
    mask = (torch.rand(4, 2, 3) < 0.7).double() if zoneout == "mask" else None
    scale = zoneout if isinstance(zoneout, float) else None
    lengths = torch.tensor([4, 2]) if reverse else None
    c0 = leaf(2, 3) if initial else None
    args = (y, c0, mask, scale, gate, reverse, lengths)
    torch.library.opcheck(registered.pool, args)
    assert torch.autograd.gradcheck(lambda y, c0: registered.pool(y, c0, *args[2:])[:2], (y, c0))
    torch.testing.assert_close(registered.pool(*args)[:2], naive_qrnn(*args))


@pytest.mark.parametrize("stack", [False, True])
def test_a_compiled_layer_is_the_layer(stack):
    torch.manual_seed(0)
    layer = QRNN(5, 6, num_layers=2, window=2) if stack else QRNNLayer(5, 6, window=2)
    x = torch.randn(7, 3, 5, requires_grad=True)
    for ours, theirs in zip(*eager_and_compiled(layer, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_compiled_forget_mult_is_one_operation():
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    f, x = torch.rand(9, 2, 3), torch.randn(9, 2, 3)
    compiled = torch.compile(forget_mult, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(f, x), forget_mult(f, x))
    assert seen == ["awd_qrnn.forget_mult"] or "awd_qrnn.forget_mult.default" in seen
