"""The update kernel without a GPU: compiled by NVRTC, and run as C++ on the CPU.

`kernels.update` runs unchanged on CPU tensors except for its launch, which goes to update.cu
compiled with tests/shim, one thread after another.
"""

import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from references import naive_update
from shims import (
    ARCHITECTURES,
    Canaries,
    ShimLauncher,
    check_bounds,
    check_nvrtc,
    needs_compiler,
)

from kernels import cuda
from kernels import update as kernel
from nt_asgd import NTASGD

DTYPES = [torch.float32, torch.float64]
# Around vectors of 2 and 4 elements, rounds of a block's threads, and chunks of 1024 and 2048.
COUNTS = [0, 1, 2, 3, 4, 5, 7, 8, 255, 256, 257, 511, 513, 1023, 1024, 1025, 2047, 2048, 2049, 5003]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    options = map(kernel.compile_options, DTYPES)
    return ShimLauncher(kernel.SOURCE, tmp_path_factory.mktemp("shim"), options)


@pytest.fixture
def shim(launcher, monkeypatch):
    """`kernels.update` on CPU tensors and a device of two multiprocessors; returns its launches."""
    launches = []

    def launch(name, options, device, grid, block, arguments):
        launches.append(SimpleNamespace(grid=grid, arguments=arguments))
        launcher(name, options, device, grid, block, arguments)

    monkeypatch.setattr(kernel.SOURCE, "launch", launch)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 2)
    return launches


def single(number):
    """The nearest float32, which the kernel uses unless it computes in float64."""
    return float(np.float32(number))


def assert_rounded(actual, expected, terms):
    """Assert that `actual` is off by rounding only, relative to the largest of all `terms`.

    float64 gets a larger tolerance, because there the reference is rounded too.
    """
    size = torch.stack([term.double().abs() for term in (expected, *terms)]).amax(dim=0)
    error = (actual.double() - expected).abs()
    units = 1.25 if actual.dtype == torch.float32 else 3
    assert (error <= units * torch.finfo(actual.dtype).eps * size).all()


class Case:
    """Parameters of random sizes at random addresses, between canaries; random numbers."""

    def __init__(self, seed, dtype, counts=None, averaging=None, gradients=0.8):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        # An update would change 7, so a canary that is updated shows.
        self.canaries = Canaries(7.0)
        counts = counts or [rng.choice(COUNTS) for _ in range(rng.choice([1, 2, 5]))]
        averaging = rng.random() < 0.5 if averaging is None else averaging
        self.numbers = {
            "lr": rng.choice([1e-3, 0.7, 30.0]),
            "decay": rng.choice([0.0, 1.2e-6, 0.3]),
            "scale": rng.choice([1.0, 0.25, 1e-3]),
            "weight": rng.choice([1.0, 0.9, 0.5, 0.3, 1e-4]),
        }
        self.wide = dtype == torch.float64
        self.params, self.averages = [], [] if averaging else None
        for count in counts:
            shifts = [0] * 3 if rng.random() < 0.6 else [rng.randrange(4) for _ in range(3)]
            shape = () if count == 1 and rng.random() < 0.5 else (count,)
            p, grad, average = (self._tensor(shape, dtype, shift) for shift in shifts)
            self.params.append(p.requires_grad_())
            if rng.random() < gradients:
                p.grad = grad
            if averaging:
                self.averages.append(average)

    def _tensor(self, shape, dtype, shift):
        return self.canaries.empty(shape, torch.empty(0, dtype=dtype), shift=shift).normal_()

    def check(self, on_device=()):
        """Update and compare; the numbers named in `on_device` are device tensors."""
        numbers = {
            name: number if self.wide and name not in on_device else single(number)
            for name, number in self.numbers.items()
        }
        by = SimpleNamespace(**numbers)
        averages = self.averages or [None] * len(self.params)
        before = [
            (
                p.detach().clone(),
                None if p.grad is None else p.grad.clone(),
                a if a is None else a.clone(),
            )
            for p, a in zip(self.params, averages, strict=True)
        ]
        given = {
            name: torch.tensor(number) if name in on_device else number
            for name, number in self.numbers.items()
        }
        kernel.update(self.params, self.averages, **given)
        self.canaries.check()
        for p, average, (p0, grad, average0) in zip(self.params, averages, before, strict=True):
            p1, average1 = naive_update(p0, grad, average0, **numbers)
            terms = [p0]
            if grad is None:
                assert torch.equal(p, p0)
            else:
                terms += [by.lr * by.scale * grad, by.lr * by.decay * p0]
                assert_rounded(p.detach(), p1, terms)
                assert torch.equal(p.grad, grad)
            if average is not None:
                assert_rounded(average, average1, [*terms, p1, average0])


def network_like(seed, dtype=torch.float32):
    """Two groups of parameters, one of them without weight decay, and their optimiser."""
    torch.manual_seed(seed)
    groups = [
        [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
        for shapes in ([(30, 70), (70,), ()], [(2049,), (3, 5)])
    ]
    optimizer = NTASGD([{"params": group} for group in groups], 0.5, 0.01)
    optimizer.param_groups[1].update(lr=0.3, weight_decay=0.0)
    return [p for group in groups for p in group], optimizer


@needs_compiler
class TestAgainstTheDefinition:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_random_cases(self, shim, dtype):
        for seed in range(300):
            names = ("lr", "scale", "weight")
            Case(seed, dtype).check([name for n, name in enumerate(names) if seed >> n & 1])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("averaging", [False, True])
    def test_every_count_alone(self, shim, averaging, dtype):
        for count in COUNTS:
            Case(count, dtype, [count], averaging, gradients=1.0).check()

    def test_more_parameters_than_a_launch_takes(self, shim):
        for counts, launches in (([3] * 64, 1), ([3] * 65, 2), ([5, 2049, 1] * 50, 3)):
            shim.clear()
            Case(0, torch.float32, counts, averaging=True).check()
            assert len(shim) == launches

    def test_nothing_to_do_is_not_launched(self, shim):
        Case(0, torch.float32, [0, 0], averaging=True).check()
        Case(0, torch.float32, [3, 5], averaging=False, gradients=0.0).check()
        assert not shim

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_blocks_share_the_chunks_evenly(self, shim, dtype):
        """At most one block per chunk, and at most as many as the device holds at once."""
        chunk = 2048 if dtype == torch.float32 else 1024
        assert f"-DCHUNK={chunk}" in kernel.compile_options(dtype)
        for counts, blocks in (([1, 1], 2), ([chunk, chunk + 1], 3), ([20 * chunk], 8)):
            Case(0, dtype, counts, averaging=True).check()
            assert shim[-1].grid == (blocks,)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_first_average_is_the_parameter_itself(self, shim, dtype):
        """The old average does not matter, and no digits are lost in a difference."""
        p = torch.randn(5003, dtype=dtype, requires_grad=True)
        average = torch.full_like(p, 1e10, requires_grad=False)
        kernel.update([p], [average], 1.0, 0.0, weight=1.0)
        assert torch.equal(average, p)

    def test_large_weights_lose_no_digits(self, shim):
        for weight in (0.5, 0.75, 0.999):
            p = torch.ones(9)
            average = torch.full_like(p, 3e7)
            kernel.update([p], [average], 1.0, 0.0, weight=weight)
            exact = 3e7 + single(weight) * (1 - 3e7)
            assert average.double() == pytest.approx(exact, rel=1e-6, abs=0)

    def test_a_gradient_of_other_strides(self, shim):
        """The gradient is copied to the parameter's layout first."""
        p, grad = torch.zeros(5, 3, requires_grad=True), torch.randn(3, 5).t()
        p.grad = grad
        kernel.update([p], None, 2.0, 0.0)
        assert torch.equal(p, -2 * grad)
        p.grad = torch.ones(3).expand(5, 3)
        kernel.update([p], None, 2.0, 0.0)
        assert torch.equal(p, -2 * grad - 2)

    def test_numbers_are_read_on_the_device(self, shim):
        """The launch gets addresses, so that a replay reads the current numbers."""
        lr, scale, weight = torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0)
        p, average = torch.zeros(3, requires_grad=True), torch.zeros(3)
        p.grad = torch.ones(3)
        kernel.update([p], [average], lr, 0.0, scale, weight)
        _, rows, *numbers = shim[-1].arguments
        assert rows == 1
        assert numbers == [lr.data_ptr(), 0.0, scale.data_ptr(), 0.0, weight.data_ptr(), 0.0, 0.0]

    def test_numbers_of_another_dtype(self, shim):
        p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        p.grad = torch.ones(3, dtype=torch.float64)
        one_half = torch.tensor(0.5, dtype=torch.float64)
        kernel.update([p], None, one_half, 0.0, one_half)
        assert torch.equal(p, torch.full_like(p, -0.25))

    def test_autograd_knows_that_parameters_changed(self, shim):
        p = torch.ones(3, requires_grad=True)
        loss, average = p.square().sum(), torch.ones(3)
        other = (p.detach().requires_grad_() * average).sum()
        p.grad = torch.ones(3)
        kernel.update([p], [average], 1.0, 0.0, weight=0.5)
        for result in (loss, other):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                result.backward()


@needs_compiler
class TestOptimizer:
    """NTASGD through the kernel and through PyTorch's operations."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("recorded", [False, True])
    def test_20_steps_across_the_switch(self, shim, monkeypatch, recorded, dtype):
        """`recorded` passes the numbers in tensors, as a recorded step does."""
        results = []
        for suits in (True, False):
            monkeypatch.setattr(kernel, "suits", lambda params, suits=suits: suits)
            params, optimizer = network_like(0, dtype)
            shim.clear()
            for step in range(20):
                if step == 10:
                    optimizer.start_averaging()
                for n, p in enumerate(params):
                    p.grad = None if (n + step) % 4 == 0 else torch.randn_like(p)
                weight = torch.tensor(1 / max(1, step - 9)) if recorded else None
                rates = [group["lr"] for group in optimizer.param_groups]
                for group in optimizer.param_groups:
                    rate = group["lr"] * (1 + step % 3)
                    group["lr"] = torch.tensor(rate) if recorded else rate
                scale = torch.tensor(0.25 + 0.01 * step, dtype=dtype)
                optimizer.step(gradient_scale=scale, averaging_weight=weight)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
            assert len(shim) == (40 if suits else 0)
            results.append((params, [optimizer.state[p]["average"] for p in params]))
        # Numbers on the device are float32, for float64 parameters too.
        torch.testing.assert_close(*results, atol=2e-6, rtol=2e-6)

    @pytest.mark.parametrize("suits", [True, False])
    def test_a_given_share_replaces_the_count(self, shim, monkeypatch, suits):
        """A recorded step replays with the shares of later steps."""
        monkeypatch.setattr(kernel, "suits", lambda params: suits)
        p = torch.nn.Parameter(torch.zeros(5))
        optimizer = NTASGD([p], 1.0)
        optimizer.start_averaging()
        p.grad = torch.ones(5)
        optimizer.step(averaging_weight=torch.tensor(0.25))
        assert torch.equal(optimizer.state[p]["average"], torch.full((5,), -0.25))

    @pytest.mark.parametrize("norm", [math.inf, math.nan])
    def test_a_norm_that_is_no_number_shows(self, shim, monkeypatch, norm):
        """As without the kernel: nan for infinite gradients, or everywhere if the norm is nan."""
        found = []
        for suits in (True, False):
            monkeypatch.setattr(kernel, "suits", lambda params, suits=suits: suits)
            params, optimizer = network_like(0)
            optimizer.start_averaging()
            for p in params:
                p.grad = torch.full_like(p, 1e30)
                p.grad.view(-1)[::7] = math.inf
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"])
            scale, weight = 0.25 / torch.tensor(norm), torch.tensor(1.0)
            optimizer.step(gradient_scale=scale, averaging_weight=weight)
            found.append([*params, *(optimizer.state[p]["average"] for p in params)])
            for p in params:
                assert p.view(-1)[::7].isnan().all()
        torch.testing.assert_close(*found, equal_nan=True)

    def test_a_step_as_before_without_a_gpu(self, monkeypatch):
        def launch(*_):
            raise AssertionError("a launch on the CPU")

        monkeypatch.setattr(kernel.SOURCE, "launch", launch)
        params, optimizer = network_like(0)
        for p in params:
            p.grad = torch.ones_like(p)
        expected = params[3].detach() - 0.3
        optimizer.step()
        torch.testing.assert_close(params[3].detach(), expected)


class TestSuits:
    @pytest.fixture(autouse=True)
    def with_cupy(self, monkeypatch):
        cuda.Source.loads.cache_clear()
        monkeypatch.setattr(kernel.SOURCE, "kernels", lambda *_: {})
        yield
        cuda.Source.loads.cache_clear()

    @staticmethod
    def on_gpu(**changes):
        """A stand-in for a parameter on a GPU, with `changes`."""
        usual = {"is_cuda": True, "dtype": torch.float32, "device": torch.device("cuda", 0)}
        return SimpleNamespace(**{**usual, "is_contiguous": lambda: True, **changes})

    def test_what_suits(self):
        assert kernel.suits([self.on_gpu(), self.on_gpu()])
        assert kernel.suits([self.on_gpu(dtype=torch.float64)])

    @pytest.mark.parametrize(
        "change",
        [
            {"is_cuda": False, "device": torch.device("cpu")},
            {"dtype": torch.float16},
            {"dtype": torch.bfloat16},
        ],
    )
    def test_what_does_not_suit(self, change):
        assert not kernel.suits([self.on_gpu(**change)])

    @pytest.mark.parametrize(
        "change",
        [
            {"dtype": torch.float64},
            {"device": torch.device("cuda", 1)},
            {"is_contiguous": lambda: False},
        ],
    )
    def test_all_must_suit_alike(self, change):
        assert not kernel.suits([self.on_gpu(), self.on_gpu(**change)])

    def test_where_cupy_is_missing_or_cannot_compile(self, monkeypatch):
        tried = []

        def kernels(device_index, options):
            tried.append((device_index, options))
            raise cuda.KernelUnavailable

        monkeypatch.setattr(kernel.SOURCE, "kernels", kernels)
        for _ in range(2):
            assert not kernel.suits([self.on_gpu()])
        assert tried == [(0, kernel.compile_options(torch.float32))]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_a_buffer_is_touched(tmp_path, dtype):
    check_bounds(kernel.SOURCE, "update_bounds.cpp", kernel.compile_options(dtype), tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles(architecture, dtype):
    ptx = check_nvrtc(kernel.SOURCE, architecture, kernel.compile_options(dtype), 64)
    for access in ("ld", "st"):  # of 16 bytes
        assert re.search(rf"{access}\.global\.v[24]\.", ptx)
