"""QRNNLayer and QRNN: convolution over time, then the ForgetMult recurrence.

"Quasi-Recurrent Neural Networks", arXiv 1611.01576; as used in "An Analysis of Neural Language
Modeling at Multiple Scales", arXiv 1803.08240, section 3.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from qrnn.definition import valid_steps
from qrnn.forget_mult import pool


class QRNNLayer(nn.Module):
    """One QRNN layer: a linear map of the last `window` inputs, then pooling over time.

    `hidden_size` defaults to `input_size`. `zoneout` is the probability that a unit keeps its last
    state. `save_prev_x` keeps the inputs that the window needs at the next call, detached, until
    `reset()`. `use_cuda=False` uses PyTorch operations on a GPU too, and the attribute `plain` set
    to True the definition. `reverse` walks time from its end, and the window then looks ahead.

    Raises ValueError for a window below 1, a zoneout outside [0, 1), or `save_prev_x` in reverse.
    """

    plain = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int | None = None,
        save_prev_x: bool = False,
        zoneout: float = 0.0,
        window: int = 1,
        output_gate: bool = True,
        use_cuda: bool = True,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        if reverse and save_prev_x:
            raise ValueError("save_prev_x cannot be combined with reverse")
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
        self.reverse = reverse
        self.prevX: Tensor | None = None
        self.linear = nn.Linear(window * input_size, (3 if output_gate else 2) * self.hidden_size)

    def reset(self) -> None:
        """Forget the inputs kept from the last call."""
        self.prevX = None

    def forward(
        self, X: Tensor, hidden: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """From `X` (seq_len, batch, input_size) to the output and the last state.

        `hidden` is (batch, hidden_size), (1, batch, hidden_size) or None for zeros. `lengths`
        (batch,), int64, ends columns early: a column's output is 0 beyond its length, and its last
        state is the state at its last valid step. Returns (seq_len, batch, hidden_size) and
        (1, batch, hidden_size). Raises ValueError if the kept inputs have another batch size, or
        for `save_prev_x` together with `lengths`.
        """
        y, bias = self.project(X, lengths)
        return pool(
            y,
            hidden,
            self.zoneout_factor(y),
            output_gate=self.output_gate,
            reverse=self.reverse,
            lengths=lengths,
            bias=bias,
            use_cuda=self.use_cuda,
            plain=self.plain,
        )

    def project(self, X: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The linear map of the windowed input: Z | F | O, (seq_len, batch, 3 * hidden_size).

        The second result is a bias that is still to be added, or None.
        """
        return self.linear(self.windowed(X, lengths)), None

    def zoneout_factor(self, y: Tensor) -> Tensor | float | None:
        """The forget gate's factor: a new mask in training, a number in evaluation, or None."""
        if not self.zoneout:
            return None
        if not self.training:
            return 1 - self.zoneout
        return y.new_empty(*y.shape[:2], self.hidden_size).bernoulli_(1 - self.zoneout)

    def extra_repr(self) -> str:
        return f"window={self.window}, zoneout={self.zoneout}, output_gate={self.output_gate}"

    def windowed(self, X: Tensor, lengths: Tensor | None) -> Tensor:
        """`[X_t, X_{t-1}, ...]` side by side: (seq_len, batch, window * input_size).

        One product of the concatenation moves fewer bytes than one product for each place in the
        window: every further product would read and write the three times wider result again.
        """
        if self.save_prev_x and lengths is not None:
            raise ValueError("save_prev_x cannot be combined with lengths")
        if lengths is not None:
            # Inputs beyond a column's end count as zeros; the padding may hold anything.
            X = X.masked_fill(valid_steps(lengths, X) == 0, 0.0)
        if self.window == 1:
            return X
        outside = X.new_zeros(self.window - 1, *X.shape[1:])
        if self.reverse:
            padded = torch.cat([X, outside])
            shifts = range(self.window)
        else:
            before = outside if self.prevX is None else self.prevX
            if before.shape[1:] != X.shape[1:]:
                raise ValueError(
                    f"the last call's inputs have the shape {tuple(before.shape[1:])} and these "
                    f"{tuple(X.shape[1:])} (batch, input_size): call reset() in between"
                )
            padded = torch.cat([before, X])
            shifts = range(self.window - 1, -1, -1)
        if self.save_prev_x:
            # A view instead of a copy would keep the full batch in memory.
            self.prevX = padded[X.size(0) :].detach().clone()
        return torch.cat([padded[s : s + X.size(0)] for s in shifts], dim=2)


class QRNN(nn.Module):
    """A stack of QRNN layers with the call of `torch.nn.LSTM`.

    `dropout` acts between layers. `layers` are used instead of new ones; the remaining options go
    to each new QRNNLayer. `bidirectional` adds to each layer a second one that walks time from its
    end, and concatenates their outputs. Each layer takes both directions of the layer below, so
    only with one layer does this equal two one-way stacks. `batch_first` applies to input and
    output, not to the states, as in `torch.nn.LSTM`.

    Raises ValueError if a given layer has another hidden size, or if `layers` or `save_prev_x` is
    given for a bidirectional stack.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        layers: Iterable[QRNNLayer] | None = None,
        *,
        batch_first: bool = False,
        bidirectional: bool = False,
        **layer_options: Any,
    ) -> None:
        super().__init__()
        if layers is None:
            width = hidden_size * (2 if bidirectional else 1)
            sizes = [input_size] + [width] * (num_layers - 1)
            layers = [QRNNLayer(size, hidden_size, **layer_options) for size in sizes]
        elif bidirectional:
            raise ValueError("layers cannot be combined with bidirectional")
        self.layers = nn.ModuleList(layers)
        if any(layer.hidden_size != hidden_size for layer in self.layers):
            raise ValueError(f"every layer must have the hidden_size {hidden_size} of the stack")
        self.layers_reverse = nn.ModuleList(
            QRNNLayer(layer.input_size, hidden_size, **layer_options, reverse=True)
            for layer in (self.layers if bidirectional else ())
        )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = len(self.layers)
        self.dropout = dropout
        self.batch_first = batch_first
        self.bidirectional = bidirectional

    def reset(self) -> None:
        """Forget what every layer kept from the last call."""
        for layer in self.layers:
            layer.reset()

    def forward(
        self,
        input: Tensor | PackedSequence,
        hidden: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """From (seq_len, batch, input_size) to the output and every layer's last state.

        `hidden`, or None for zeros, and the returned state are (num_layers * directions, batch,
        hidden_size), a layer's two directions next to each other. The output is (seq_len, batch,
        directions * hidden_size). For columns of several lengths `input` is a PackedSequence, and
        so is the output, or `lengths` (batch,) is given, as in QRNNLayer. Raises ValueError for
        `lengths` beside a PackedSequence, and for another number of states.
        """
        states = self.num_layers * (2 if self.bidirectional else 1)
        if hidden is not None and len(hidden) != states:
            raise ValueError(f"hidden must have {states} states, not {len(hidden)}")
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths cannot be combined with a PackedSequence")
            padded, on_cpu = pad_packed_sequence(input)
            output, last = self._stack(padded, hidden, on_cpu.to(padded.device))
            order = input.sorted_indices
            if order is not None:
                output, on_cpu = output[:, order], on_cpu[order.cpu()]
            return input._replace(data=pack_padded_sequence(output, on_cpu).data), last
        if self.batch_first:
            input = input.transpose(0, 1)
        output, last = self._stack(input, hidden, lengths)
        return output.transpose(0, 1) if self.batch_first else output, last

    def _stack(
        self, x: Tensor, hidden: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        last_states = []
        for i, layer in enumerate(self.layers):
            outputs = []
            for cell in (layer, self.layers_reverse[i]) if self.bidirectional else (layer,):
                state = None if hidden is None else hidden[len(last_states)]
                output, last = cell(x, state, lengths)
                outputs.append(output)
                last_states.append(last)
            x = torch.cat(outputs, dim=2) if self.bidirectional else outputs[0]
            if i < self.num_layers - 1:
                x = functional.dropout(x, self.dropout, self.training)
        return x, torch.cat(last_states)
