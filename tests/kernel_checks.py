"""The CUDA kernels against references in float64, run as C++ on the CPU or on a GPU."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from references import assert_near
from torch import Tensor

from fast import cross_entropy
from qrnn import cuda, definition, kernels

DTYPES = list(cuda.SCALARS)
# Largest error, relative to 1 + |reference|. The 16-bit types round each result once, by at most
# 2^-11 (float16) and 2^-8 (bfloat16) of it.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
GRAD_TOLERANCE = TOLERANCE | {torch.float64: 1e-12, torch.float32: 4e-6}


@dataclass
class Case:
    """The size (seq_len, batch, hidden) and the options of a layer or a ForgetMult."""

    size: tuple[int, int, int]
    dtype: torch.dtype
    gate: bool = True
    zoneout: str | float | None = None
    reverse: bool = False
    initial: bool = False
    lengths: torch.dtype | None = None
    bias: bool = False


def random_case(dtype: torch.dtype, seed: int, size: tuple[int, int, int] | None = None) -> Case:
    """Every option at random, and sizes around chunk and block boundaries."""
    rng = random.Random(seed)
    steps = [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16, 17, 24, 31, 33, 48]
    widths = [1, 2, 3, 21, 32, 33, 63, 64, 65, 130]
    return Case(
        size or (rng.choice(steps), rng.choice([1, 2, 3, 5]), rng.choice(widths)),
        dtype,
        gate=rng.random() < 0.6,
        zoneout=rng.choice([None, "mask", 0.7, 0.0]),
        reverse=rng.random() < 0.5,
        initial=rng.random() < 0.5,
        lengths=rng.choice([None, torch.int32, torch.int64]),
        bias=rng.random() < 0.5,
    )


def check_recurrence(check: Callable, dtype: torch.dtype, place: "Place") -> None:
    """`check_layer` or `check_forget_mult` over many cases."""
    torch.manual_seed(0)
    cases = [random_case(dtype, seed) for seed in range(150)]
    for seed in range(8):
        cases += [random_case(dtype, seed, size) for size in ((1, 1, 1), (700, 2, 3))]
    cases += [random_case(dtype, seed, (70, 20, 155)) for seed in range(2)]
    for case in cases:
        check(case, place)
        place.after()


def exact(tensor: Tensor | None) -> Tensor | None:
    """The reference's copy of an input: its values in float64, with its own gradient."""
    if tensor is None:
        return None
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


class Place:
    """Where kernels run: `put` copies a tensor there, `after` is called after each case.

    `slack` multiplies a dtype's tolerances.
    """

    def __init__(
        self,
        put: Callable[[Tensor], Tensor],
        after: Callable[[], None] = lambda: None,
        slack: dict[torch.dtype, float] | None = None,
    ) -> None:
        self.put = put
        self.after = after
        self.slack = slack or {}

    def copy(self, tensor: Tensor | None) -> Tensor | None:
        """A copy there, with its own gradient."""
        if tensor is None:
            return None
        return self.put(tensor.detach()).requires_grad_(tensor.requires_grad)

    def near(
        self, actual: Tensor, expected: Tensor, tolerances: dict, dtype: torch.dtype, what: str
    ) -> None:
        assert_near(actual, expected, tolerances[dtype] * self.slack.get(dtype, 1), what)


def check_layer(case: Case, place: Place) -> None:
    """The results and gradients of a layer are those of the definition."""
    dtype, size = case.dtype, case.size
    parts = 3 if case.gate else 2

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).mul(1.5).to(dtype)

    y = draw(*size[:2], parts * size[2])
    c0 = draw(*size[1:]).requires_grad_() if case.initial else None
    # Under autocast the bias stays float32 while the product has 16 bits.
    bias = draw(parts * size[2], dtype=cuda.wide(dtype)).requires_grad_() if case.bias else None
    zoneout = case.zoneout
    if zoneout == "mask":
        zoneout = torch.rand(size).lt(0.6).to(dtype)
    lengths = padding = None
    clean = y.clone()
    if case.lengths:
        lengths = torch.randint(0, size[0] + 1, size[1:2], dtype=case.lengths)
        padding = torch.arange(size[0])[:, None] >= lengths
        # The values in the padding must not matter.
        y[padding], clean[padding] = torch.nan, 0
    weights = draw(*size), draw(*size[1:])

    inputs = [place.copy(t) for t in (y.requires_grad_(), c0, bias)]
    options = {"output_gate": case.gate, "reverse": case.reverse}
    results = kernels.pool(
        *inputs[:2],
        place.copy(zoneout) if isinstance(zoneout, Tensor) else zoneout,
        lengths=None if lengths is None else place.put(lengths),
        bias=inputs[2],
        **options,
    )
    wanted = [t for t in inputs if t is not None]
    grads = torch.autograd.grad(results, wanted, [place.copy(weight) for weight in weights])

    sources = [exact(t) for t in (clean.requires_grad_(), c0, bias)]
    added = sources[0] if bias is None else sources[0] + sources[2]
    factor = exact(zoneout) if isinstance(zoneout, Tensor) else zoneout
    true = definition.pool(added, sources[1], factor, lengths=lengths, **options)
    wanted = [t for t in sources if t is not None]
    true_grads = torch.autograd.grad(true, wanted, [exact(weight) for weight in weights])

    for name, result, expected in zip(("h", "last state"), results, true, strict=True):
        assert result.dtype == dtype
        place.near(result, expected, TOLERANCE, dtype, f"{name}, {case}")
    names = [n for n, t in zip(("y", "c0", "bias"), inputs, strict=True) if t is not None]
    for name, grad, expected in zip(names, grads, true_grads, strict=True):
        what = f"gradient of {name}, {case}"
        if name == "y" and padding is not None:
            assert (grad.cpu()[padding] == 0).all(), f"gradient in the padding, {case}"
            expected = expected.masked_fill(padding[..., None], 0)
        bits, tolerances = dtype, GRAD_TOLERANCE
        if name == "bias":
            # A sum over all steps and columns, in more bits. The errors of n numbers, and the
            # roundings of n additions, have any sign: they add up to about the root of n.
            bits, root = cuda.wide(dtype), math.sqrt(size[0] * size[1])
            tolerances = {bits: GRAD_TOLERANCE[bits] * root}
        place.near(grad, expected, tolerances, bits, what)


def check_forget_mult(case: Case, place: Place) -> None:
    """The results and gradients of ForgetMult are those of the definition."""
    f = torch.rand(case.size, dtype=torch.float64)
    x, weight = torch.randn(2, *case.size, dtype=torch.float64)
    h0 = torch.randn(case.size[1:], dtype=torch.float64)
    f, x, h0 = (t.to(case.dtype).requires_grad_() for t in (f, x, h0))
    weight, sources = weight.to(case.dtype), [f, x, h0][: 2 + case.initial]
    inputs, exacts = [place.copy(t) for t in sources], [exact(t) for t in sources]
    h = kernels.forget_mult(*inputs)
    true = definition.forget_mult(*exacts)
    place.near(h, true, TOLERANCE, case.dtype, f"h, {case}")
    grads = torch.autograd.grad(h, inputs, place.copy(weight))
    true_grads = torch.autograd.grad(true, exacts, exact(weight))
    for grad, expected in zip(grads, true_grads, strict=True):
        place.near(grad, expected, GRAD_TOLERANCE, case.dtype, f"gradient, {case}")


def softmax_reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, gradients of the logits, and their sums over rows, in float64."""
    logits = logits.double()
    shares = logits.softmax(dim=1)
    rows = torch.arange(len(targets))
    losses = -logits.log_softmax(dim=1)[rows, targets]
    shares[rows, targets] -= 1
    return losses, shares, shares.sum(dim=0)


# Of losses and of gradients in the dtype of the arithmetic; a gradient is at most 1.
LOSS_TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7}
SOFTMAX_TOLERANCE = TOLERANCE | LOSS_TOLERANCE


def check_cross_entropy(
    rows: int, columns: int, dtype: torch.dtype, place: Place, apart: int = 0, spread: float = 3.0
) -> None:
    """Losses, gradients and sums; `apart` vectors of 16 bytes lie between the rows.

    With 1 the bias does not begin at a multiple of 16 bytes, with 2 its numbers are apart.
    """
    what = f"{rows} x {columns} {dtype}, {apart} apart"
    logits = torch.randn(rows, columns, dtype=torch.float64).mul(spread).to(dtype)
    wide = cuda.wide(dtype)
    bias = place.put(torch.randn(2 * columns + 1, dtype=wide))
    bias = {0: bias[:columns], 1: bias[1 : columns + 1], 2: bias[: 2 * columns : 2]}[apart]
    targets = place.put(torch.randint(columns, (rows, 2)))[:, 0]
    # Rounded like the kernel's sums: a large sum's rounding may exceed all other errors.
    added = logits.to(wide) + bias.cpu()
    true_losses, true_gradients, true_sums = softmax_reference(added, targets.cpu())
    vector = 16 // dtype.itemsize
    row = (-(-columns // vector) + apart) * vector
    buffer = place.put(torch.full((rows, row), torch.nan, dtype=dtype))
    given = buffer[:, :columns].copy_(logits)
    losses, sums = cross_entropy.loss_and_gradient_(given, targets, bias, gradient=True)
    assert losses.dtype == sums.dtype == wide
    assert buffer[:, columns:].isnan().all(), f"written between rows, {what}"
    place.near(losses, true_losses, LOSS_TOLERANCE, wide, f"losses, {what}")
    place.near(given, true_gradients, SOFTMAX_TOLERANCE, dtype, f"gradients, {what}")
    # Sums that do not fit in shared memory are computed from the rounded gradients.
    rounded = SOFTMAX_TOLERANCE[dtype] if columns > 12_224 else 0
    of_sums = {wide: rows * LOSS_TOLERANCE[wide] + rounded}
    place.near(sums, true_sums, of_sums, wide, f"sums, {what}")
    place.after()


def check_vocabularies(dtype: torch.dtype, place: Place) -> None:
    """`check_cross_entropy` over sizes; the sums of 12,225 columns do not fit in shared memory."""
    torch.manual_seed(2)
    for columns in (2, 1023, 2047, 4097, 10_000, 12_224, 12_225, 300_000):
        check_cross_entropy(3, columns, dtype, place, apart=columns % 2)
