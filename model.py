"""The network: embedding, a stack of LSTM, GRU or QRNN layers, and the decoder's weights.

"Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182; the QRNN is from "An Analysis
of Neural Language Modeling at Multiple Scales", arXiv 1803.08240.
"""

from typing import Any

import torch
from torch import Tensor, nn

from embed_regularize import embedded_dropout
from locked_dropout import LockedDropout
from qrnn import QRNNLayer
from weight_drop import WeightDrop

RNN_TYPES = ("LSTM", "QRNN", "GRU")

Hidden = list[Any]  # one state a layer: (h, c) for the LSTM, one tensor otherwise


class RNNModel(nn.Module):
    """A recurrent language model whose decoder is applied by the criterion.

    One single-layer cell per layer, so that each layer's output gets its own dropout mask. The
    layers' sizes are `ninp -> nhid -> ... -> nhid -> (ninp if tie_weights else nhid)`.
    `dropout` acts on the last layer's output, `dropouth` between layers, `dropouti` on the embedded
    input, `dropoute` on whole words, `wdrop` on the recurrent weights.

    Raises ValueError for an unknown `rnn_type`.
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
        if rnn_type not in RNN_TYPES:
            raise ValueError(f"rnn_type must be one of {', '.join(RNN_TYPES)}, not {rnn_type!r}")
        self.rnn_type = rnn_type
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
        self.layer_sizes = sizes[1:]
        self.lockdrop = LockedDropout()
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnns = nn.ModuleList(
            self._make_layer(i, sizes[i], sizes[i + 1]) for i in range(nlayers)
        )
        if tie_weights:
            self.decoder = nn.Linear(1, ntoken)
            self.decoder.in_features = ninp
            self.decoder.weight = self.encoder.weight
            # The original makes a weight (ntoken, nhid) here before it ties it away: one column has
            # been drawn above. With the others, a seed gives the initial weights it gave there.
            _draw((nhid - 1) * ntoken, self.encoder.weight.device)
        else:
            self.decoder = nn.Linear(nhid, ntoken)
        self.init_weights()

    def _make_layer(self, number: int, n_in: int, n_out: int) -> nn.Module:
        if self.rnn_type == "QRNN":
            layer = QRNNLayer(n_in, n_out, save_prev_x=True, window=2 if number == 0 else 1)
            # Wrapped also when nothing is dropped: the original's names of the weights.
            layer.linear = WeightDrop(layer.linear, ["weight"], self.wdrop)
            return layer
        layer = (nn.LSTM if self.rnn_type == "LSTM" else nn.GRU)(n_in, n_out)
        return WeightDrop(layer, ["weight_hh_l0"], self.wdrop) if self.wdrop else layer

    def init_weights(self) -> None:
        """Embedding and decoder uniform in [-0.1, 0.1], bias 0; the cells keep PyTorch's own."""
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        # Also when it is tied, and so drawn a second time: as in the original, seed for seed.
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def init_hidden(self, bsz: int) -> Hidden:
        """Zero states, one a layer: a pair of (1, bsz, size) for the LSTM, else one such tensor."""
        weight = self.encoder.weight
        zeros = [weight.new_zeros(1, bsz, size) for size in self.layer_sizes]
        if self.rnn_type == "LSTM":
            return [(z, z.clone()) for z in zeros]
        return zeros

    def reset(self) -> None:
        """Forget what the QRNN keeps from batch to batch beside its hidden state."""
        if self.rnn_type == "QRNN":
            for layer in self.rnns:
                layer.reset()

    def forward(self, input: Tensor, hidden: Hidden, return_h: bool = False) -> tuple[Any, ...]:
        """From word ids `input` (seq_len, batch) and `hidden` to the last layer's dropped output.

        Returns the output (seq_len * batch, size of the last layer) and the new hidden state; with
        `return_h` also every layer's raw and dropped outputs, two lists of (seq_len, batch, size).
        The decoder is not applied: that is the criterion's part.
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


def _draw(count: int, device: torch.device) -> None:
    """Draw `count` uniform numbers and forget them, in blocks: they may be hundreds of millions."""
    if device.type == "meta":
        return
    size = 2**20
    block = torch.empty(min(count, size), device=device)
    for start in range(0, count, size):
        block[: count - start].uniform_()
