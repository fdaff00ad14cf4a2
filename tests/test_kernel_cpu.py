"""The QRNN kernels without a GPU: compiled by NVRTC, and run as C++ on the CPU.

`qrnn.kernels` runs unchanged on CPU tensors except for its last step: the launch goes to
forget_mult.cu compiled with tests/shim, one thread after another, so that argument order, widths,
strides and the kernel's arithmetic are all under test.
"""

import contextlib
import itertools
import random
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from references import assert_near
from shims import (
    ARCHITECTURES,
    Canaries,
    ShimLauncher,
    check_bounds,
    check_nvrtc,
    needs_compiler,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fast.qrnn
from fast import linear
from fast.linear import FastLinear
from fast.qrnn import FastQRNN
from qrnn import cuda, definition, kernels
from qrnn import forget_mult as choice
from weight_drop import WeightDrop

DTYPES = list(kernels.SCALARS)
# Largest error, relative to 1 + |reference|. The 16-bit types round each result once, by at most
# 2^-11 (float16) and 2^-8 (bfloat16) of it.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
GRAD_TOLERANCE = TOLERANCE | {torch.float64: 1e-12, torch.float32: 4e-6}


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    options = map(kernels.compile_options, DTYPES)
    return ShimLauncher(kernels.SOURCE, tmp_path_factory.mktemp("shim"), options)


@pytest.fixture
def shim(launcher, monkeypatch):
    """`qrnn.kernels` on CPU tensors; its results are guarded by canaries."""
    canaries = Canaries()
    launcher.launched.clear()
    monkeypatch.setattr(kernels.SOURCE, "launch", launcher)
    monkeypatch.setattr(kernels, "_empty", canaries.empty)
    yield SimpleNamespace(launched=launcher.launched, copy=canaries.copy, check=canaries.check)
    canaries.check()


def wide(tensor):
    """The reference's copy of an input: the rounded values in float64, with its own gradient."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def random_case(seed):
    """Sizes around chunk and block boundaries, and every option at random."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    return SimpleNamespace(
        seq_len=rng.choice([1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16, 17, 24, 31, 33, 48]),
        batch=rng.choice([1, 2, 3, 5]),
        hidden=rng.choice([1, 2, 3, 21, 32, 33, 63, 64, 65, 130]),
        dtype=rng.choice([torch.float32, torch.float32, *DTYPES]),
        initial=rng.random() < 0.5,
        gate=rng.random() < 0.7,
        zoneout=rng.choice([None, "mask", 0.7, 0.0]),
        reverse=rng.random() < 0.5,
        lengths=rng.random() < 0.5,
        bias=rng.random() < 0.5,
    )


def check_qrnn(shim, case):
    dtype = case.dtype
    size = (case.seq_len, case.batch, case.hidden)
    parts = 3 if case.gate else 2

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64).mul(1.5).to(dtype)

    y = draw(*size[:2], parts * case.hidden).requires_grad_()
    c0 = draw(*size[1:]).requires_grad_() if case.initial else None
    mask = torch.rand(size).lt(0.6).to(dtype) if case.zoneout == "mask" else None
    scale = case.zoneout if isinstance(case.zoneout, float) else None
    lengths = None
    if case.lengths:
        lengths = torch.randint(0, case.seq_len + 1, size[1:2], dtype=torch.int64)
        lengths[0].clamp_(min=1)  # a gradient needs at least one step
        # The values in the padding must not matter.
        padding = torch.arange(case.seq_len)[:, None] >= lengths
        with torch.no_grad():
            y[padding] = torch.nan
    options = (mask, scale, case.gate, case.reverse, lengths)
    weight_h, weight_last = draw(*size), draw(*size[1:])
    # Under autocast the bias stays float32 while the product has 16 bits.
    bias = torch.randn(parts * case.hidden, dtype=kernels.wide(dtype)).requires_grad_()
    bias = bias if case.bias else None

    inputs = (shim.copy(y), shim.copy(c0), shim.copy(bias))
    h, last = kernels.QRNNFunction.apply(*inputs[:2], shim.copy(mask), *options[1:], inputs[2])
    wanted = [tensor for tensor in inputs if tensor is not None]
    grads = torch.autograd.grad([h, last], wanted, [shim.copy(weight_h), shim.copy(weight_last)])

    clean = y if lengths is None else y.detach().masked_fill(padding[..., None], 0)
    reference = (wide(clean.requires_grad_()), wide(c0), wide(bias))
    added = reference[0] if bias is None else reference[0] + reference[2]
    zoneout = scale if mask is None else wide(mask)
    true_h, true_last = definition.pool(added, reference[1], zoneout, *options[2:])
    true_wanted = [tensor for tensor in reference if tensor is not None]
    true_grads = torch.autograd.grad(
        [true_h, true_last], true_wanted, [wide(weight_h), wide(weight_last)], allow_unused=True
    )

    assert h.dtype == last.dtype == dtype
    assert_near(h, true_h, TOLERANCE[dtype], f"h, {case}")
    assert_near(last, true_last, TOLERANCE[dtype], f"last state, {case}")
    names = [n for n, t in zip(("y", "c0", "bias"), inputs, strict=True) if t is not None]
    for name, grad, true_grad in zip(names, grads, true_grads, strict=True):
        true_grad = torch.zeros_like(grad).double() if true_grad is None else true_grad
        if name == "y" and lengths is not None:
            assert (grad[padding] == 0).all(), f"gradient in the padding, {case}"
            true_grad = true_grad.masked_fill(padding[..., None], 0)
        # The bias's gradient is a sum over all steps and columns.
        tolerance = GRAD_TOLERANCE[kernels.wide(dtype)] if name == "bias" else GRAD_TOLERANCE[dtype]
        assert_near(grad, true_grad, tolerance, f"gradient of {name}, {case}")
    shim.check()


def check_forget_mult(shim, case):
    dtype, size = case.dtype, (case.seq_len, case.batch, case.hidden)
    f = torch.rand(size, dtype=torch.float64).to(dtype).requires_grad_()
    x = torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_()
    h0 = torch.randn(size[1:], dtype=torch.float64).to(dtype).requires_grad_()
    if not case.initial:
        h0 = None
    weight = torch.randn(size, dtype=torch.float64).to(dtype)

    inputs = [shim.copy(f), shim.copy(x), shim.copy(h0)]
    h = kernels.ForgetMultFunction.apply(*inputs, case.reverse)
    wanted = [tensor for tensor in inputs if tensor is not None]
    grads = torch.autograd.grad(h, wanted, shim.copy(weight))

    reference = [wide(f), wide(x), wide(h0)]
    true_h = definition.forget_mult(*reference, case.reverse)
    true_wanted = [tensor for tensor in reference if tensor is not None]
    true_grads = torch.autograd.grad(true_h, true_wanted, wide(weight))

    assert_near(h, true_h, TOLERANCE[dtype], f"h, {case}")
    for name, grad, true_grad in zip(("f", "x", "h0"), grads, true_grads, strict=False):
        assert_near(grad, true_grad, GRAD_TOLERANCE[dtype], f"gradient of {name}, {case}")
    shim.check()


@needs_compiler
class TestAgainstTheDefinition:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_by_one_by_one(self, shim, dtype):
        options = itertools.product(
            (True, False), (None, "mask", 0.7), (True, False), (True, False)
        )
        for gate, zoneout, reverse, initial in options:
            case = random_case(0)
            case.__dict__.update(seq_len=1, batch=1, hidden=1, dtype=dtype, initial=initial)
            case.__dict__.update(gate=gate, zoneout=zoneout, reverse=reverse, lengths=False)
            check_qrnn(shim, case)
            check_forget_mult(shim, case)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_long_sequence(self, shim, dtype):
        case = random_case(1)
        case.__dict__.update(seq_len=700, batch=2, hidden=3, dtype=dtype, gate=True, lengths=True)
        check_qrnn(shim, case)
        check_forget_mult(shim, case)

    def test_random_cases(self, shim):
        for seed in range(600):
            check_qrnn(shim, random_case(seed))
            check_forget_mult(shim, random_case(seed))

    def test_every_kernel_is_reached(self, shim):
        for gate, zoneout in itertools.product((True, False), ("mask", 0.7)):
            case = random_case(2)
            case.__dict__.update(gate=gate, zoneout=zoneout)
            check_qrnn(shim, case)
        check_forget_mult(shim, random_case(2))
        assert set(shim.launched) == set(kernels.KERNEL_NAMES)

    def test_saturated_gates(self, shim):
        """Far from 0 the gates are open or shut, with no NaN from a power that overflows."""
        y = torch.tensor([100.0, -100.0, 1e30, -1e30]).repeat(2, 1, 3).requires_grad_()
        h, _ = kernels.QRNNFunction.apply(y, None)
        h.sum().backward()
        expected, _ = definition.pool(y.detach().double())
        assert_near(h, expected, 1e-6, "h")
        assert_near(y.grad, torch.zeros_like(y).double(), 1e-6, "gradient")

    def test_small_values_keep_their_relative_precision(self, shim):
        z = torch.logspace(-30, 2, 2000).repeat(1, 1, 1)
        shut = torch.full_like(z, 100.0)
        _, last, _ = kernels.qrnn_forward(torch.cat([z, shut], dim=2), None, None, None, False)
        torch.testing.assert_close(last, z[0].double().tanh().float(), rtol=5e-7, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_rounding_to_sixteen_bits(self, shim, dtype):
        """Every 16-bit value stays unchanged, ties go to even, NaN stays NaN."""
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[~every.isnan()].view(1, 1, -1)
        ones, zeros = torch.ones_like(every), torch.zeros_like(every)
        finite = every.isfinite()
        assert torch.equal(kernels.forget_mult_forward(ones, every)[0][finite], every[finite])
        half = torch.full_like(every, 0.5)
        mean, _ = kernels.forget_mult_forward(half, every, every.roll(1, dims=2)[0])
        expected = (0.5 * every.float() + 0.5 * every.roll(1, dims=2).float()).to(dtype)
        assert torch.equal(mean.isnan(), expected.isnan())
        assert torch.equal(mean.nan_to_num(7), expected.nan_to_num(7))
        assert kernels.forget_mult_forward(ones, zeros + torch.nan)[0].isnan().all()
        # A GPU's NaN has all bits set: rounding it like a number would give -0.
        (full_nan,) = struct.unpack("d", struct.pack("q", 2**63 - 1))
        h, _, _ = kernels.qrnn_forward(torch.ones(1, 1, 6).to(dtype), None, None, full_nan, True)
        assert h.isnan().all()


@needs_compiler
class TestGradients:
    @pytest.mark.parametrize("reverse", [False, True])
    def test_forget_mult_against_finite_differences(self, shim, reverse):
        torch.manual_seed(0)
        f = torch.rand(5, 2, 3, dtype=torch.float64).requires_grad_()
        x = torch.randn(5, 2, 3, dtype=torch.float64).requires_grad_()
        h0 = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
        function = kernels.ForgetMultFunction.apply
        assert torch.autograd.gradcheck(lambda *args: function(*args, reverse), (f, x, h0))
        assert torch.autograd.gradcheck(lambda *args: function(*args, None, reverse), (f, x))

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("gate", [False, True])
    @pytest.mark.parametrize("zoneout", [None, "mask", 0.7])
    def test_layer_against_finite_differences(self, shim, gate, zoneout, reverse):
        torch.manual_seed(0)
        y = torch.randn(5, 3, 6 if gate else 4, dtype=torch.float64).requires_grad_()
        c0 = torch.randn(3, 2, dtype=torch.float64).requires_grad_()
        mask = torch.rand(5, 3, 2).lt(0.6).double() if zoneout == "mask" else None
        scale = zoneout if zoneout == 0.7 else None
        for lengths in (None, torch.tensor([5, 3, 0])):
            options = (mask, scale, gate, reverse, lengths)

            def layer(*inputs, options=options):
                return kernels.QRNNFunction.apply(*inputs, *options)

            assert torch.autograd.gradcheck(layer, (y, c0))
            assert torch.autograd.gradcheck(lambda y, layer=layer: layer(y, None), (y,))
        bias = torch.randn(y.size(2), dtype=torch.float64).requires_grad_()
        options = (mask, scale, gate, reverse, None)
        with_bias = kernels.QRNNFunction.apply
        assert torch.autograd.gradcheck(lambda y, b: with_bias(y, None, *options, b), (y, bias))

    @pytest.mark.parametrize("gate", [False, True])
    def test_either_result_alone(self, shim, gate):
        """A missing gradient counts as zero and is not read."""
        torch.manual_seed(0)
        y = torch.randn(9, 2, 15 if gate else 10, dtype=torch.float64).requires_grad_()
        c0 = torch.randn(2, 5, dtype=torch.float64).requires_grad_()
        for result in (0, 1):
            grads = torch.autograd.grad(
                kernels.QRNNFunction.apply(y, c0, None, None, gate)[result].sum(), (y, c0)
            )
            expected = torch.autograd.grad(
                definition.pool(y, c0, None, gate)[result].sum(), (y, c0)
            )
            torch.testing.assert_close(grads, expected)

    def test_only_what_is_needed(self, shim):
        y = torch.randn(3, 2, 6)
        c0 = torch.randn(2, 2)
        h, last = kernels.QRNNFunction.apply(y.requires_grad_(), c0)
        (h.sum() + last.sum()).backward()
        assert c0.grad is None
        f = torch.rand(3, 2, 2, requires_grad=True)
        kernels.ForgetMultFunction.apply(f, y[..., :2].detach(), c0, False).sum().backward()
        assert c0.grad is None
        assert f.grad is not None

    def test_expanded_and_strided_gradients(self, shim):
        torch.manual_seed(0)
        y = torch.randn(9, 4, 15, requires_grad=True)
        expected = None
        h, _ = kernels.QRNNFunction.apply(y, None)
        weight = torch.randn(4, 5)
        for grad in (
            weight.expand(9, 4, 5).contiguous(),
            weight.expand(9, 4, 5),
            weight.t().contiguous().t().expand(9, 4, 5),
            torch.cat([weight, weight], dim=1).expand(9, 4, 10).contiguous()[..., 5:],
            weight.repeat_interleave(2, dim=1).expand(9, 4, 10).contiguous()[..., ::2],
            weight.expand(9, 4, 5).transpose(0, 1).contiguous().transpose(0, 1),
        ):
            (actual,) = torch.autograd.grad(h, y, grad, retain_graph=True)
            expected = actual if expected is None else expected
            assert torch.equal(actual, expected)
        f, x = torch.rand(9, 4, 5, requires_grad=True), torch.randn(9, 4, 5, requires_grad=True)
        true = torch.autograd.grad(definition.forget_mult(f, x).sum(), (f, x))
        actual = torch.autograd.grad(kernels.ForgetMultFunction.apply(f, x, None).sum(), (f, x))
        torch.testing.assert_close(actual, true)

    def test_states_are_kept_only_for_a_backward_pass(self, shim, monkeypatch):
        kept = []
        allocate = kernels._empty_states

        def empty_states(like, sizes):
            kept.append(allocate(like, sizes))
            return kept[-1]

        monkeypatch.setattr(kernels, "_empty_states", empty_states)
        y = torch.randn(9, 2, 6)
        f, x = torch.rand(9, 2, 2), torch.randn(9, 2, 2)
        calls = [
            lambda: kernels.QRNNFunction.apply(y, None)[0],
            lambda: kernels.ForgetMultFunction.apply(f, x, None),
        ]
        results = [call() for call in calls]
        assert not kept
        y.requires_grad_()
        x.requires_grad_()
        for call, expected in zip(calls, results, strict=True):
            assert torch.equal(call(), expected)
        assert [tuple(states.shape) for states in kept] == [(2, 2, 2)] * 2

    def test_second_derivatives_are_refused(self, shim):
        y = torch.randn(3, 2, 6, requires_grad=True)
        h, _ = kernels.QRNNFunction.apply(y, None)
        (grad,) = torch.autograd.grad(h.square().sum(), y, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@needs_compiler
class TestStridesAndDirections:
    @pytest.mark.parametrize("gate", [False, True])
    def test_slices_of_wider_tensors(self, shim, gate):
        """`y` as columns of a wider tensor is used in place."""
        torch.manual_seed(0)
        width = 21 if gate else 14
        y = torch.randn(9, 3, 2 * width)
        for side in (0, 1):
            part = y[..., side * width : (side + 1) * width]
            results = []
            for source in (part, part.contiguous()):
                h, last, states = kernels.qrnn_forward(source, None, None, None, gate, side == 1)
                options = (states, None, None, gate, side == 1)
                grad, _, _ = kernels.qrnn_backward(torch.ones_like(h), None, source, *options)
                results.append((h, last, grad))
            for ours, expected in zip(*results, strict=True):
                assert torch.equal(ours, expected)

    @pytest.mark.parametrize("function", ["layer", "ForgetMult"])
    def test_every_input_may_be_strided(self, shim, function):
        """Every second element of a tensor twice as wide, with NaN or -1 in between."""
        torch.manual_seed(0)

        def strided(tensor):
            wide = torch.full((*tensor.shape[:-1], 2 * tensor.size(-1)), -1, dtype=tensor.dtype)
            if tensor.is_floating_point():
                wide.fill_(torch.nan)
            wide[..., ::2] = tensor
            return wide[..., ::2]

        c0, weight = torch.randn(3, 5), torch.randn(9, 3, 5)
        if function == "layer":
            y, mask = torch.randn(9, 3, 15), torch.rand(9, 3, 5).lt(0.5).float()
            lengths, grad_last = torch.tensor([9, 4, 7]), torch.randn(3, 5)
            bias = torch.randn(15)

            def results(change):
                h, last, states = kernels.qrnn_forward(
                    change(y), change(c0), change(mask), None, True, lengths=change(lengths),
                    bias=change(bias),
                )  # fmt: skip
                grads = kernels.qrnn_backward(
                    change(weight), change(grad_last), change(y), change(states), change(mask),
                    None, True, lengths=change(lengths), bias=change(bias),
                )  # fmt: skip
                return h, last, states, *grads

        else:
            f, x = torch.rand(9, 3, 5), torch.randn(9, 3, 5)

            def results(change):
                h, states = kernels.forget_mult_forward(change(f), change(x), change(c0))
                grads = kernels.forget_mult_backward(
                    change(weight), change(f), change(x), change(states)
                )
                return h, states, *grads

        for actual, expected in zip(results(strided), results(lambda t: t), strict=True):
            assert torch.equal(actual, expected)

    @pytest.mark.parametrize("shape", [(1, 4, 6), (4, 1, 6), (1, 1, 6), (4, 3, 3), (2, 2, 3)])
    def test_strides_of_single_dimensions_mean_nothing(self, shim, shape):
        torch.manual_seed(0)
        plain = torch.randn(shape)
        padded = torch.randn(shape[0], shape[1], shape[2] + 5)
        padded[..., : shape[2]] = plain
        transposed = plain.transpose(0, 1).contiguous().transpose(0, 1)
        expected = kernels.qrnn_forward(plain, None, None, None, True)
        for y in (padded[..., : shape[2]], transposed, plain[::1]):
            for actual, true in zip(
                kernels.qrnn_forward(y, None, None, None, True), expected, strict=True
            ):
                assert torch.equal(actual, true)

    def test_reverse_is_a_flip(self, shim):
        torch.manual_seed(0)
        y, mask = torch.randn(19, 3, 21), torch.rand(19, 3, 7).lt(0.5).float()
        c0 = torch.randn(3, 7)
        h, last, _ = kernels.qrnn_forward(y, c0, mask, None, True, reverse=True)
        flipped, flipped_last, _ = kernels.qrnn_forward(y.flip(0), c0, mask.flip(0), None, True)
        assert torch.equal(h, flipped.flip(0))
        assert torch.equal(last, flipped_last)

    def test_lengths_are_sequences_of_their_own(self, shim):
        torch.manual_seed(0)
        y, c0 = torch.randn(19, 4, 21), torch.randn(4, 7)
        for integer, reverse in itertools.product((torch.int32, torch.int64), (False, True)):
            lengths = torch.tensor([19, 1, 0, 12], dtype=integer)
            h, last, _ = kernels.qrnn_forward(y, c0, None, None, True, reverse, lengths)
            assert torch.equal(last[2], c0[2])
            for b, length in enumerate(lengths.tolist()):
                assert (h[length:, b] == 0).all()
                if length:
                    alone = (y[:length, b : b + 1], c0[b : b + 1], None, None, True, reverse)
                    expected, expected_last, _ = kernels.qrnn_forward(*alone)
                    assert torch.equal(h[:length, b : b + 1], expected)
                    assert torch.equal(last[b : b + 1], expected_last)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_padding_is_zero_whatever_the_initial_state(self, shim, reverse):
        y = torch.randn(9, 2, 6, requires_grad=True)
        c0 = torch.full((2, 2), torch.inf)
        lengths = torch.tensor([0, 0])
        h, last = kernels.QRNNFunction.apply(y, c0, None, None, True, reverse, lengths)
        (h.sum() + last.sum()).backward()
        assert torch.equal(h, torch.zeros_like(h))
        assert torch.equal(last, c0)
        assert torch.equal(y.grad, torch.zeros_like(y))


class Calls(TorchDispatchMode):
    """Names of the called operations, and shapes of the tensors summed over dimension 0."""

    def __init__(self):
        super().__init__()
        self.names, self.summed = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.overloadpacket))
        if func is torch.ops.aten.sum.dim_IntList and args[1] == [0]:
            self.summed.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@needs_compiler
class TestLayers:
    """Layers as on a GPU: kernels that add the bias, and products with rows aligned for them."""

    @pytest.fixture(autouse=True)
    def as_on_a_gpu(self, shim, monkeypatch):
        for place in (choice, fast.qrnn):
            monkeypatch.setattr(place, "way_for", lambda *_: kernels)
        monkeypatch.setattr(linear, "_on_gpu", lambda tensor: True)

    def layer(self, number=0):
        torch.manual_seed(0)
        layer = FastQRNN(5, 7, number)
        layer.linear.__class__ = FastLinear
        return layer

    @pytest.mark.parametrize("bare", [False, True])
    def test_a_layer_is_its_definition(self, shim, bare):
        layer = self.layer().double()
        module = layer.linear
        if not bare:
            layer.linear = WeightDrop(module, ["weight"])
        x = torch.randn(9, 3, 5, dtype=torch.float64, requires_grad=True)
        windowed = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], dim=2)
        parameters = [x, *layer.parameters()]
        weights = module.weight if bare else module.weight_raw
        y = (windowed.unsqueeze(2) * weights).sum(dim=3) + module.bias
        expected, _ = definition.pool(y)
        h, _ = layer(x, layer.initial_state(3))
        torch.testing.assert_close(h, expected)
        weight = torch.randn_like(h)
        grads = torch.autograd.grad(h, parameters, weight)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, parameters, weight))
        assert len(shim.launched) == 2

    def test_no_further_pass_adds_a_bias_or_sums_its_gradient(self, shim):
        layer = self.layer(1)
        x = torch.randn(9, 3, 5)
        with Calls() as calls:
            h, _ = layer(x, layer.initial_state(3))
            h.sum().backward()
        assert layer.linear.bias.grad is not None
        assert not {"aten.add_", "aten.add", "aten.addmm"} & set(calls.names)
        # Only the kernel's sums for each batch column, not the gradients of all rows.
        assert calls.summed == [(3, 21)]

    def test_a_linear_map_of_ones_own_keeps_its_bias(self, shim):
        layer, other = self.layer(1), self.layer(1)
        other.linear.__class__ = torch.nn.Linear
        x, state = torch.randn(9, 3, 5), layer.initial_state(3)
        torch.testing.assert_close(layer(x, state)[0], other(x, state)[0])


class TestErrors:
    """A wrong call raises an error of one sentence, also without a GPU."""

    def test_dtype(self):
        x, y = torch.randn(2, 2, 3), torch.zeros(2, 2, 6)
        with pytest.raises(TypeError, match=r"take torch.float64, .* not torch.int32"):
            kernels.qrnn_forward(y.int(), None, None, None, True)
        with pytest.raises(TypeError, match=r"h0 must be torch.float32 .* not torch.float64"):
            kernels.forget_mult_forward(x, x, x[0].double())
        with pytest.raises(TypeError, match=r"mask must be torch.float16 .* not torch.bool"):
            kernels.qrnn_forward(y.half(), None, y[..., :2].bool(), None, True)
        with pytest.raises(TypeError, match=r"lengths must be int64 or int32, not torch.float32"):
            kernels.qrnn_forward(y, None, None, None, True, lengths=torch.ones(2))

    @pytest.mark.parametrize(
        ("shape", "gate"),
        [((2, 6), True), ((2, 2, 7), True), ((2, 2, 3), False), ((2, 0, 6), True)],
    )
    def test_shape_of_the_input(self, shape, gate):
        with pytest.raises(ValueError, match=r"\(seq_len, batch, [23] \* hidden\), not \("):
            kernels.qrnn_forward(torch.zeros(shape), None, None, None, gate)

    def test_shapes_of_the_rest(self):
        y = torch.zeros(4, 2, 6)
        h, bad = torch.zeros(4, 2, 2), torch.zeros(4, 3, 2)
        three = torch.tensor([1, 2, 3])
        with pytest.raises(
            ValueError, match=r"c0 must have the shape \(2, 2\) on cpu, not \(3, 2\)"
        ):
            kernels.qrnn_forward(y, bad[0], None, None, True)
        with pytest.raises(ValueError, match="mask must have the shape"):
            kernels.qrnn_forward(y, None, bad, None, True)
        with pytest.raises(ValueError, match=r"lengths must have the shape \(2,\) \(batch,\) on"):
            kernels.qrnn_forward(y, None, None, None, True, lengths=three)
        with pytest.raises(ValueError, match=r"a mask .* or a scale .*, not both"):
            kernels.qrnn_forward(y, None, h, 0.5, True)
        states = torch.zeros(1, 2, 2)
        with pytest.raises(ValueError, match="grad_h must have the shape"):
            kernels.qrnn_backward(bad, None, y, states, None, None, True)
        with pytest.raises(ValueError, match="grad_c_last must have the shape"):
            kernels.qrnn_backward(h, bad[0], y, states, None, None, True)
        message = r"what the forward pass returned, \(1, 2, 2\) torch.float32 on cpu, not \("
        for wrong in (h, states.double(), states.to("meta")):
            with pytest.raises(ValueError, match=message):
                kernels.qrnn_backward(h, None, y, wrong, None, None, True)
            with pytest.raises(ValueError, match=message):
                kernels.forget_mult_backward(h, h, h, wrong)
        with pytest.raises(ValueError, match=r"bias must have the shape \(6,\) on cpu, not \(2,\)"):
            kernels.qrnn_forward(y, None, None, None, True, bias=torch.zeros(2))
        with pytest.raises(ValueError, match="f must have the shape"):
            kernels.forget_mult_forward(bad, h)

    def test_device(self):
        y = torch.zeros(2, 2, 6)
        with pytest.raises(ValueError, match="take CUDA tensors, not tensors on cpu"):
            kernels.qrnn_forward(y, None, None, None, True)
        with pytest.raises(ValueError, match=r"c0 must have the shape .* on cpu, not .* on meta"):
            kernels.qrnn_forward(y, torch.zeros(2, 2, device="meta"), None, None, True)

    def test_import_touches_no_cuda_library(self):
        code = (
            "import sys, qrnn.kernels; print([m for m in ('cupy', 'pynvrtc') if m in sys.modules])"
        )
        root = Path(__file__).resolve().parent.parent
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "[]"


@pytest.fixture
def no_memory_of_cupy():
    """The cached import and kernels are forgotten before and after."""
    cuda.import_cupy.cache_clear()
    kernels.SOURCE.loaded.clear()
    yield
    cuda.import_cupy.cache_clear()
    kernels.SOURCE.loaded.clear()


@pytest.mark.usefixtures("no_memory_of_cupy")
class TestLaunch:
    """The real launch path, on a stand-in for CuPy."""

    def test_without_cupy(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cupy", None)
        with pytest.raises(cuda.KernelUnavailable, match=r"pip install cupy-cuda1\dx"):
            kernels.SOURCE.kernels(0, ())

    def test_without_nvrtc(self, monkeypatch):
        def get_function(name):
            raise RuntimeError("CuPy failed to load libnvrtc.so.13")

        cupy = ModuleType("cupy")
        cupy.RawModule = lambda **_: SimpleNamespace(get_function=get_function)
        cupy.cuda = SimpleNamespace(
            is_available=lambda: True, Device=lambda _: contextlib.nullcontext()
        )
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        message = r"libnvrtc.so.13.* needs NVRTC and .*x\[ctk\]'"
        with pytest.raises(cuda.KernelUnavailable, match=message):
            kernels.SOURCE.kernels(0, ())

    def test_with_cupy_but_no_gpu(self, monkeypatch):
        cupy = ModuleType("cupy")
        cupy.cuda = SimpleNamespace(is_available=lambda: False)
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        with pytest.raises(cuda.KernelUnavailable, match="finds no usable GPU"):
            kernels.SOURCE.kernels(0, ())

    def test_any_error_of_cupy_is_a_reason_and_not_the_end(self, monkeypatch):
        class CompileException(Exception):
            pass

        def fail(*_):
            raise CompileException("no kernel image for sm_120")

        monkeypatch.setattr(cuda.Source, "_load", fail)
        source = cuda.Source(kernels.SOURCE.path, ("one",), "kernels")
        assert source.problem(0, ()) == "no kernel image for sm_120"

    @pytest.mark.parametrize("version", [13, 14])
    @needs_compiler
    def test_with_cupy(self, launcher, monkeypatch, version):
        log = []

        @contextlib.contextmanager
        def logged(*entry):
            log.append(entry)
            yield

        class RawModule:
            def __init__(self, *, code, options, backend):
                assert "walk_forward" in code
                assert backend == "nvrtc"
                log.append(("compile", *options))

            def get_function(self, name):
                def kernel(grid, block, arguments, shared_mem):
                    log.append(("launch", name))
                    launcher(name, options, torch.device("cpu"), grid, block, arguments, shared_mem)

                return kernel

        def from_external(stream):
            return logged("stream", *stream.__cuda_stream__())

        new = SimpleNamespace(from_external=from_external)
        cupy = ModuleType("cupy")
        cupy.RawModule = RawModule
        cupy.cuda = SimpleNamespace(
            is_available=lambda: True,
            Device=lambda index: logged("cupy device", index),
            Stream=new if version == 14 else SimpleNamespace(),
            ExternalStream=lambda handle: logged("stream", 0, handle),
        )
        options = ("-DSCALAR=float", "-DCHUNK=8")
        handles = iter((111, 222))
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setattr(torch.cuda, "device", lambda device: logged("device", str(device)))
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=next(handles))
        )
        launch, device = kernels.SOURCE.launch, torch.device("cuda", 1)

        def on_cuda(name, options, _, *rest):
            launch(name, options, device, *rest)

        monkeypatch.setattr(kernels.SOURCE, "launch", on_cuda)
        kernels.SOURCE.kernels(1, options)
        warm = [("compile", *options), ("device", "1"), ("cupy device", 1)]
        assert log == warm
        f, x = torch.rand(3, 2, 5), torch.randn(3, 2, 5)
        for handle in (111, 222):
            log.clear()
            h, _ = kernels.forget_mult_forward(f, x)
            torch.testing.assert_close(h, definition.forget_mult(f, x))
            assert log == [
                ("device", "cuda:1"),
                ("cupy device", 1),
                ("stream", 0, handle),
                ("launch", "forget_mult_forward"),
            ]


@needs_compiler
def test_nothing_outside_a_buffer_is_touched(tmp_path):
    check_bounds(kernels.SOURCE, "bounds.cpp", kernels.compile_options(torch.float32), tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles(architecture, dtype):
    check_nvrtc(kernels.SOURCE, architecture, kernels.compile_options(dtype), 168)
