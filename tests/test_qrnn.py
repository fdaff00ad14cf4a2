"""qrnn/: every way to compute the recurrence in plain numbers, its gradients, the layers."""

import math
import sys
import warnings

import pytest
import references
import torch

from qrnn import QRNN, ForgetMult, QRNNLayer, cuda, definition, forget_mult, fused

SHAPES = [(1, 1, 1), (2, 1, 3), (7, 3, 5), (33, 2, 4)]
LENGTHS = [7, 1, 4, 6]


@pytest.fixture(params=[definition, fused], ids=lambda way: way.__name__)
def way(request):
    return request.param


def inputs(shape, initial, seed=0):
    torch.manual_seed(seed)
    f = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    h = torch.randn(shape[1:], dtype=torch.float64, requires_grad=True) if initial else None
    return f, x, h


def in_numbers(f, x, h0, reverse=False, lengths=None):
    """The states, number by number; a column that has ended keeps its state."""
    f, x, h0 = (t if t is None else t.detach() for t in (f, x, h0))
    result = torch.empty(x.shape, dtype=torch.float64)
    for b in range(x.size(1)):
        for k in range(x.size(2)):
            state = 0.0 if h0 is None else float(h0[b, k])
            for t in range(len(x) - 1, -1, -1) if reverse else range(len(x)):
                if lengths is None or t < lengths[b]:
                    state = float(f[t, b, k]) * float(x[t, b, k]) + (1 - float(f[t, b, k])) * state
                result[t, b, k] = state
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("initial", [False, True])
def test_forget_mult(way, shape, initial):
    f, x, h = inputs(shape, initial)
    expected = in_numbers(f, x, h)
    torch.testing.assert_close(way.forget_mult(f, x, h), expected)
    torch.testing.assert_close(ForgetMult()(f, x, h), expected)
    assert torch.autograd.gradcheck(way.forget_mult, (f, x, h))


def test_forget_mult_in_float32_with_strided_inputs_and_an_expanded_gradient():
    torch.manual_seed(0)
    f = torch.rand(9, 8, 4).transpose(1, 2).requires_grad_()
    x = torch.randn(4, 9, 8).transpose(0, 1).requires_grad_()
    h = torch.randn(8, 4).t()
    results = []
    for call in (ForgetMult(), lambda *args: ForgetMult()(*(t.double() for t in args)).float()):
        output = call(f, x, h)
        results.append([output, *torch.autograd.grad(output.sum(), (f, x))])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_forget_mult_refuses_shapes_that_do_not_fit():
    f, x, h = inputs((5, 2, 3), True)
    with pytest.raises(ValueError, match="one shape"):
        ForgetMult()(f[:4], x)
    with pytest.raises(ValueError, match="initial state"):
        ForgetMult()(f, x, h[:1])
    torch.testing.assert_close(ForgetMult()(f, x, h.unsqueeze(0)), ForgetMult()(f, x, h))


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("zoneout", ["none", "number", "mask"])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_pool(way, gate, zoneout, initial, reverse, lengths):
    shape = (7, 4, 3)
    _, _, c = inputs(shape, initial)
    y = torch.randn(7, 4, (3 if gate else 2) * 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(shape, dtype=torch.float64).round()
    factor = {"none": None, "number": 0.7, "mask": mask}[zoneout]
    z, f, *o = y.detach().split(3, dim=2)
    f = (1 / (1 + (-f).exp())) * (1 if factor is None else factor)
    states = in_numbers(f, z.clone().apply_(math.tanh), c, reverse, lengths)
    expected = states / (1 + (-o[0]).exp()) if gate else states.clone()
    for b, length in enumerate(lengths or ()):
        expected[length:, b] = 0
    n = None if lengths is None else torch.tensor(lengths)
    h, last = way.pool(y, c, factor, gate, reverse, n)
    torch.testing.assert_close(h, expected)
    torch.testing.assert_close(last, states[0 if reverse else -1])
    assert torch.autograd.gradcheck(lambda y, c: way.pool(y, c, factor, gate, reverse, n), (y, c))


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
    torch.testing.assert_close(layer(x), layer(x))


def test_kept_inputs_are_detached_and_another_batch_size_without_reset_is_an_error():
    layer = QRNNLayer(4, 6, save_prev_x=True, window=2)
    x = torch.randn(3, 2, 4, requires_grad=True)
    layer(x)
    layer(torch.randn(3, 2, 4))[0].sum().backward()
    assert x.grad is None
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
    expected = definition.forget_mult(f.sigmoid() * 0.7, z.tanh())
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


def flipped(x, lengths):
    """`x` with each column's valid part reversed and the rest zero."""
    result = torch.zeros_like(x)
    for b, n in enumerate(lengths):
        result[:n, b] = x[:n, b].flip(0)
    return result


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
    for b, length in enumerate(columns):
        x[length:, b] = torch.nan  # the padding may hold anything
    output, last = both(x, hidden, n)
    ahead, last_ahead = forwards(x, hidden[:1], n)
    back, last_back = backwards(flipped(x, columns), hidden[1:], n)
    torch.testing.assert_close(output, torch.cat([ahead, flipped(back, columns)], dim=2))
    torch.testing.assert_close(last, torch.cat([last_ahead, last_back]))


def test_a_packed_sequence_keeps_its_own_order_of_equal_lengths():
    torch.manual_seed(0)
    net, order = QRNN(5, 3), torch.tensor([2, 0, 1])
    columns = torch.randn(4, 3, 5)
    packed = torch.nn.utils.rnn.pack_padded_sequence(columns[:, order], torch.tensor([4, 4, 4]))
    packed = packed._replace(sorted_indices=order, unsorted_indices=order.argsort())
    output, _ = net(packed)
    torch.testing.assert_close(output.data, net(columns)[0][:, order].flatten(0, 1))
    torch.testing.assert_close(output.sorted_indices, order)


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
    torch.testing.assert_close(output.sorted_indices, packed.sorted_indices)
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
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(2, 5)])
    with pytest.raises(ValueError, match="PackedSequence"):
        QRNN(5, 3)(packed, lengths=torch.tensor([1]))
    for states in (1, 3):
        with pytest.raises(ValueError, match=f"2 states, not {states}"):
            QRNN(5, 3, num_layers=2)(torch.randn(7, 4, 5), torch.zeros(states, 4, 3))


def test_under_autocast_the_carried_state_fits():
    layer = QRNNLayer(5, 3)
    x = torch.randn(7, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        output, last = layer(x, torch.randn(1, 4, 3))
        layer(x, last)
    assert output.dtype == torch.bfloat16


def test_a_layer_may_be_compiled():
    torch.manual_seed(0)
    layer = QRNNLayer(5, 3, window=2)
    x = torch.randn(4, 2, 5, requires_grad=True)
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        output, last = call(x)
        grads = torch.autograd.grad(output.sum() + last.sum(), [x, *layer.parameters()])
        results.append([output, last, *grads])
    torch.testing.assert_close(*results)


def test_a_plain_layer_runs_the_definition(monkeypatch):
    layer, x = QRNNLayer(5, 3), torch.randn(7, 4, 5)
    expected, _ = layer(x)
    monkeypatch.setattr(fused, "pool", None)
    layer.plain = True
    torch.testing.assert_close(layer(x)[0], expected)


class UnableCuPy:
    """CuPy on a machine where it cannot compile: its exceptions are no RuntimeErrors."""

    class RawModule:
        def __init__(self, **options):
            raise Exception("nvrtc: error: invalid value for --gpu-architecture\nand more")


@pytest.mark.parametrize(
    ("cupy", "reason"), [(None, "import of cupy halted"), (UnableCuPy, "nvrtc: error: invalid")]
)
def test_without_cupy_a_gpu_falls_back_with_one_warning(cupy, reason, monkeypatch):
    class OnGPU:
        is_cuda, device, dtype = True, torch.device("cpu"), torch.float32

    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for cache in (cuda.kernel, forget_mult._agrees):
        cache.cache_clear()
    with pytest.warns(
        UserWarning, match=rf"kernels\.py is not used .*\({reason}.*\).*cupy-cuda1\dx"
    ):
        assert forget_mult.way_for(OnGPU()) is fused
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert forget_mult.way_for(OnGPU()) is fused
    forget_mult._agrees.cache_clear()


def test_the_fast_way_is_checked_in_inference_mode_too():
    forget_mult._agrees.cache_clear()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        assert forget_mult.way_for(torch.zeros(1)) is fused
