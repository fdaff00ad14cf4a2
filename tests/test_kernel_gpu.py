"""The CUDA kernels on a GPU, through CuPy, against loops and formulas on the CPU."""

import copy
import itertools

import pytest
import torch
from references import assert_near

import fast
from fast import cross_entropy, linear
from fast.nt_asgd import FastNTASGD
from model import QRNN
from qrnn import cuda, definition, forget_mult, kernels
from weight_drop import WeightDrop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and isinstance(cuda.import_cupy(), Exception),
        reason="CuPy is missing or unusable",
    ),
]

DTYPES = list(kernels.SCALARS)
# Relative to 1 + |reference|, as in test_kernel_cpu.py. The tolerance of float32 is larger than the
# 1e-6 there: the hardware's special functions have other errors, which add up over 700 steps.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
GRAD_TOLERANCE = TOLERANCE | {torch.float64: 1e-12, torch.float32: 8e-6}
SHAPES = [(1, 1, 1), (7, 3, 65), (13, 2, 130), (70, 20, 155), (33, 5, 64), (700, 2, 33)]


def pair(tensor, requires_grad=True):
    """A CPU tensor on the GPU, and its rounded values in float64 on the CPU."""
    if tensor is None:
        return None, None
    on_gpu = tensor.cuda().requires_grad_(requires_grad)
    return on_gpu, tensor.double().requires_grad_(requires_grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forget_mult(shape, dtype):
    torch.manual_seed(0)
    for initial, reverse in itertools.product((True, False), (True, False)):
        f, f_true = pair(torch.rand(shape).to(dtype))
        x, x_true = pair(torch.randn(shape).to(dtype))
        h0, h0_true = pair(torch.randn(shape[1:]).to(dtype) if initial else None)
        weight, weight_true = pair(torch.randn(shape).to(dtype), requires_grad=False)
        h = kernels.ForgetMultFunction.apply(f, x, h0, reverse)
        true = definition.forget_mult(f_true, x_true, h0_true, reverse)
        what = f"{shape}, initial {initial}, reverse {reverse}"
        assert_near(h, true, TOLERANCE[dtype], f"h, {what}")
        h.backward(weight)
        true.backward(weight_true)
        for ours, reference in ((f, f_true), (x, x_true), (h0, h0_true)):
            if ours is not None:
                assert_near(ours.grad, reference.grad, GRAD_TOLERANCE[dtype], f"gradient, {what}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", [True, False])
def test_layer(shape, gate, dtype):
    torch.manual_seed(0)
    options = itertools.product((True, False), (None, "mask", 0.7), (True, False), (True, False))
    for initial, zoneout, reverse, ragged in options:
        y, y_true = pair(torch.randn(*shape[:2], (3 if gate else 2) * shape[2]).to(dtype))
        c0, c0_true = pair(torch.randn(shape[1:]).to(dtype) if initial else None)
        mask, mask_true = None, None
        if zoneout == "mask":
            mask, mask_true = pair(torch.rand(shape).lt(0.6).to(dtype), requires_grad=False)
        scale = 0.7 if zoneout == 0.7 else None
        lengths = torch.randint(0, shape[0] + 1, shape[1:2]) if ragged else None
        if ragged:
            lengths[0].clamp_(min=1)  # a gradient needs at least one step
        on_gpu = lengths.cuda() if ragged else None
        weights = [torch.randn(shape).to(dtype), torch.randn(shape[1:]).to(dtype)]
        bias, bias_true = pair(torch.randn(y.size(2)) if zoneout is None else None)
        results = kernels.QRNNFunction.apply(y, c0, mask, scale, gate, reverse, on_gpu, bias)
        added = y_true if bias is None else y_true + bias_true
        zoneout = scale if mask is None else mask_true
        true = definition.pool(added, c0_true, zoneout, gate, reverse, lengths)
        what = f"{shape}, {initial}, {zoneout}, reverse {reverse}, lengths {ragged}"
        for result, reference in zip(results, true, strict=True):
            assert_near(result, reference, TOLERANCE[dtype], what)
        torch.autograd.backward(results, [weight.cuda() for weight in weights])
        torch.autograd.backward(true, [weight.double() for weight in weights])
        for ours, reference in ((y, y_true), (c0, c0_true)):
            if ours is not None:
                assert_near(ours.grad, reference.grad, GRAD_TOLERANCE[dtype], f"gradient, {what}")
        if bias is not None:
            # The bias's gradient is a sum over all steps and columns.
            error = (bias.grad.double().cpu() - bias_true.grad).norm()
            assert error <= (1e-2 if dtype.itemsize == 2 else 1e-5) * bias_true.grad.norm()


def test_more_columns_than_a_32_bit_offset_reaches():
    """2^31 elements and more, where a GPU has the memory for it: offsets are 64 bits wide."""
    shape = (33, 4, 2**24)
    if torch.cuda.mem_get_info()[0] < 4 * 33 * 4 * 2**24 * 2 + 2**30:
        pytest.skip("not enough GPU memory")
    f = torch.full(shape, 0.5, dtype=torch.float16, device="cuda")
    x = torch.ones(shape, dtype=torch.float16, device="cuda")
    h, _ = kernels.forget_mult_forward(f, x)
    expected = torch.tensor([1 - 0.5 ** (t + 1) for t in range(33)]).half()
    assert torch.equal(h[:, -1, -1].cpu(), expected)
    assert torch.equal(h[:, 0, 0].cpu(), expected)


def test_gradcheck():
    torch.manual_seed(0)
    factory = {"dtype": torch.float64, "device": "cuda", "requires_grad": True}
    f = torch.rand(5, 2, 3, **factory)
    x, h0 = torch.randn(5, 2, 3, **factory), torch.randn(2, 3, **factory)
    assert torch.autograd.gradcheck(kernels.ForgetMultFunction.apply, (f, x, h0))
    mask = torch.rand(5, 2, 3, device="cuda").lt(0.5).double()
    lengths = torch.tensor([5, 2], device="cuda")
    for gate, keep, reverse, ends in itertools.product(
        (True, False), (mask, None), (True, False), (lengths, None)
    ):
        y = torch.randn(5, 2, 9 if gate else 6, **factory)

        def layer(y, h0, options=(keep, None, gate, reverse, ends)):
            return kernels.QRNNFunction.apply(y, h0, *options)

        assert torch.autograd.gradcheck(layer, (y, h0))


def test_expanded_and_strided_gradients():
    torch.manual_seed(0)
    y = torch.randn(9, 4, 15, device="cuda", requires_grad=True)
    h, _ = kernels.QRNNFunction.apply(y, None)
    weight = torch.randn(4, 5, device="cuda")
    (expected,) = torch.autograd.grad(h, y, weight.expand(9, 4, 5).contiguous(), retain_graph=True)
    for grad in (
        weight.expand(9, 4, 5),
        torch.cat([weight, weight], dim=1).expand(9, 4, 10).contiguous()[..., 5:],
        weight.expand(9, 4, 5).transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert torch.equal(torch.autograd.grad(h, y, grad, retain_graph=True)[0], expected)
    (summed,) = torch.autograd.grad(h.sum(), y)
    h, _ = kernels.QRNNFunction.apply(y, None)
    (ones,) = torch.autograd.grad(h, y, torch.ones_like(h))
    assert torch.equal(summed, ones)


def test_side_stream():
    """Every call launches on the current stream, after the work that is queued there."""
    torch.manual_seed(0)
    y = torch.randn(70, 20, 3 * 64, device="cuda")
    expected, _, _ = kernels.qrnn_forward(y, None, None, None, True)
    torch.cuda.synchronize()
    noise = torch.randn(2000, 2000, device="cuda")
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            late = torch.zeros_like(y)
            for _ in range(20):
                noise = noise @ noise / noise.norm()
            late.copy_(y)
            h, _, _ = kernels.qrnn_forward(late, None, None, None, True)
        stream.synchronize()
        assert torch.equal(h, expected)


def test_two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    torch.manual_seed(0)
    y = torch.randn(9, 4, 15)
    results = []
    for index in (1, 0):
        source = y.to(f"cuda:{index}").requires_grad_()
        h, last = kernels.QRNNFunction.apply(source, None)
        (h.sum() + last.sum()).backward()
        assert h.device == last.device == source.grad.device == torch.device("cuda", index)
        results.append([tensor.detach().cpu() for tensor in (h, last, source.grad)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"c0 must have the shape .* on cuda:0, not .* on cuda:1"):
        kernels.qrnn_forward(y.to("cuda:0"), torch.zeros(4, 5).to("cuda:1"), None, None, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_capture_in_a_graph(dtype):
    """After a first call forward and backward can be captured, and a replay sees new inputs."""
    torch.manual_seed(0)
    y = torch.randn(13, 3, 30, device="cuda").to(dtype).requires_grad_()
    c0 = torch.randn(3, 10, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(13, 3, 10, device="cuda").to(dtype)

    def step():
        h, last = kernels.QRNNFunction.apply(y, c0)
        return h, last, *torch.autograd.grad([h, last], (y, c0), [weight, torch.ones_like(last)])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            y.copy_(torch.randn(13, 3, 30))
            c0.copy_(torch.randn(3, 10))
        graph.replay()
        for replayed, expected in zip(captured, step(), strict=True):
            assert torch.equal(replayed, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_finds_that_the_kernels_agree(dtype):
    like = torch.empty(0, device="cuda", dtype=dtype)
    assert forget_mult.way_for(like) is kernels
    assert forget_mult.way_for(like, use_cuda=False) is not kernels


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype):
    torch.manual_seed(0)
    loss_tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    tolerance = {**TOLERANCE, torch.float32: 2e-6}[dtype]
    for rows, columns in ((1, 2), (33, 1023), (7, 1025), (1400, 10_000), (5, 33_278), (3, 300_000)):
        logits = torch.randn(rows, columns).mul_(3).to(dtype)
        bias = torch.randn(columns, dtype=torch.float64)
        targets = torch.randint(columns, (rows,))
        given = linear.empty((rows, columns), logits.cuda()).copy_(logits)
        wide = kernels.wide(dtype)
        losses, sums = cross_entropy.loss_and_gradient_(
            given, targets.cuda(), bias.cuda().to(wide), bias_gradient=True
        )
        v = logits.double() + bias.to(wide).double()
        shares = v.softmax(dim=1)
        true = -v.log_softmax(dim=1)[torch.arange(rows), targets]
        shares[torch.arange(rows), targets] -= 1
        what = f"{rows} x {columns}"
        assert_near(losses, true, loss_tolerance, f"losses, {what}")
        assert_near(given, shares, tolerance, f"gradients, {what}")
        # Sums that do not fit in shared memory are computed from the rounded gradients.
        of_sums = rows * (tolerance if columns > 12_000 else loss_tolerance)
        assert_near(sums, shares.sum(dim=0), of_sums, f"sums, {what}")


def test_cross_entropy_in_a_graph():
    """A graph recorded once, replayed with new logits and targets."""
    torch.manual_seed(0)
    source, targets = torch.randn(40, 1000).cuda(), torch.randint(1000, (40,)).cuda()
    logits = torch.empty_like(source)

    def work():
        logits.copy_(source)
        return cross_entropy.loss_and_gradient_(logits, targets, bias_gradient=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses, sums = work()
    for _ in range(3):
        source.normal_()
        targets.random_(1000)
        graph.replay()
        replayed = [t.clone() for t in (losses, sums, logits)]
        expected = [*work(), logits]
        assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))


@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_cell_with_aligned_rows_is_the_one_on_the_cpu(layer, low):
    """Widths whose rows are no multiple of 16 bytes, with weight drop in evaluation."""
    torch.manual_seed(0)
    on_cpu = QRNN(75, 155, layer)
    on_cpu.linear = WeightDrop(on_cpu.linear, ["weight"], 0.5)
    on_gpu = copy.deepcopy(on_cpu.eval()).cuda()
    assert len(fast.choose(on_gpu, bf16=low is not None)) == 1
    x = torch.randn(19, 3, 75)
    ours = x.cuda().requires_grad_()
    x.requires_grad_()
    with torch.autocast("cuda", low or torch.bfloat16, enabled=low is not None):
        h, _ = on_gpu(ours, on_gpu.initial_state(3))
    on_cpu.plain = True
    expected, _ = on_cpu(x, on_cpu.initial_state(3))
    tolerance = {"atol": 5e-2, "rtol": 5e-2} if low else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(h.float().cpu(), expected, **tolerance)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad(h, [ours, *on_gpu.parameters()], weight.cuda().to(h.dtype))
    true = torch.autograd.grad(expected, [x, *on_cpu.parameters()], weight)
    for grad, reference in zip(grads, true, strict=True):
        error = (grad.float().cpu() - reference).norm() / reference.norm()
        assert error < (3e-2 if low else 1e-5)


def test_errors():
    y = torch.randn(4, 2, 6, device="cuda")
    with pytest.raises(TypeError, match=r"take torch.float64, .* not torch.int32"):
        kernels.qrnn_forward(y.int(), None, None, None, True)
    with pytest.raises(TypeError, match=r"c0 must be torch.float32 .* not torch.float16"):
        kernels.qrnn_forward(y, y[0, :, :2].half(), None, None, True)
    with pytest.raises(ValueError, match=r"c0 must have the shape .* on cuda:0, not .* on cpu"):
        kernels.qrnn_forward(y, torch.zeros(2, 2), None, None, True)
    with pytest.raises(ValueError, match="lengths must have the shape"):
        kernels.qrnn_forward(y, None, None, None, True, lengths=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="take CUDA tensors, not tensors on cpu"):
        kernels.qrnn_forward(y.cpu(), None, None, None, True)


def test_an_infinite_gradient_shows_after_the_update():
    p = torch.ones(5003, device="cuda", requires_grad=True)
    p.grad = torch.ones_like(p)
    p.grad[7] = torch.inf
    FastNTASGD([p], 1.0).step(gradient_scale=torch.zeros((), device="cuda"))
    assert p.isnan().nonzero().tolist() == [[7]]
