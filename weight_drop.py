"""DropConnect on named weights of a module, such as the recurrent matrix of an LSTM.

"Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182, section 2.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


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
            setattr(self.module, name, self.drop(getattr(self.module, f"{name}_raw")))
        return self.module(*args, **kwargs)

    def drop(self, raw: Tensor) -> Tensor:
        """The weight of this call, from the raw weight (rows, columns)."""
        if not self.training or not self.dropout:
            # A view, because assigning the Parameter itself would register it a second time.
            return raw.view_as(raw)
        if self.variational:
            return raw * functional.dropout(raw.new_ones(raw.size(0), 1), self.dropout)
        return functional.dropout(raw, self.dropout)

    def extra_repr(self) -> str:
        return f"weights={self.weights}, dropout={self.dropout}, variational={self.variational}"

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
