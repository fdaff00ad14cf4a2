"""The recurrence and the layer of definition.py in the fastest of three ways that agrees with it.

The ways are CUDA kernels (kernels.py), PyTorch's operations with hand-written gradients (fused.py),
and the definition. Each is compared with the definition on small tensors before its first use, and
is not used if the definition was edited.
"""

import functools
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

from qrnn import check, definition, fused, kernels

# A digest of the source of definition.py, which kernels.py and fused.py follow; tests/test_fast.py
# prints it anew after an edit of ours.
DEFINITION = "9de679e0"


class ForgetMult(nn.Module):
    """`h_t = f_t * x_t + (1 - f_t) * h_{t-1}` as a module, with the original's call."""

    def forward(
        self, f: Tensor, x: Tensor, hidden_init: Tensor | None = None, use_cuda: bool = True
    ) -> Tensor:
        """definition.forget_mult, for which `hidden_init` may also be (1, batch, hidden).

        On a GPU it runs as one kernel, unless `use_cuda` is False or CuPy is missing. Raises
        ValueError if the shapes do not fit.
        """
        if f.dim() != 3 or f.shape != x.shape:
            raise ValueError(
                "ForgetMult takes f and x of one shape (seq_len, batch, hidden), "
                f"not {tuple(f.shape)} and {tuple(x.shape)}"
            )
        return way_for(x, use_cuda).forget_mult(f, x, _initial(hidden_init, x))


def pool(
    y: Tensor,
    c_init: Tensor | None = None,
    zoneout: Tensor | float | None = None,
    output_gate: bool = True,
    reverse: bool = False,
    lengths: Tensor | None = None,
    bias: Tensor | None = None,
    use_cuda: bool = True,
    plain: bool = False,
) -> tuple[Tensor, Tensor]:
    """definition.pool of `y + bias`; the kernels add the `bias` at no cost.

    `c_init` may also be (1, batch, hidden), and the last state is (1, batch, hidden). With `plain`
    it is the definition.
    """
    initial = _initial(c_init, y[..., : y.size(2) // (3 if output_gate else 2)])
    options = {"output_gate": output_gate, "reverse": reverse, "lengths": lengths}
    way = definition if plain else way_for(y, use_cuda)
    if way is kernels:
        options["bias"] = bias
    elif bias is not None:
        y = y + bias
    h, last = way.pool(y, initial, zoneout, **options)
    return h, last.unsqueeze(0)


def way_for(x: Tensor, use_cuda: bool = True) -> ModuleType:
    """The module whose `forget_mult` and `pool` take tensors like `x`."""
    # torch.compile traces the loop: it can follow neither a launch nor a hand-written gradient.
    if torch.compiler.is_compiling():
        return definition
    ways = (kernels, fused) if use_cuda and x.is_cuda else (fused,)
    return next((way for way in ways if _agrees(way, x.device, x.dtype)), definition)


def _initial(hidden_init: Tensor | None, x: Tensor) -> Tensor | None:
    """`hidden_init` as (batch, hidden) in the dtype of `x`, checked against its shape."""
    if hidden_init is None:
        return None
    if hidden_init.dim() == 3 and hidden_init.size(0) == 1:
        hidden_init = hidden_init[0]
    if hidden_init.shape != x.shape[1:]:
        raise ValueError(
            f"the initial state must have the shape {tuple(x.shape[1:])} (batch, hidden), "
            f"not {tuple(hidden_init.shape)}"
        )
    # Under autocast the linear map's result has fewer bits than the carried-over state.
    return hidden_init.to(x.dtype)


@functools.cache
def _agrees(way: ModuleType, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a way gives the definition's results and gradients; if not, a warning says why."""
    like = torch.empty(0, device=device, dtype=dtype)
    problem = check.problem(lambda: _compare(way, like), device, check.TOLERANCE[dtype])
    if problem:
        file = way.__name__.replace(".", "/")
        warnings.warn(f"{file}.py is not used for {dtype} on {device}: {problem}", stacklevel=4)
    return not problem


def _compare(way: ModuleType, like: Tensor) -> Iterator[list[Tensor]]:
    """Results and gradients of the recurrence and of the layer, forwards and in reverse.

    The definition computes in float32 or more, from numbers rounded to the dtype of `like`.
    """
    if check.source_digest(definition) != DEFINITION:
        raise RuntimeError("qrnn/definition.py was edited")
    exact = like if like.dtype == torch.float64 else like.float()
    for module, precision in ((way, like), (definition, exact)):
        results = []
        for reverse in (False, True):
            f, x, y, c = (
                check.numbers(*shape, like=like).to(precision).requires_grad_()
                for shape in ((11, 2, 33), (11, 2, 33), (11, 2, 99), (2, 33))
            )
            lengths = torch.tensor([11, 6], device=like.device) if reverse else None
            h = module.forget_mult(f.sigmoid(), x, c)
            output, last = module.pool(y, c, 0.7, True, reverse, lengths)
            loss = (h * x).sum() + (output * x).sum() + (last * c).sum()
            results += [h, output, last, *torch.autograd.grad(loss, (f, x, y, c))]
        yield results
