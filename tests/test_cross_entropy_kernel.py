"""The cross-entropy kernel without a GPU: run as C++ on the CPU, and compiled by NVRTC."""

import itertools
import random

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

from fast import cross_entropy as kernel
from fast import linear
from fast.splitcross import FastSplitCrossEntropyLoss
from qrnn import cuda

DTYPES = list(cuda.SCALARS)
# Largest error, relative to 1 + |reference|: of the losses, and of gradients of at most 1.
LOSS = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 5e-7, torch.bfloat16: 5e-7}
GRADIENT = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def reference(logits, targets, bias=None):
    """Losses, gradients of the logits, and their sums over rows, in float64, row by row."""
    losses, gradients = [], []
    for row, target in zip(logits.double(), targets.tolist(), strict=True):
        v = row if bias is None else row + bias.double()
        shares = (v - v.max()).exp()
        shares /= shares.sum()
        losses.append((v - v.max()).exp().sum().log() + (v.max() - v[target]))
        shares[target] -= 1
        gradients.append(shares)
    gradients = torch.stack(gradients)
    return torch.stack(losses), gradients, gradients.sum(dim=0)


def build(folder, threads, dtypes):
    """Blocks of `threads` as C++."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "THREADS", threads)
        options = [kernel.compile_options(dtype) for dtype in dtypes]
    return ShimLauncher(kernel.SOURCE, folder, options, fibers=True)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    """Blocks of two warps."""
    return build(tmp_path_factory.mktemp("shim"), 64, DTYPES)


@pytest.fixture
def shim(launcher, monkeypatch):
    """`kernels.cross_entropy` on CPU tensors; its results are guarded by canaries."""
    launcher.launched.clear()
    canaries = Canaries()
    monkeypatch.setattr(kernel, "THREADS", 64)
    monkeypatch.setattr(kernel.SOURCE, "launch", launcher)
    monkeypatch.setattr(kernel, "_empty", canaries.empty)
    monkeypatch.setattr(kernel, "is_usable", lambda device, dtype: True)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 1)
    yield canaries
    canaries.check()


def check(canaries, rows, columns, dtype, *, bias=True, apart=0, shift=0, spread=3.0):
    """Check one call; `apart` elements lie between rows, `shift` before the first row."""
    what = f"{rows} x {columns} {dtype}, bias {bias}, apart {apart}, shift {shift}"
    logits = torch.randn(rows, columns, dtype=torch.float64).mul(spread).to(dtype)
    added = torch.randn(columns, dtype=cuda.wide(dtype)) if bias else None
    targets = torch.randint(columns, (rows,))
    expected = reference(logits, targets, added)
    buffer = canaries.empty((rows, columns + apart), logits, shift=shift)
    given = buffer[:, :columns].copy_(logits)
    if bias:
        added = canaries.empty(added.shape, added, shift=shift).copy_(added)
    losses, sums = kernel.loss_and_gradient_(given, targets, added, True, True)
    assert losses.dtype == sums.dtype == cuda.wide(dtype)
    assert_near(losses, expected[0], LOSS[dtype], f"losses, {what}")
    assert_near(given, expected[1], GRADIENT[dtype], f"gradients, {what}")
    # Sums that do not fit in shared memory are computed from the rounded gradients.
    rounded = GRADIENT[dtype] if columns > 10_000 else 0
    assert_near(sums, expected[2], LOSS[dtype] * rows + rounded, f"sums, {what}")
    assert buffer[:, columns:].isnan().all(), f"written between rows, {what}"
    canaries.check()


@needs_compiler
class TestAgainstTheDefinition:
    def test_around_vectors_warps_and_blocks(self, shim):
        torch.manual_seed(0)
        sizes = [2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 127, 128, 129, 255, 256, 257, 511, 512, 513, 4097]
        for columns, dtype in itertools.product(sizes, DTYPES):
            rows = random.Random(columns).choice([1, 2, 3, 5])
            check(shim, rows, columns, dtype, bias=columns % 3 > 0)

    def test_random_layouts(self, shim):
        torch.manual_seed(1)
        rng = random.Random(1)
        for _ in range(200):
            rows, columns = rng.choice([1, 2, 3, 4, 7]), rng.randrange(2, 400)
            layout = {"apart": rng.choice([0, 1, 4, 8, 13]), "shift": rng.choice([0, 1, 2, 3, 8])}
            check(shim, rows, columns, rng.choice(DTYPES), bias=rng.random() < 0.5, **layout)

    def test_vocabularies_in_blocks_as_on_a_gpu(self, shim, monkeypatch, tmp_path):
        """The sums of 12,225 columns are the first that do not fit in shared memory."""
        torch.manual_seed(2)
        monkeypatch.setattr(kernel, "THREADS", 512)
        dtypes = [torch.float32, torch.bfloat16]
        monkeypatch.setattr(kernel.SOURCE, "launch", build(tmp_path, 512, dtypes))
        for columns in (2, 2047, 2049, 4097, 10_000, 12_224, 12_225, 300_000):
            check(shim, 3, columns, torch.float32)
            check(shim, 3, columns, torch.bfloat16, apart=-columns % 8)

    def test_extreme_logits(self, shim):
        inf = torch.inf
        rows = [
            [1e4, -1e4, 9999.0, 0.0, 5.0],
            [-inf, 1.0, -inf, 2.0, -inf],
            [7.0] * 5,
            [-1e30, -1e30, -1e30, -2e30, -1e30],
            [88.0, 200.0, -300.0, 200.0, 0.0],
        ]
        for dtype, targets in itertools.product(
            (torch.float32, torch.float64), ([0, 1, 2, 3, 4], [2, 3, 4, 0, 1])
        ):
            five, targets = torch.tensor(rows, dtype=dtype), torch.tensor(targets)
            # A row for one thread, and one for several.
            for logits in (five, five.repeat_interleave(21, dim=1)):
                losses, gradients, _ = reference(logits, targets)
                given = logits.clone()
                actual, _ = kernel.loss_and_gradient_(given, targets)
                torch.testing.assert_close(actual, losses.to(dtype))
                torch.testing.assert_close(given, gradients.to(dtype), rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("bad", [[torch.nan, 0.0], [-torch.inf, -torch.inf], [torch.inf, 0.0]])
    def test_what_has_no_softmax_is_nan(self, shim, bad):
        good = [1.0, 2.0]
        logits = torch.tensor([good, bad, good]).repeat_interleave(40, dim=1)
        targets = torch.tensor([3, 41, 3])
        losses, sums = kernel.loss_and_gradient_(logits, targets, None, True, True)
        expected, gradients, _ = reference(logits.new_tensor([good] * 3).repeat_interleave(40, 1),
                                           targets)  # fmt: skip
        assert not losses[1].isfinite()
        assert logits[1].isnan().any()
        assert sums.isnan().any()
        torch.testing.assert_close(losses[::2], expected[::2].float())
        torch.testing.assert_close(logits[::2], gradients[::2].float())

    def test_a_target_that_is_no_column(self, shim):
        logits = torch.randn(3, 5)
        losses, _ = kernel.loss_and_gradient_(logits, torch.tensor([0, 5, -1]))
        assert losses.isnan().tolist() == [False, True, True]

    def test_without_a_gradient_the_logits_stay(self, shim):
        torch.manual_seed(3)
        logits, targets = torch.randn(9, 37), torch.randint(37, (9,))
        given = logits.clone()
        losses, sums = kernel.loss_and_gradient_(given, targets, gradient=False)
        assert torch.equal(given, logits)
        assert sums is None
        torch.testing.assert_close(losses, reference(logits, targets)[0].float())

    def test_more_rows_than_blocks(self, shim):
        """Two blocks, as on one multiprocessor, take 50 rows with small and large values."""
        torch.manual_seed(4)
        for dtype, spread in itertools.product(DTYPES, (0.1, 10.0)):
            check(shim, 50, 70, dtype, spread=spread)

    def test_the_same_bits_again(self, shim):
        torch.manual_seed(5)
        logits, targets = torch.randn(20, 300), torch.randint(300, (20,))
        first, second = logits.clone(), logits.clone()
        results = [kernel.loss_and_gradient_(t, targets, None, True, True) for t in (first, second)]
        assert torch.equal(first, second)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_no_rows(self, shim):
        losses, sums = kernel.loss_and_gradient_(
            torch.zeros(0, 5), torch.zeros(0).long(), None, True, True
        )
        assert losses.shape == (0,)
        assert torch.equal(sums, torch.zeros(5))


@needs_compiler
class TestWithinTheLoss:
    @pytest.fixture(autouse=True)
    def as_on_a_gpu(self, shim, monkeypatch):
        monkeypatch.setattr(linear, "_on_gpu", lambda tensor: True)

    @pytest.mark.parametrize("splits", [[], [4, 9]])
    def test_gradients_against_finite_differences(self, launcher, splits):
        torch.manual_seed(0)
        factory = {"dtype": torch.float64, "requires_grad": True}
        weight, bias = torch.randn(13, 3, **factory), torch.randn(13, **factory)
        hiddens, targets = torch.randn(5, 3, **factory), torch.tensor([0, 5, 12, 3, 9])
        criterion = FastSplitCrossEntropyLoss(3, splits).double()
        for p in criterion.parameters():
            torch.nn.init.normal_(p)
        inputs = (weight, bias, hiddens, *criterion.parameters())
        loss = criterion(weight, bias, hiddens, targets)
        true = -criterion.logprob(weight, bias, hiddens)[torch.arange(5), targets].mean()
        torch.testing.assert_close(loss, true)
        assert torch.autograd.gradcheck(
            lambda *_: criterion(weight, bias, hiddens, targets), inputs
        )
        assert launcher.launched

    def test_in_several_blocks_of_rows(self, monkeypatch):
        torch.manual_seed(0)
        weight, bias = torch.randn(13, 5, requires_grad=True), torch.randn(13, requires_grad=True)
        hiddens, targets = torch.randn(7, 5, requires_grad=True), torch.randint(13, (7,))
        criterion = FastSplitCrossEntropyLoss(5, [])
        inputs = (weight, bias, hiddens)
        whole = torch.autograd.grad(criterion(*inputs, targets), inputs)
        monkeypatch.setattr("fast.splitcross.MAX_LOGITS", 3 * 13)
        parts = torch.autograd.grad(criterion(*inputs, targets), inputs)
        torch.testing.assert_close(parts, whole)

    def test_bfloat16_under_autocast(self):
        torch.manual_seed(0)
        weight, bias = torch.randn(90, 16, requires_grad=True), torch.randn(90, requires_grad=True)
        hiddens, targets = torch.randn(40, 16, requires_grad=True), torch.randint(90, (40,))
        criterion = FastSplitCrossEntropyLoss(16, [])
        inputs = (weight, bias, hiddens)
        exact = torch.nn.functional.cross_entropy(hiddens @ weight.t() + bias, targets)
        expected = torch.autograd.grad(exact, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(*inputs, targets)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
        for grad, true in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
            assert grad.dtype == torch.float32
            assert (grad - true).norm() < 2e-2 * true.norm()

    def test_without_gradients_in_evaluation(self):
        torch.manual_seed(0)
        weight, bias, hiddens = torch.randn(13, 5), torch.randn(13), torch.randn(7, 5)
        targets = torch.randint(13, (7,))
        loss = FastSplitCrossEntropyLoss(5, [])(weight, bias, hiddens, targets)
        logits = hiddens @ weight.t() + bias
        expected = -logits.log_softmax(dim=1)[torch.arange(7), targets].mean()
        torch.testing.assert_close(loss, expected)


class TestErrors:
    def test_columns_apart(self):
        with pytest.raises(ValueError, match="the columns of logits must be contiguous"):
            kernel.loss_and_gradient_(torch.zeros(5, 3).t(), torch.zeros(3).long())

    def test_device(self, monkeypatch):
        monkeypatch.setattr(cuda, "multiprocessors", lambda device: 1)
        with pytest.raises(ValueError, match="the softmax's CUDA kernels take CUDA tensors"):
            kernel.loss_and_gradient_(torch.zeros(3, 5), torch.zeros(3).long())

    def test_where_it_is_usable(self, monkeypatch):
        asked = []
        monkeypatch.setattr(kernel.SOURCE, "problem", lambda *key: asked.append(key) or "")
        assert kernel.is_usable(torch.device("cuda", 1), torch.bfloat16)
        assert asked == [(1, ("-DSCALAR=BFloat16", "-DTHREADS=512"))]
        assert not kernel.is_usable(torch.device("cpu"), torch.float32)
        assert not kernel.is_usable(torch.device("cuda", 0), torch.int32)
        monkeypatch.setattr(kernel.SOURCE, "problem", lambda *key: "no NVRTC")
        assert not kernel.is_usable(torch.device("cuda", 1), torch.bfloat16)


@needs_compiler
def test_nothing_outside_a_buffer_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel, "THREADS", 64)
    options = kernel.compile_options(torch.float32)
    check_bounds(kernel.SOURCE, "cross_entropy_bounds.cpp", options, tmp_path, "-DFIBERS")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles(architecture, dtype):
    # Two blocks fit on a multiprocessor, in float64 one.
    most = 128 if dtype == torch.float64 else 64
    check_nvrtc(kernel.SOURCE, architecture, kernel.compile_options(dtype), most)
