"""The cross-entropy kernel without a GPU: run as C++ on the CPU, and compiled by NVRTC."""

import itertools

import pytest
import torch
from kernel_checks import DTYPES, check_cross_entropy, check_vocabularies, softmax_reference
from shims import ARCHITECTURES, check_bounds, check_nvrtc, needs_compiler

from fast import cross_entropy
from fast.splitcross import FastSplitCrossEntropyLoss
from qrnn import cuda


def softmax(logits, targets, gradient=True):
    """Losses of `logits`, which their gradient overwrites in the columns that exist."""
    rows, columns = logits.shape
    buffer = logits.new_zeros(rows, -(-columns // 16) * 16)
    given = buffer[:, :columns].copy_(logits)
    bias = logits.new_zeros(columns)
    losses, sums = cross_entropy.loss_and_gradient_(given, targets, bias, gradient)
    return losses, given, sums


@needs_compiler
class TestAgainstTheDefinition:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_around_vectors_warps_and_blocks(self, shim, dtype):
        """Rows of two warps on two blocks, up to fifty of them, with small and large values."""
        torch.manual_seed(0)
        widths = [2, 3, 4, 5, 7, 8, 9, 31, 33, 127, 128, 129, 255, 256, 257, 511, 512, 513, 4097]
        for columns, apart in itertools.product(widths, (0, 1, 2)):
            for rows, spread in ((1, 3.0), (5, 10.0), (50, 0.1)) if columns < 300 else ((3, 3.0),):
                check_cross_entropy(rows, columns, dtype, shim.place, apart, spread)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_vocabularies_in_blocks_as_on_a_gpu(self, shim, monkeypatch, dtype):
        monkeypatch.setattr(cross_entropy, "THREADS", 512)
        check_vocabularies(dtype, shim.place)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extreme_logits(self, shim, dtype):
        inf = torch.inf
        rows = [
            [1e4, -1e4, 9999.0, 0.0, 5.0],
            [-inf, 1.0, -inf, 2.0, -inf],
            [7.0] * 5,
            [-1e30, -1e30, -1e30, -2e30, -1e30],
            [88.0, 200.0, -300.0, 200.0, 0.0],
        ]
        five = torch.tensor(rows, dtype=dtype)
        # A row for one thread, and one for several.
        for logits in (five, five.repeat_interleave(21, dim=1)):
            for targets in (torch.tensor([0, 1, 2, 3, 4]), torch.tensor([2, 3, 4, 0, 1])):
                losses, gradients, _ = softmax(logits, targets)
                true_losses, true_gradients, _ = softmax_reference(logits, targets)
                torch.testing.assert_close(losses, true_losses.to(dtype))
                torch.testing.assert_close(
                    gradients, true_gradients.to(dtype), rtol=1e-5, atol=1e-7
                )

    @pytest.mark.parametrize("bad", [[torch.nan, 0.0], [-torch.inf, -torch.inf], [torch.inf, 0.0]])
    def test_a_row_without_a_softmax_is_nan_alone(self, shim, bad):
        logits = torch.tensor([[1.0, 2.0], bad, [1.0, 2.0]]).repeat_interleave(40, dim=1)
        targets = torch.tensor([3, 41, 3])
        losses, gradients, sums = softmax(logits, targets)
        assert not losses[1].isfinite()
        assert gradients[1].isnan().any()
        assert sums.isnan().any()
        true = [t.float() for t in softmax_reference(logits, targets)]
        torch.testing.assert_close(losses[::2], true[0][::2])
        torch.testing.assert_close(gradients[::2], true[1][::2])

    def test_a_target_that_is_no_column(self, shim):
        losses, _, _ = softmax(torch.randn(3, 5), torch.tensor([0, 5, -1]))
        assert losses.isnan().tolist() == [False, True, True]

    def test_without_a_gradient_the_logits_stay(self, shim):
        torch.manual_seed(3)
        logits, targets = torch.randn(9, 37), torch.randint(37, (9,))
        losses, given, sums = softmax(logits, targets, gradient=False)
        assert torch.equal(given, logits)
        assert sums is None
        torch.testing.assert_close(losses, softmax_reference(logits, targets)[0].float())


@needs_compiler
@pytest.mark.usefixtures("as_on_a_gpu")
class TestWithinTheLoss:
    @pytest.mark.parametrize("splits", [[], [4, 9]])
    def test_gradients_in_blocks_of_rows(self, shim, monkeypatch, splits):
        torch.manual_seed(0)
        monkeypatch.setattr("fast.splitcross.MAX_LOGITS", 3 * 13)
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
        with torch.no_grad():
            torch.testing.assert_close(criterion(weight, bias, hiddens, targets), true)
        assert set(shim.launched) == {"cross_entropy"}

    def test_bfloat16_under_autocast(self):
        torch.manual_seed(0)
        weight, bias = torch.randn(90, 16, requires_grad=True), torch.randn(90, requires_grad=True)
        hiddens, targets = torch.randn(40, 16, requires_grad=True), torch.randint(90, (40,))
        inputs = (weight, bias, hiddens)
        exact = torch.nn.functional.cross_entropy(hiddens @ weight.t() + bias, targets)
        expected = torch.autograd.grad(exact, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            loss = FastSplitCrossEntropyLoss(16, [])(*inputs, targets)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
        for grad, true in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
            assert grad.dtype == torch.float32
            assert (grad - true).norm() < 2e-2 * true.norm()


def test_where_it_is_usable(monkeypatch):
    asked = []
    monkeypatch.setattr(cuda, "kernel", lambda *key: asked.append(key))
    device = torch.device("cuda", 1)
    is_usable = cross_entropy.is_usable.__wrapped__
    assert is_usable(device, torch.bfloat16)
    options = ("-DSCALAR=BFloat16", "-DTHREADS=512")
    assert asked == [(cross_entropy.SOURCE, "cross_entropy", options, device)]
    assert not is_usable(torch.device("cpu"), torch.float32)

    def without_cupy(*_):
        raise RuntimeError("no NVRTC")

    monkeypatch.setattr(cuda, "kernel", without_cupy)
    assert not is_usable(device, torch.bfloat16)


@needs_compiler
def test_nothing_outside_a_buffer_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(cross_entropy, "THREADS", 64)
    options = cross_entropy.compile_options(torch.float32)
    check_bounds(cross_entropy.SOURCE, "cross_entropy_bounds.cpp", options, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles(architecture, dtype):
    # Two blocks fit on a multiprocessor, in float64 one.
    most = 128 if dtype == torch.float64 else 64
    check_nvrtc(cross_entropy.SOURCE, architecture, cross_entropy.compile_options(dtype), most)
