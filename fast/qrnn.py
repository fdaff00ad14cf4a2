"""The cell QRNN whose kernel adds the linear map's bias: the product needs no extra pass."""

from collections.abc import Iterator

from torch import Tensor

from fast.linear import FastLinear
from model import QRNN
from qrnn import kernels
from qrnn.check import cell_results
from qrnn.forget_mult import way_for


class FastQRNN(QRNN):
    """The cell QRNN on a GPU with CuPy."""

    def project(self, X: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        # A WeightDrop wraps the linear map.
        linear = getattr(self.linear, "module", self.linear)
        if not isinstance(linear, FastLinear) or way_for(X, self.use_cuda) is not kernels:
            return super().project(X, lengths)
        return self.linear(self.windowed(X, lengths), with_bias=False), linear.bias


def compare(like: Tensor) -> Iterator[list[Tensor]]:
    """Outputs, states and gradients of FastQRNN, then of QRNN."""
    for kind in (FastQRNN, QRNN):
        cell = kind(8, 16, 0).to(like)
        if kind is FastQRNN:
            cell.linear.__class__ = FastLinear
        yield cell_results(cell, like)
