"""qrnn/: the recurrence compared with its definition, its gradients, the layers."""

import warnings

import pytest
import references
import torch

from qrnn import QRNN, ForgetMult, QRNNLayer
from qrnn.forget_mult import forget_mult, forget_mult_loop, qrnn_pool

SHAPES = [(1, 1, 1), (2, 1, 3), (7, 3, 5), (33, 2, 4)]


def inputs(shape, initial, seed=0):
    torch.manual_seed(seed)
    f = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    h = torch.randn(shape[1:], dtype=torch.float64, requires_grad=True) if initial else None
    return f, x, h


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("initial", [False, True])
def test_forget_mult_is_its_definition(shape, initial):
    f, x, h = inputs(shape, initial)
    state = torch.zeros(shape[1:], dtype=torch.float64) if h is None else h
    for t in range(shape[0]):
        for b in range(shape[1]):
            for k in range(shape[2]):
                if t == b == k == 0:
                    expected = f[0, 0, 0] * x[0, 0, 0] + (1 - f[0, 0, 0]) * state[0, 0]
                    assert forget_mult(f, x, h)[0, 0, 0].item() == pytest.approx(expected.item())
    torch.testing.assert_close(forget_mult(f, x, h), forget_mult_loop(f, x, h))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("initial", [False, True])
def test_forget_mult_gradients(shape, initial):
    assert torch.autograd.gradcheck(forget_mult, inputs(shape, initial))


def test_forget_mult_in_float32_and_with_strided_inputs():
    torch.manual_seed(0)
    f = torch.rand(9, 8, 4).transpose(1, 2)
    x = torch.randn(4, 9, 8).transpose(0, 1)
    h = torch.randn(8, 4).t()
    expected = forget_mult_loop(f.double(), x.double(), h.double())
    torch.testing.assert_close(ForgetMult()(f, x, h).double(), expected, atol=1e-6, rtol=1e-6)


def test_forget_mult_takes_an_expanded_gradient():
    f, x, h = inputs((5, 2, 3), True)
    expected = torch.autograd.grad(forget_mult_loop(f, x, h).sum(), (f, x, h))
    actual = torch.autograd.grad(forget_mult(f, x, h).sum(), (f, x, h))
    torch.testing.assert_close(actual, expected)


def test_forget_mult_refuses_shapes_that_do_not_fit():
    f, x, h = inputs((5, 2, 3), True)
    with pytest.raises(ValueError, match="one shape"):
        forget_mult(f[:4], x)
    with pytest.raises(ValueError, match="initial state"):
        forget_mult(f, x, h[:1])
    torch.testing.assert_close(forget_mult(f, x, h.unsqueeze(0)), forget_mult(f, x, h))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("zoneout", ["none", "number", "mask"])
@pytest.mark.parametrize("initial", [False, True])
def test_qrnn_pool(shape, gate, zoneout, initial):
    seq_len, batch, hidden = shape
    _, _, c = inputs(shape, initial)
    y = torch.randn(seq_len, batch, (3 if gate else 2) * hidden, dtype=torch.float64)
    y.requires_grad_()
    mask = torch.rand(shape, dtype=torch.float64).round()
    factor = {"none": None, "number": 0.7, "mask": mask}[zoneout]

    z, f, *o = y.split(hidden, dim=2)
    states = forget_mult_loop(f.sigmoid() * (1 if factor is None else factor), z.tanh(), c)
    expected = o[0].sigmoid() * states if gate else states
    h, last = qrnn_pool(y, c, factor, gate)
    torch.testing.assert_close(h, expected)
    torch.testing.assert_close(last, states[-1:])
    assert torch.autograd.gradcheck(lambda y, c: qrnn_pool(y, c, factor, gate), (y, c))


def layer_reference(layer, x, c, before):
    return references.qrnn_layer(
        x, layer.linear.weight, layer.linear.bias, layer.window, layer.hidden_size, c, before
    )


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_layer_across_batches(window):
    torch.manual_seed(0)
    layer = QRNNLayer(4, 6, save_prev_x=True, window=window)
    x = torch.randn(11, 3, 4)
    zeros = torch.zeros(3, 6)
    nothing = [torch.zeros(3, 4)] * (window - 1)
    expected, last = layer_reference(layer, x, zeros, nothing)
    parts, hidden = [], None
    # Some chunks are shorter than the window.
    for chunk in x.split([4, 1, 2, 4]):
        output, hidden = layer(chunk, hidden)
        parts.append(output)
        assert hidden.shape == (1, 3, 6)
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(hidden[0], last, atol=1e-6, rtol=1e-5)
    layer.reset()
    again, _ = layer(x)
    torch.testing.assert_close(again, expected, atol=1e-6, rtol=1e-5)


def test_layer_keeps_nothing_unless_told():
    layer = QRNNLayer(4, 6, window=2)
    x = torch.randn(3, 2, 4)
    first, _ = layer(x)
    second, _ = layer(x)
    torch.testing.assert_close(first, second)


def test_kept_inputs_are_detached():
    layer = QRNNLayer(4, 6, save_prev_x=True, window=2)
    x = torch.randn(3, 2, 4, requires_grad=True)
    layer(x)
    layer(torch.randn(3, 2, 4))[0].sum().backward()
    assert x.grad is None


def test_another_batch_size_without_reset_is_an_error():
    layer = QRNNLayer(4, 6, save_prev_x=True, window=2)
    layer(torch.randn(3, 2, 4))
    with pytest.raises(ValueError, match="reset"):
        layer(torch.randn(3, 5, 4))


def test_zoneout_keeps_states_in_training_and_scales_in_evaluation():
    torch.manual_seed(0)
    layer = QRNNLayer(4, 200, zoneout=0.3, output_gate=False)
    x = torch.randn(12, 5, 4)
    output, _ = layer(x)
    kept = (output[1:] == output[:-1]).float().mean().item()
    assert abs(kept - 0.3) < 0.03
    layer.eval()
    z, f = layer.linear(x).split(200, dim=2)
    expected = forget_mult_loop(f.sigmoid() * 0.7, z.tanh())
    torch.testing.assert_close(layer(x)[0], expected)


def test_layer_defaults():
    layer = QRNNLayer(5)
    assert layer.hidden_size == 5
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "linear.weight": (15, 5),
        "linear.bias": (15,),
    }
    assert QRNNLayer(5, 7, window=2, output_gate=False).linear.weight.shape == (14, 10)
    with pytest.raises(ValueError, match="window"):
        QRNNLayer(5, window=0)
    with pytest.raises(ValueError, match="zoneout"):
        QRNNLayer(5, zoneout=1.0)


def test_stack():
    torch.manual_seed(0)
    net = QRNN(4, 6, num_layers=3, window=2, save_prev_x=True)
    x = torch.randn(7, 2, 4)
    hidden = torch.randn(3, 2, 6)
    output, last = net(x, hidden)
    expected, states = x, []
    for layer, c in zip(net.layers, hidden, strict=True):
        before = [torch.zeros(2, layer.input_size)]
        expected, state = layer_reference(layer, expected, c, before)
        states.append(state)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(last, torch.stack(states), atol=1e-6, rtol=1e-5)
    net.reset()
    assert all(layer.prevX is None for layer in net.layers)


def test_stack_of_given_layers_and_dropout_between():
    layers = [QRNNLayer(4, 8), QRNNLayer(8, 8)]
    net = QRNN(4, 8, layers=layers, dropout=0.5)
    assert net.num_layers == 2
    # Half of the last layer's inputs are zero, and none of its outputs.
    seen = []
    layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output, _ = net(torch.randn(50, 4, 4))
    assert 0.4 < (seen[0] == 0).float().mean() < 0.6
    assert (output != 0).all()
    net.eval()
    net(torch.randn(50, 4, 4))
    assert (seen[1] != 0).all()
    with pytest.raises(ValueError, match="hidden_size"):
        QRNN(4, 3, layers=[QRNNLayer(4, 8), QRNNLayer(8, 3)])


LENGTHS = [7, 1, 4, 6]


def flipped(x, lengths):
    """`x` with each column's valid part reversed and the rest zero."""
    result = torch.zeros_like(x)
    for b, n in enumerate(lengths):
        result[:n, b] = x[:n, b].flip(0)
    return result


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("zoneout", ["none", "mask"])
def test_pool_backwards_and_with_lengths(gate, zoneout):
    torch.manual_seed(0)
    y = torch.randn(7, 4, (3 if gate else 2) * 3, dtype=torch.float64, requires_grad=True)
    c = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(7, 4, 3, dtype=torch.float64).round() if zoneout == "mask" else None
    lengths = torch.tensor(LENGTHS)
    for reverse in (False, True):
        for n in (None, lengths):
            h, last = qrnn_pool(y, c, mask, gate, reverse, n)
            # The reference is column by column: cut to its length, flipped if reverse, run
            # forwards, flipped back.
            for b, length in enumerate(LENGTHS if n is not None else [7] * 4):
                turn = (lambda t: t.flip(0)) if reverse else (lambda t: t)
                part = None if mask is None else turn(mask[:length, b : b + 1])
                one, state = qrnn_pool(turn(y[:length, b : b + 1]), c[b : b + 1], part, gate)
                torch.testing.assert_close(h[:length, b : b + 1], turn(one))
                torch.testing.assert_close(last[:, b : b + 1], state)
                assert (h[length:, b] == 0).all()
            assert torch.autograd.gradcheck(
                lambda y, c, r=reverse, n=n: qrnn_pool(y, c, mask, gate, r, n), (y, c)
            )


def test_forget_mult_backwards():
    f, x, h = inputs((6, 2, 3), True)
    expected = forget_mult_loop(f.flip(0), x.flip(0), h).flip(0)
    torch.testing.assert_close(forget_mult(f, x, h, reverse=True), expected)
    assert torch.autograd.gradcheck(lambda f, x, h: forget_mult(f, x, h, True), (f, x, h))


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_bidirectional_equals_two_one_way_ones_on_flipped_input(window, lengths):
    torch.manual_seed(0)
    both = QRNN(5, 3, bidirectional=True, window=window)
    forwards, backwards = QRNN(5, 3, window=window), QRNN(5, 3, window=window)
    forwards.layers[0].linear.load_state_dict(both.layers[0].linear.state_dict())
    backwards.layers[0].linear.load_state_dict(both.layers_reverse[0].linear.state_dict())
    x, hidden = torch.randn(7, 4, 5), torch.randn(2, 4, 3)
    n = None if lengths is None else torch.tensor(lengths)
    columns = lengths or [7] * 4
    output, last = both(x, hidden, n)
    ahead, last_ahead = forwards(x, hidden[:1], n)
    back, last_back = backwards(flipped(x, columns), hidden[1:], n)
    torch.testing.assert_close(output, torch.cat([ahead, flipped(back, columns)], dim=2))
    torch.testing.assert_close(last, torch.cat([last_ahead, last_back]))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_sequences(bidirectional, enforce_sorted):
    torch.manual_seed(0)
    net = QRNN(5, 3, num_layers=2, window=2, bidirectional=bidirectional)
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    columns = [torch.randn(n, 5) for n in lengths]
    packed = torch.nn.utils.rnn.pack_sequence(columns, enforce_sorted)
    hidden = torch.randn(4 if bidirectional else 2, 4, 3)
    output, last = net(packed, hidden)
    assert isinstance(output, torch.nn.utils.rnn.PackedSequence)
    unpacked = torch.nn.utils.rnn.unpack_sequence(output)
    for b, column in enumerate(columns):
        # Each column's result equals that of a batch of this column alone.
        alone, state = net(column.unsqueeze(1), hidden[:, b : b + 1])
        torch.testing.assert_close(unpacked[b], alone[:, 0])
        torch.testing.assert_close(last[:, b : b + 1], state)


def test_batch_first():
    torch.manual_seed(0)
    net = QRNN(5, 3, num_layers=2)
    twin = QRNN(5, 3, num_layers=2, batch_first=True)
    twin.load_state_dict(net.state_dict())
    x, hidden = torch.randn(7, 4, 5), torch.randn(2, 4, 3)
    (a, b), (c, d) = net(x, hidden), twin(x.transpose(0, 1), hidden)
    assert c.shape == (4, 7, 3)
    torch.testing.assert_close(a, c.transpose(0, 1))
    torch.testing.assert_close(b, d)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="save_prev_x"):
        QRNN(5, 3, bidirectional=True, save_prev_x=True)
    with pytest.raises(ValueError, match="bidirectional"):
        QRNN(5, 3, layers=[QRNNLayer(5, 3)], bidirectional=True)
    layer = QRNNLayer(5, 3, save_prev_x=True)
    with pytest.raises(ValueError, match="lengths"):
        layer(torch.randn(7, 4, 5), lengths=torch.tensor(LENGTHS))


def test_under_autocast_the_carried_state_fits():
    layer = QRNNLayer(5, 3)
    x = torch.randn(7, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        output, last = layer(x, torch.randn(1, 4, 3))
        layer(x, last)
    assert output.dtype == torch.bfloat16


def test_without_cupy_a_gpu_falls_back_with_one_warning(monkeypatch):
    from kernels import cuda
    from qrnn import forget_mult as module
    from qrnn import kernels

    class OnGPU:
        is_cuda = True

    monkeypatch.setattr(cuda, "import_cupy", lambda: ImportError("No module named 'cupy'"))
    module._warn_without_kernels.cache_clear()
    with pytest.warns(UserWarning, match=r"pip install cupy-cuda\d+x.*No module named 'cupy'"):
        assert module._kernels_for(OnGPU()) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module._kernels_for(OnGPU()) is None
    monkeypatch.setattr(kernels, "available", lambda: True)
    assert module._kernels_for(OnGPU()) is kernels
    assert module._kernels_for(torch.zeros(1)) is None
