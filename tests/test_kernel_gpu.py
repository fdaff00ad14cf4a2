"""The CUDA kernels on a GPU, through CuPy, against the definitions on the CPU."""

import copy
from importlib.util import find_spec

import pytest
import torch
from kernel_checks import (
    DTYPES,
    Place,
    check_cross_entropy,
    check_forget_mult,
    check_layer,
    check_recurrence,
    check_vocabularies,
)

import fast
from fast.nt_asgd import FastNTASGD
from model import QRNN
from qrnn import forget_mult, kernels
from weight_drop import WeightDrop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(find_spec("cupy") is None, reason="CuPy is missing"),
]


def gpu(slack):
    """The GPU; its functions have other errors than those of the run as C++."""
    return Place(lambda tensor: tensor.cuda(), slack=slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", [check_layer, check_forget_mult])
def test_recurrence(check, dtype):
    check_recurrence(check, dtype, gpu({torch.float32: 2}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype):
    place = gpu({torch.float64: 10, torch.float32: 4})
    check_vocabularies(dtype, place)
    check_cross_entropy(1400, 10_000, dtype, place)


def test_more_columns_than_a_32_bit_offset_reaches():
    """2^31 elements and more, where a GPU has the memory for it: offsets are 64 bits wide."""
    shape = (33, 4, 2**24)
    if torch.cuda.mem_get_info()[0] < 4 * 33 * 4 * 2**24 * 2 + 2**30:
        pytest.skip("not enough GPU memory")
    f = torch.full(shape, 0.5, dtype=torch.float16, device="cuda")
    x = torch.ones(shape, dtype=torch.float16, device="cuda")
    h = kernels.forget_mult(f, x)
    expected = torch.tensor([1 - 0.5 ** (t + 1) for t in range(33)]).half()
    assert torch.equal(h[:, -1, -1].cpu(), expected)
    assert torch.equal(h[:, 0, 0].cpu(), expected)


def test_side_stream():
    """Every call launches on the current stream, after the work that is queued there."""
    torch.manual_seed(0)
    y = torch.randn(70, 20, 3 * 64, device="cuda")
    expected, _ = kernels.pool(y)
    torch.cuda.synchronize()
    noise = torch.randn(2000, 2000, device="cuda")
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            late = torch.zeros_like(y)
            for _ in range(20):
                noise = noise @ noise / noise.norm()
            late.copy_(y)
            h, _ = kernels.pool(late)
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
        h, last = kernels.pool(source)
        (h.sum() + last.sum()).backward()
        assert h.device == last.device == source.grad.device == torch.device("cuda", index)
        results.append([tensor.detach().cpu() for tensor in (h, last, source.grad)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"c_init must be .* on cuda:0, not .* on cuda:1"):
        kernels.pool(y.to("cuda:0"), torch.zeros(4, 5).to("cuda:1"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_recurrence_in_a_graph(dtype):
    """After a first call it can be captured, and replays see new inputs."""
    torch.manual_seed(0)
    y = torch.randn(13, 3, 30, device="cuda").to(dtype).requires_grad_()
    c0 = torch.randn(3, 10, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(13, 3, 10, device="cuda").to(dtype)

    def step():
        h, last = kernels.pool(y, c0)
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
        replayed = [result.clone() for result in captured]
        for result, expected in zip(replayed, step(), strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_finds_that_the_kernels_agree(dtype):
    like = torch.empty(0, device="cuda", dtype=dtype)
    assert forget_mult.way_for(like) is kernels
    assert forget_mult.way_for(like, use_cuda=False) is not kernels


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


def test_an_infinite_gradient_shows_after_the_update():
    p = torch.ones(5003, device="cuda", requires_grad=True)
    p.grad = torch.ones_like(p)
    p.grad[7] = torch.inf
    FastNTASGD([p], 1.0).step(gradient_scale=torch.zeros((), device="cuda"))
    assert p.isnan().nonzero().tolist() == [[7]]
