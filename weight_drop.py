"""DropConnect on named weights of a module, such as the recurrent matrix of an LSTM.

"Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182, section 2.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels import aligned, cudnn


class WeightDrop(nn.Module):
    """Run `module` with entries of the named weights dropped afresh at every training call.

    The trained parameter gets the suffix `_raw`. The old name holds a plain tensor computed from
    it, never a Parameter: gradients reach the raw weight, and a call does not change the names in
    the state dict. With `variational=True` whole rows are dropped. Nothing is dropped in
    evaluation. Kept entries are scaled by 1 / (1 - dropout).

    Raises AttributeError if `module` has no parameter of a given name.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Iterable[str],
        dropout: float = 0.0,
        variational: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.weights = list(weights)
        self.dropout = dropout
        self.variational = variational
        for name in self.weights:
            raw = getattr(module, name)
            delattr(module, name)
            # The same Parameter object gets the new name: an optimiser that holds it still works.
            module.register_parameter(f"{name}_raw", raw)
        self._expose_raw()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Drop weights, then call the module with the same arguments."""
        for name in self.weights:
            # On an nn.LSTM or nn.GRU this assignment also updates the list of flat weights that its
            # forward reads.
            setattr(self.module, name, self._dropped(getattr(self.module, f"{name}_raw")))
        if args and not kwargs and cudnn.suits(self.module, args[0]):
            return cudnn.run_from_one_buffer(self.module, *args)
        return self.module(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"weights={self.weights}, dropout={self.dropout}, variational={self.variational}"

    def _dropped(self, raw: Tensor) -> Tensor:
        if not self.training or not self.dropout:
            # A view, because assigning the Parameter itself would register it a second time.
            return raw.view_as(raw)
        if self.variational:
            return raw * functional.dropout(raw.new_ones(raw.size(0), 1), self.dropout)
        if isinstance(self.module, aligned.Linear) and aligned.suits(raw):
            return aligned.dropout(raw, self.dropout)
        if raw.device.type == "cpu":
            return raw * _mask(raw, self.dropout)
        return functional.dropout(raw, self.dropout)

    def _expose_raw(self) -> None:
        """Put a plain view of the raw weight under the old name, as in evaluation."""
        with torch.no_grad():
            for name in self.weights:
                raw = getattr(self.module, f"{name}_raw")
                setattr(self.module, name, raw.view_as(raw))

    def _apply(self, fn: Any, recurse: bool = True) -> "WeightDrop":
        # Moving to another device or dtype would leave the last call's tensor behind.
        super()._apply(fn, recurse)
        self._expose_raw()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The last call's tensor belongs to an autograd graph: it can be neither copied nor pickled.
        self._expose_raw()
        return self.__dict__.copy()


def drop_weights(cell: nn.Module, weights: Iterable[str], dropout: float) -> nn.Module:
    """`cell` with weight drop on the named weights; without `dropout`, `cell` itself.

    For a weight of a submodule, such as `linear.weight`, that submodule is wrapped, even without
    `dropout`, so that a QRNN's weights have the original's names.
    """
    own = []
    for name in weights:
        part, _, weight = name.rpartition(".")
        if part:
            setattr(cell, part, WeightDrop(getattr(cell, part), [weight], dropout))
        else:
            own.append(name)
    return WeightDrop(cell, own, dropout) if own and dropout else cell


def _mask(like: Tensor, dropout: float) -> Tensor:
    """A dropout mask of the shape of `like`, on the CPU: 0, or 1 / (1 - dropout).

    PyTorch draws 64 random bits for each entry, one by one, which for a large matrix takes longer
    than most operations on it; here two entries share 64 bits.
    """
    bits = torch.empty((like.numel() + 1) // 2, dtype=torch.int64).random_(-(2**63), None)
    words = bits.view(torch.int32)[: like.numel()].view(like.shape)
    below = min(round((1 - dropout) * 2**32) - 2**31, 2**31 - 1)
    mask = torch.empty_like(like, requires_grad=False, memory_format=torch.contiguous_format)
    return torch.lt(words, below, out=mask).div_(1 - dropout)
