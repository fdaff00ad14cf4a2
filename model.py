"""The network: embedding, a stack of LSTM, GRU or QRNN layers, and the decoder's weights.

"Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182; the QRNN is from "An Analysis
of Neural Language Modeling at Multiple Scales", arXiv 1803.08240.
"""

import ast
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embed_regularize import embedded_dropout
from locked_dropout import LockedDropout
from qrnn import QRNNLayer
from splitcross import SplitCrossEntropyLoss
from weight_drop import WeightDrop

Hidden = list[Any]  # one state a layer: a tree of tensors with the batch in dimension 1


class LSTM(nn.LSTM):
    """PyTorch's LSTM as a cell; its state is the pair (h, c), each (1, batch, n_out)."""

    weight_drop = ("weight_hh_l0",)

    def __init__(self, n_in: int, n_out: int, layer: int) -> None:
        super().__init__(n_in, n_out)

    def initial_state(self, bsz: int) -> tuple[Tensor, Tensor]:
        """Zeros."""
        zeros = self.bias_hh_l0.new_zeros(1, bsz, self.hidden_size)
        return zeros, zeros.clone()


class GRU(nn.GRU):
    """PyTorch's GRU as a cell; its state is one tensor (1, batch, n_out)."""

    weight_drop = ("weight_hh_l0",)
    # At the LSTM's rate of 30 a GRU diverges within a hundred batches (results/gru-rate.md).
    sgd_rate = 5.0

    def __init__(self, n_in: int, n_out: int, layer: int) -> None:
        super().__init__(n_in, n_out)

    def initial_state(self, bsz: int) -> Tensor:
        """Zeros."""
        return self.bias_hh_l0.new_zeros(1, bsz, self.hidden_size)


class QRNN(QRNNLayer):
    """A QRNN layer as a cell, as published: the window is 2 in the first layer, else 1.

    Its state is (1, batch, n_out); in the first layer it is a pair of such a tensor and the last
    input (1, batch, n_in).
    """

    weight_drop = ("linear.weight",)

    def __init__(self, n_in: int, n_out: int, layer: int) -> None:
        super().__init__(n_in, n_out, save_prev_x=True, window=2 if layer == 0 else 1)

    def initial_state(self, bsz: int) -> Any:
        """Zeros."""
        zeros = next(self.parameters()).new_zeros
        last = zeros(1, bsz, self.hidden_size)
        return last if self.window == 1 else (last, zeros(self.window - 1, bsz, self.input_size))

    def forward(self, X: Tensor, state: Any) -> tuple[Tensor, Any]:
        """As QRNNLayer, but the state holds the earlier inputs that the window needs."""
        if self.window == 1:
            return super().forward(X, state)
        last, self.prevX = state
        output, last = super().forward(X, last)
        state, self.prevX = (last, self.prevX), None
        return output, state


# The names that --model takes.
CELLS = {
    "LSTM": LSTM,
    "QRNN": QRNN,
    "GRU": GRU,
}  # fmt: skip


def find_cell(name: str) -> tuple[Any, dict[str, Any]]:
    """The class of a cell, and its options: "NAME:rounds=4,gain=0.5" has two.

    `CELL(n_in, n_out, layer, **options)`, with layers counted from 0, makes a module whose
    forward(x, state) takes x (seq_len, batch, n_in) and returns the output (seq_len, batch, n_out)
    and the new state. Its initial_state(bsz) is the state at the start of a text, which gets no
    gradient. A state is a tensor, or tuples, lists or dictionaries of tensors, all with the batch
    in dimension 1. The class attribute `weight_drop` names the weights that --wdrop acts on; the
    optional `sgd_rate` is the default of --lr for SGD. Raises ValueError for an unknown name or
    option.
    """
    kind, colon, given = name.partition(":")
    if kind not in CELLS:
        raise ValueError(f"the cell must be one of {', '.join(CELLS)}, not {kind!r}")
    options = dict(map(_option, given.split(","))) if colon else {}
    try:
        inspect.signature(CELLS[kind]).bind(1, 1, 0, **options)
    except TypeError as error:
        raise ValueError(f"the cell {kind}: {error}") from error
    return CELLS[kind], options


def _option(text: str) -> tuple[str, Any]:
    """The name and the value of "rounds=4"; a value that is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"an option of a cell is written NAME=VALUE, not {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return name, value


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


class RNNModel(nn.Module):
    """A recurrent language model whose decoder is applied by the criterion.

    Each layer is a single-layer cell, so that its output gets its own dropout mask. The layers'
    sizes are `ninp -> nhid -> ... -> nhid -> (ninp if tie_weights else nhid)`.
    `dropout` acts on the last layer's output, `dropouth` between layers, `dropouti` on the embedded
    input, `dropoute` on whole words, `wdrop` on the recurrent weights.

    `rnn_type` is the name of a cell, with its options: see `find_cell`. Raises ValueError for an
    unknown one.
    """

    def __init__(
        self,
        rnn_type: str,
        ntoken: int,
        ninp: int,
        nhid: int,
        nlayers: int,
        dropout: float = 0.5,
        dropouth: float = 0.5,
        dropouti: float = 0.5,
        dropoute: float = 0.1,
        wdrop: float = 0.0,
        tie_weights: bool = False,
    ) -> None:
        super().__init__()
        cell_type, options = find_cell(rnn_type)
        self.rnn_type = rnn_type
        self.ntoken = ntoken
        self.ninp = ninp
        self.nhid = nhid
        self.nlayers = nlayers
        self.dropout = dropout
        self.dropouth = dropouth
        self.dropouti = dropouti
        self.dropoute = dropoute
        self.wdrop = wdrop
        self.tie_weights = tie_weights

        sizes = [ninp] + [nhid] * (nlayers - 1) + [ninp if tie_weights else nhid]
        self.lockdrop = LockedDropout()
        self.encoder = nn.Embedding(ntoken, ninp)
        cells = (cell_type(*sizes[i : i + 2], i, **options) for i in range(nlayers))
        self.rnns = nn.ModuleList(drop_weights(cell, cell.weight_drop, wdrop) for cell in cells)
        if tie_weights:
            self.decoder = nn.Linear(1, ntoken)
            self.decoder.in_features = ninp
            self.decoder.weight = self.encoder.weight
            # The original first draws a decoder weight (ntoken, nhid), and then ties it. One column
            # is drawn above, the others here, so that a seed gives the original's initial weights.
            _draw((nhid - 1) * ntoken)
        else:
            self.decoder = nn.Linear(nhid, ntoken)
        self.init_weights()

    def init_weights(self) -> None:
        """Embedding and decoder uniform in [-0.1, 0.1], bias 0; the cells as PyTorch makes them."""
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        # A tied weight is drawn twice, as in the original: a seed gives the same numbers.
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def init_hidden(self, bsz: int) -> Hidden:
        """The cells' initial states for `bsz` columns, one a layer."""
        cells = (rnn.module if isinstance(rnn, WeightDrop) else rnn for rnn in self.rnns)
        return [cell.initial_state(bsz) for cell in cells]

    def reset(self) -> None:
        """Do nothing: the hidden state holds everything carried from batch to batch.

        The original keeps the QRNN's last inputs outside the state and clears them here.
        """

    def forward(self, input: Tensor, hidden: Hidden, return_h: bool = False) -> tuple[Any, ...]:
        """From word ids `input` (seq_len, batch) and `hidden` to the last layer's dropped output.

        Returns the output (seq_len * batch, size of the last layer) and the new hidden state; with
        `return_h` also every layer's raw and dropped outputs, two lists of (seq_len, batch, size).
        The decoder is not applied: the criterion applies it.
        """
        dropoute = self.dropoute if self.training else 0.0
        output = self.lockdrop(embedded_dropout(self.encoder, input, dropoute), self.dropouti)
        new_hidden, raw_outputs, outputs = [], [], []
        for i, rnn in enumerate(self.rnns):
            output, state = rnn(output, hidden[i])
            new_hidden.append(state)
            raw_outputs.append(output)
            last = i == self.nlayers - 1
            output = self.lockdrop(output, self.dropout if last else self.dropouth)
            outputs.append(output)
        result = output.flatten(0, 1)
        if return_h:
            return result, new_hidden, raw_outputs, outputs
        return result, new_hidden


def make_network(splits: Sequence[int], **options: Any) -> tuple[RNNModel, SplitCrossEntropyLoss]:
    """A new model, RNNModel(**options), and its criterion, cut at the word ids `splits`.

    main.py makes a new run's network here, and every stage that of a model file. The file records
    all arguments.
    """
    model = RNNModel(**options)
    return model, SplitCrossEntropyLoss(model.decoder.in_features, splits)


def _draw(count: int) -> None:
    """Draw and discard `count` uniform numbers, in blocks: there may be hundreds of millions."""
    size = 2**20
    block = torch.empty(min(count, size))
    for start in range(0, count, size):
        block[: count - start].uniform_()
