"""model.py: shapes, names of the weights, dropouts, and the computation of each cell."""

import pytest
import torch

from checkpoint.model_file import tensors_of
from model import CELLS, GRU, RNNModel
from utils import map_state

ENDS = ["encoder.weight", "decoder.weight", "decoder.bias"]
GATED = ["weight_ih_l0", "bias_ih_l0", "bias_hh_l0"]
KEYS = {
    ("LSTM", 0.5): [*ENDS, *(f"rnns.0.module.{w}" for w in [*GATED, "weight_hh_l0_raw"])],
    ("LSTM", 0.0): [*ENDS, *(f"rnns.0.{w}" for w in [*GATED, "weight_hh_l0"])],
    ("QRNN", 0.5): [*ENDS, "rnns.0.linear.module.bias", "rnns.0.linear.module.weight_raw"],
}
KEYS["GRU", 0.5] = KEYS["LSTM", 0.5]
KEYS["GRU", 0.0] = KEYS["LSTM", 0.0]
KEYS["QRNN", 0.0] = KEYS["QRNN", 0.5]


def make(rnn_type="LSTM", nlayers=3, tie=True, **options):
    torch.manual_seed(0)
    rates = dict.fromkeys(("dropout", "dropouth", "dropouti", "dropoute", "wdrop"), 0.0)
    return RNNModel(rnn_type, 50, 8, 12, nlayers, **{**rates, **options}, tie_weights=tie)


@pytest.mark.parametrize(("rnn_type", "wdrop"), KEYS)
def test_state_dict_names_before_and_after_calls(rnn_type, wdrop):
    model = make(rnn_type, 1, wdrop=wdrop)
    words = torch.randint(50, (5, 2))
    for mode in (True, False, True):
        assert sorted(model.state_dict()) == sorted(KEYS[rnn_type, wdrop])
        model.train(mode)
        model(words, model.init_hidden(2))
    assert sorted(model.state_dict()) == sorted(KEYS[rnn_type, wdrop])


class Scaled(GRU):
    """A GRU that keeps its options."""

    def __init__(self, n_in, n_out, layer, gain=1.0, kind="plain"):
        super().__init__(n_in, n_out, layer)
        self.set = (layer, gain, kind)


def test_the_options_of_a_cell_follow_its_name(monkeypatch):
    monkeypatch.setitem(CELLS, "SCALED", Scaled)
    model = make("SCALED:kind=odd,gain=3", nlayers=2)
    assert [cell.set for cell in model.rnns] == [(0, 3, "odd"), (1, 3, "odd")]
    assert make("SCALED").rnns[0].set == (0, 1.0, "plain")
    for name, message in {
        "SCALED:scale=2": "the cell SCALED: got an unexpected keyword argument 'scale'",
        "SCALED:n_in=2": "the cell SCALED: multiple values for argument 'n_in'",
        "SCALED:gain": "an option of a cell is written NAME=VALUE, not 'gain'",
        "scaled": "the cell must be one of .*, SCALED, not 'scaled'",
    }.items():
        with pytest.raises(ValueError, match=message):
            make(name)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("rnn_type", CELLS)
def test_shapes(rnn_type, tie):
    # The original's untied GRU crashes.
    model = make(rnn_type, tie=tie, wdrop=0.5)
    words = torch.randint(50, (7, 4))
    last = 8 if tie else 12
    output, hidden, raw, dropped = model(words, model.init_hidden(4), return_h=True)
    assert output.shape == (28, last)
    assert [tuple(r.shape) for r in raw] == [(7, 4, 12), (7, 4, 12), (7, 4, last)]
    assert [d.shape for d in dropped] == [r.shape for r in raw]
    assert model.decoder.weight.shape == (50, last)
    assert (model.decoder.weight is model.encoder.weight) == tie
    short, hidden2 = model(words, hidden)
    assert short.shape == (28, last)
    assert len(hidden2) == 3
    # A state keeps its form, with the batch in dimension 1.
    shapes = [map_state(lambda part: part.shape, state) for state in (hidden, hidden2)]
    assert shapes == [map_state(lambda part: part.shape, model.init_hidden(4))] * 2
    assert all(part.shape[1] == 4 for part in tensors_of([hidden, hidden2]))


@pytest.mark.parametrize("rnn_type", CELLS)
def test_two_halves_with_carried_state_equal_the_whole(rnn_type):
    model = make(rnn_type, wdrop=0.5).eval()
    words = torch.randint(50, (12, 3))
    whole, _ = model(words, model.init_hidden(3))
    hidden = model.init_hidden(3)
    parts = []
    for chunk in words.split([5, 1, 6]):
        output, hidden = model(chunk, hidden)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rnn_type", CELLS)
def test_no_word_sees_the_future(rnn_type):
    model = make(rnn_type).eval()
    words = torch.randint(50, (9, 2))
    other = words.clone()
    other[6:] = (other[6:] + 1) % 50
    first, _ = model(words, model.init_hidden(2))
    second, _ = model(other, model.init_hidden(2))
    first, second = first.view(9, 2, -1), second.view(9, 2, -1)
    assert torch.equal(first[:6], second[:6])
    assert not torch.equal(first[6], second[6])


def test_each_dropout_acts_where_it_should():
    words = torch.randint(50, (30, 8))

    def zeros(tensor):
        return (tensor == 0).float().mean().item()

    def outputs(**options):
        model = make(wdrop=0.0, **options)
        seen = []
        model.rnns[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        output, _, raw, dropped = model(words, model.init_hidden(8), return_h=True)
        return seen[0], output, raw, dropped

    entered, output, raw, dropped = outputs(dropouti=0.5)
    assert 0.3 < zeros(entered) < 0.7
    assert zeros(output) == 0
    entered, output, raw, dropped = outputs(dropouth=0.5)
    assert zeros(entered) == 0
    assert all(0.3 < zeros(d) < 0.7 for d in dropped[:-1])
    assert zeros(dropped[-1]) == 0
    assert all(zeros(r) == 0 for r in raw)
    entered, output, raw, dropped = outputs(dropout=0.5)
    assert all(zeros(d) == 0 for d in dropped[:-1])
    assert 0.3 < zeros(dropped[-1]) < 0.7
    assert torch.equal(output, dropped[-1].flatten(0, 1))
    entered, *_ = outputs(dropoute=0.5)
    lost = (entered == 0).all(dim=2)
    assert 0.3 < lost.float().mean() < 0.7


@pytest.mark.parametrize("rnn_type", CELLS)
def test_evaluation_drops_nothing(rnn_type):
    rates = dict.fromkeys(("dropout", "dropouth", "dropouti", "dropoute", "wdrop"), 0.5)
    model = make(rnn_type, **rates).eval()
    words = torch.randint(50, (6, 2))
    outputs = []
    for _ in range(2):
        outputs.append(model(words, model.init_hidden(2))[0])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("rnn_type", CELLS)
def test_every_parameter_gets_a_gradient(rnn_type):
    model = make(rnn_type, wdrop=0.5)
    output, _ = model(torch.randint(50, (6, 2)), model.init_hidden(2))
    (output @ model.decoder.weight.t() + model.decoder.bias).pow(2).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_qrnn_layers_as_published():
    model = make("QRNN", 4, wdrop=0.1)
    assert [layer.window for layer in model.rnns] == [2, 1, 1, 1]
    assert all(layer.output_gate and not layer.zoneout for layer in model.rnns)
    assert model.rnns[0].linear.module.weight_raw.shape == (36, 16)
    assert model.rnns[3].linear.module.weight_raw.shape == (24, 12)


@pytest.mark.parametrize("tie", [True, False])
def test_a_seed_gives_the_initial_weights_it_gave_in_the_original(tie):
    # The original draws the embedding, the cells and the decoder, then ties the decoder to the
    # embedding, and draws both weights once more.
    last = 8 if tie else 12
    torch.manual_seed(5)
    torch.nn.Embedding(50, 8)
    cells = [torch.nn.LSTM(8, 12), torch.nn.LSTM(12, last)]
    torch.nn.Linear(12, 50)
    encoder, decoder = (torch.empty(50, size).uniform_(-0.1, 0.1) for size in (8, last))
    torch.manual_seed(5)
    model = RNNModel("LSTM", 50, 8, 12, 2, tie_weights=tie)
    assert torch.equal(model.encoder.weight, decoder if tie else encoder)
    assert torch.equal(model.decoder.weight, decoder)
    assert not model.decoder.bias.any()
    for cell, ours in zip(cells, model.rnns, strict=True):
        for name, value in cell.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
