"""The QRNN's CUDA kernels without a GPU: compiled by NVRTC, and run as C++ on the CPU.

`qrnn.kernels` runs unchanged on CPU tensors except for its last step: the launch goes to
forget_mult.cu compiled with tests/shim, one thread after another, so that argument order, widths,
strides and the kernels' arithmetic are all under test.
"""

import contextlib
import itertools
import struct
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from kernel_checks import DTYPES, check_forget_mult, check_layer, check_recurrence
from references import assert_near
from shims import ARCHITECTURES, check_bounds, check_nvrtc, needs_compiler
from torch.utils._python_dispatch import TorchDispatchMode

from fast.linear import FastLinear
from fast.qrnn import FastQRNN
from qrnn import cuda, definition, kernels

# FUSED, GATE and MASK of ForgetMult, and of layers without and with output gate and mask.
VARIANTS = [(False, False, False), *itertools.product([True], [False, True], [False, True])]


@needs_compiler
class TestAgainstTheDefinition:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("check", [check_layer, check_forget_mult])
    def test_results_and_gradients(self, shim, check, dtype):
        check_recurrence(check, dtype, shim.place)

    def test_saturated_gates(self, shim):
        """Far from 0 the gates are open or shut, with no NaN from a power that overflows."""
        y = torch.tensor([100.0, -100.0, 1e30, -1e30]).repeat(2, 1, 3).requires_grad_()
        h, _ = kernels.pool(y)
        h.sum().backward()
        expected, _ = definition.pool(y.detach().double())
        assert_near(h, expected, 1e-6, "h")
        assert_near(y.grad, torch.zeros_like(y).double(), 1e-6, "gradient")

    def test_small_values_keep_their_relative_precision(self, shim):
        z = torch.logspace(-30, 2, 2000).repeat(1, 1, 1)
        shut = torch.full_like(z, 100.0)
        _, last = kernels.pool(torch.cat([z, shut], dim=2), output_gate=False)
        torch.testing.assert_close(last, z[0].double().tanh().float(), rtol=5e-7, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_rounding_to_sixteen_bits(self, shim, dtype):
        """Every 16-bit value stays unchanged, ties go to even, NaN stays NaN."""
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[~every.isnan()].view(1, 1, -1)
        ones = torch.ones_like(every)
        finite = every.isfinite()
        assert torch.equal(kernels.forget_mult(ones, every)[finite], every[finite])
        mean = kernels.forget_mult(0.5 * ones, every, every.roll(1, dims=2)[0])
        expected = (0.5 * every.float() + 0.5 * every.roll(1, dims=2).float()).to(dtype)
        assert torch.equal(mean.isnan(), expected.isnan())
        assert torch.equal(mean.nan_to_num(7), expected.nan_to_num(7))
        assert kernels.forget_mult(ones, torch.full_like(ones, torch.nan)).isnan().all()
        # A GPU's NaN has all bits set: rounding it like a number would give -0.
        (full_nan,) = struct.unpack("d", struct.pack("q", 2**63 - 1))
        assert kernels.pool(torch.ones(1, 1, 6).to(dtype), zoneout=full_nan)[0].isnan().all()


@needs_compiler
class TestGradients:
    @pytest.mark.parametrize("gate", [False, True])
    @pytest.mark.parametrize("result", [0, 1])
    def test_either_result_alone(self, shim, gate, result):
        """A missing gradient counts as zero and is not read; one row may serve for all."""
        torch.manual_seed(0)
        y = torch.randn(9, 2, 15 if gate else 10, dtype=torch.float64).requires_grad_()
        c0 = torch.randn(2, 5, dtype=torch.float64).requires_grad_()
        for weight in (torch.randn(5).double(), torch.ones(1).double()):
            grads, expected = (
                torch.autograd.grad(wanted, (y, c0), weight.expand_as(wanted))
                for wanted in (way.pool(y, c0, None, gate)[result] for way in (kernels, definition))
            )
            torch.testing.assert_close(grads, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_gradient_s_rows_begin_at_multiples_of_16_bytes(self, shim, dtype):
        y = torch.randn(4, 2, 15, dtype=dtype, requires_grad=True)
        (grad,) = torch.autograd.grad(kernels.pool(y)[0].sum(), y)
        assert grad.stride(1) * dtype.itemsize % 16 == 0

    def test_states_are_kept_only_for_a_backward_pass(self, shim, monkeypatch):
        sizes = []
        new_empty = torch.Tensor.new_empty

        def noted(like, *shape, **options):
            sizes.append(shape)
            return new_empty(like, *shape, **options)

        monkeypatch.setattr(torch.Tensor, "new_empty", noted)
        y = torch.randn(9, 3, 6)
        expected, _ = kernels.pool(y)
        assert sizes == [(9, 3, 2), (3, 2)]
        assert torch.equal(kernels.pool(y.requires_grad_())[0], expected)
        assert sizes[4:] == [(2, 3, 2)]

    def test_second_derivatives_are_refused(self, shim):
        y = torch.randn(3, 2, 6, requires_grad=True)
        h, _ = kernels.pool(y)
        (grad,) = torch.autograd.grad(h.square().sum(), y, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def slice_of_columns(tensor):
    wide = torch.cat([tensor, torch.full_like(tensor, -1), tensor], dim=-1)
    return wide[..., -tensor.size(-1) :]


def every_second_column(tensor):
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.size(-1)), -1, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def batch_first(tensor):
    batch = min(1, tensor.dim() - 1)
    return tensor.transpose(0, batch).contiguous().transpose(0, batch)


@needs_compiler
@pytest.mark.parametrize("layout", [slice_of_columns, every_second_column, batch_first])
@pytest.mark.parametrize("shape", [(9, 4, 5), (1, 4, 2), (4, 1, 2), (1, 1, 2), (4, 3, 1)])
def test_every_input_may_be_strided(shim, layout, shape):
    torch.manual_seed(0)
    seq_len, batch, hidden = shape
    y, bias = torch.randn(seq_len, batch, 3 * hidden), torch.randn(3 * hidden)
    c0, grad_last = torch.randn(2, batch, hidden)
    mask, f = torch.rand(2, *shape).round()
    x, grad = torch.randn(2, *shape)
    lengths = torch.randint(1, seq_len + 1, (batch,))

    def results(change):
        given = [change(t).requires_grad_() for t in (y, c0, bias, f, x)]
        h, last = kernels.pool(*given[:2], change(mask), lengths=change(lengths), bias=given[2])
        h_alone = kernels.forget_mult(*given[3:], given[1])
        outputs = [h, last, h_alone]
        gradients = [change(grad), change(grad_last), change(grad)]
        return [*outputs, *torch.autograd.grad(outputs, given, gradients)]

    for actual, expected in zip(results(layout), results(torch.clone), strict=True):
        assert torch.equal(actual, expected)


def test_a_slice_of_columns_is_read_in_place():
    y = torch.randn(9, 3, 12)[..., 4:10]
    assert kernels._rows(y) == (y, 12)


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
@pytest.mark.usefixtures("as_on_a_gpu")
class TestLayers:
    def layer(self):
        torch.manual_seed(0)
        layer = FastQRNN(5, 7, 1)
        layer.linear.__class__ = FastLinear
        return layer

    def test_no_further_pass_adds_a_bias_or_sums_its_gradient(self):
        layer = self.layer()
        x = torch.randn(9, 3, 5)
        with Calls() as calls:
            h, _ = layer(x, layer.initial_state(3))
            h.sum().backward()
        assert layer.linear.bias.grad is not None
        assert not {"aten.add_", "aten.add", "aten.addmm"} & set(calls.names)
        # Only the kernel's sums for each batch column, not the gradients of all rows.
        assert calls.summed == [(3, 21)]

    def test_a_linear_map_of_ones_own_keeps_its_bias(self):
        layer, other = self.layer(), self.layer()
        other.linear.__class__ = torch.nn.Linear
        x, state = torch.randn(9, 3, 5), layer.initial_state(3)
        torch.testing.assert_close(layer(x, state)[0], other(x, state)[0])


def test_what_a_kernel_would_misread_is_refused():
    y, h, wide = torch.zeros(4, 2, 6), torch.zeros(4, 2, 2), torch.zeros(4, 3, 2)
    with pytest.raises(ValueError, match=r"f must be \(4, 2, 2\), torch.float32 on cpu, not .*int"):
        kernels.forget_mult(h.int(), h)
    with pytest.raises(ValueError, match=r"hidden_init must be \(2, 2\), .* not \(3, 2\)"):
        kernels.forget_mult(h, h, wide[0])
    with pytest.raises(ValueError, match=r"c_init must be .* not .* on meta"):
        kernels.pool(y, h[0].to("meta"))
    with pytest.raises(ValueError, match=r"zoneout must be \(4, 2, 2\)"):
        kernels.pool(y, zoneout=wide)
    for options in ({"lengths": torch.ones(3)}, {"bias": torch.ones(5)}):
        with pytest.raises(RuntimeError, match="expanded size"):
            kernels.pool(y, **options)
    with pytest.raises(ValueError, match="has a zero"):
        kernels.pool(y[:0])


@pytest.fixture
def own_cupy(monkeypatch):
    """A stand-in for CuPy, and no memory of kernels before and after."""
    cupy = ModuleType("cupy")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    cuda.kernel.cache_clear()
    yield cupy
    cuda.kernel.cache_clear()


class TestLaunch:
    DEVICE = torch.device("cuda", 1)

    def test_without_a_compiler_the_error_names_the_package(self, own_cupy):
        class CompileException(Exception):
            pass

        def compiled(**_):
            raise CompileException("no kernel image for sm_120")

        own_cupy.RawModule = compiled
        expected = r"\(no kernel image for sm_120\).*'cupy-cuda1\dx\[ctk\]>=14'"
        with pytest.raises(RuntimeError, match=expected):
            cuda.kernel(kernels.SOURCE, "qrnn_forward", (), self.DEVICE)

    @pytest.mark.parametrize("version", [13, 14])
    def test_with_cupy(self, own_cupy, monkeypatch, version):
        log = []

        @contextlib.contextmanager
        def logged(*entry):
            log.append(entry)
            yield

        def raw_module(*, code, options, backend):
            assert "KERNEL qrnn_forward(" in code
            assert "struct BFloat16" in code
            log.append(("compile", *options, backend))
            return SimpleNamespace(get_function=lambda name: launch)

        def launch(grid, block, arguments, shared_mem):
            log.append(("launch", grid, block, arguments, shared_mem))

        stream = SimpleNamespace(cuda_stream=111, __cuda_stream__=lambda: (0, 111))
        own_cupy.RawModule = raw_module
        own_cupy.cuda = SimpleNamespace(
            Stream=SimpleNamespace(), ExternalStream=lambda handle: logged("stream", handle)
        )
        if version == 14:
            own_cupy.cuda.Stream.from_external = lambda s: logged("stream", s.__cuda_stream__()[1])
        monkeypatch.setattr(torch.cuda, "device", lambda device: logged("device", str(device)))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        x = torch.zeros(3)
        arguments = (x, None, 7, 0.5)
        cuda.kernel(kernels.SOURCE, "qrnn_forward", ("-DX",), self.DEVICE)
        for _ in range(2):
            cuda.launch(
                kernels.SOURCE, "qrnn_forward", ("-DX",), self.DEVICE, grid=5, block=64,
                arguments=arguments, shared=8,
            )  # fmt: skip
        launched = ("launch", (5,), (64,), [x.data_ptr(), 0, 7, 0.5], 8)
        each = [("device", "cuda:1"), ("stream", 111), launched]
        assert log == [("compile", "-DX", "nvrtc"), ("device", "cuda:1"), *each, *each]


@needs_compiler
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[1], VARIANTS[-1]])
def test_nothing_outside_a_buffer_is_touched(tmp_path, variant):
    options = kernels.compile_options(torch.float32, *variant)
    check_bounds(kernels.SOURCE, "bounds.cpp", options, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles(architecture, dtype):
    for variant in VARIANTS:
        options = kernels.compile_options(dtype, *variant)
        check_nvrtc(kernels.SOURCE, architecture, options, 168)
