"""QRNNLayer and QRNN: convolution over time, then the ForgetMult recurrence.

"Quasi-Recurrent Neural Networks", arXiv 1611.01576; as used in "An Analysis of Neural Language
Modeling at Multiple Scales", arXiv 1803.08240, section 3.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qrnn.forget_mult import qrnn_pool


class QRNNLayer(nn.Module):
    """One QRNN layer: a linear map of the last `window` inputs, then pooling over time.

    `hidden_size` defaults to `input_size`. `zoneout` is the probability that a unit keeps its last
    state. `save_prev_x` keeps the inputs that the window needs from one call to the next, detached,
    until `reset()`. `use_cuda=False` keeps to PyTorch operations also on a GPU.

    Raises ValueError for a window below 1 or a zoneout outside [0, 1).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int | None = None,
        save_prev_x: bool = False,
        zoneout: float = 0.0,
        window: int = 1,
        output_gate: bool = True,
        use_cuda: bool = True,
    ) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be 1 or more, not {window}")
        if not 0 <= zoneout < 1:
            raise ValueError(f"zoneout must be in [0, 1), not {zoneout}")
        self.input_size = input_size
        self.hidden_size = hidden_size or input_size
        self.save_prev_x = save_prev_x
        self.zoneout = zoneout
        self.window = window
        self.output_gate = output_gate
        self.use_cuda = use_cuda
        self.prevX: Tensor | None = None
        self.linear = nn.Linear(window * input_size, (3 if output_gate else 2) * self.hidden_size)

    def reset(self) -> None:
        """Forget the inputs kept from the last call."""
        self.prevX = None

    def forward(self, X: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From `X` (seq_len, batch, input_size) to the output and the last state.

        `hidden` is (batch, hidden_size), (1, batch, hidden_size) or None for zeros. Returns
        (seq_len, batch, hidden_size) and (1, batch, hidden_size). Raises ValueError if the kept
        inputs are of another batch size.
        """
        y = self.linear(self._windowed(X))
        return qrnn_pool(y, hidden, self._zoneout_factor(y), self.output_gate)

    def extra_repr(self) -> str:
        return f"window={self.window}, zoneout={self.zoneout}, output_gate={self.output_gate}"

    def _windowed(self, X: Tensor) -> Tensor:
        """`[X_t, X_{t-1}, ...]` side by side: (seq_len, batch, window * input_size)."""
        if self.window == 1:
            return X
        before = self.prevX
        if before is None:
            before = X.new_zeros(self.window - 1, *X.shape[1:])
        elif before.shape[1:] != X.shape[1:]:
            raise ValueError(
                f"the inputs kept from the last call have the shape {tuple(before.shape[1:])} and "
                f"these {tuple(X.shape[1:])} (batch, input_size): call reset() in between"
            )
        padded = torch.cat([before, X])
        if self.save_prev_x:
            # A copy: a view would keep the whole batch in memory.
            self.prevX = padded[len(X) :].detach().clone()
        shifts = range(self.window - 1, -1, -1)
        return torch.cat([padded[s : s + len(X)] for s in shifts], dim=2)

    def _zoneout_factor(self, y: Tensor) -> Tensor | float | None:
        if not self.zoneout:
            return None
        if not self.training:
            return 1 - self.zoneout
        size = (*y.shape[:2], self.hidden_size)
        return torch.empty(size, dtype=y.dtype, device=y.device).bernoulli_(1 - self.zoneout)


class QRNN(nn.Module):
    """A stack of QRNN layers with the call of `torch.nn.LSTM`.

    `dropout` acts between layers. `layers` replaces the layers that would be made; the remaining
    options go to each QRNNLayer. Raises ValueError if a given layer has another hidden size.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        layers: Iterable[QRNNLayer] | None = None,
        **layer_options: Any,
    ) -> None:
        super().__init__()
        if layers is None:
            sizes = [input_size] + [hidden_size] * num_layers
            layers = [QRNNLayer(n_in, n_out, **layer_options) for n_in, n_out in pairwise(sizes)]
        self.layers = nn.ModuleList(layers)
        if any(layer.hidden_size != hidden_size for layer in self.layers):
            raise ValueError(f"every layer must have the hidden_size {hidden_size} of the stack")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = len(self.layers)
        self.dropout = dropout

    def reset(self) -> None:
        """Forget what every layer kept from the last call."""
        for layer in self.layers:
            layer.reset()

    def forward(self, input: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From (seq_len, batch, input_size) to the output and every layer's last state.

        `hidden` is (num_layers, batch, hidden_size) or None for zeros; so is the state returned.
        """
        last_states = []
        for i, layer in enumerate(self.layers):
            input, last = layer(input, None if hidden is None else hidden[i])
            last_states.append(last)
            if i < self.num_layers - 1:
                input = functional.dropout(input, self.dropout, self.training)
        return input, torch.cat(last_states)
