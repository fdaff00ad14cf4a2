"""tools/import_original.py: weights named as in the original, and refused files."""

import functools
import json

import pytest
import torch
from conftest import ORIGINAL_CELLS

import checkpoint
from data import Corpus
from model import RNNModel


@pytest.fixture
def importer(script):
    return functools.partial(script, "tools.import_original")


def export(path, corpus_dir, rnn_type="LSTM", wdrop=0.5, tie=True, nlayers=3):
    words = len(Corpus(corpus_dir).dictionary)
    torch.manual_seed(0)
    model = RNNModel(rnn_type, words, 5, 7, nlayers, wdrop=wdrop, tie_weights=tie)
    torch.save(model.state_dict(), path)
    return model


@pytest.mark.parametrize("nlayers", [1, 3])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("wdrop", [0.0, 0.5])
@pytest.mark.parametrize("rnn_type", ORIGINAL_CELLS)
def test_the_model_is_the_one_exported(
    rnn_type, wdrop, tie, nlayers, importer, corpus_dir, tmp_path
):
    before = export(tmp_path / "exported", corpus_dir, rnn_type, wdrop, tie, nlayers)
    argv = [tmp_path / "exported", "--data", corpus_dir, "--save", tmp_path / "m.pt"]
    status, out, err = importer(*argv)
    assert (status, err) == (0, "")
    assert f"{rnn_type}, {nlayers} layers" in out
    loaded = checkpoint.load(tmp_path / "m.pt")
    after, _ = checkpoint.rebuild(loaded, torch.device("cpu"))
    assert (after.decoder.weight is after.encoder.weight) == tie
    words = torch.arange(12).view(6, 2)
    results = []
    for model in (before, after):
        model.eval()
        model.reset()
        with torch.no_grad():
            results.append(model.decoder(model(words, model.init_hidden(2))[0]))
    assert torch.equal(*results)
    assert loaded.dictionary.idx2word == Corpus(corpus_dir).dictionary.idx2word


def test_the_split_of_a_corpus_in_one_file_is_recorded(importer, corpus_dir, tmp_path):
    export(tmp_path / "exported", corpus_dir)
    (tmp_path / "train.txt").write_bytes((corpus_dir / "train.txt").read_bytes())
    argv = [tmp_path / "exported", "--data", tmp_path, "--split", 0.1, 0.2]
    assert importer(*argv, "--save", tmp_path / "m.pt")[0] == 0
    assert checkpoint.load(tmp_path / "m.pt").args == {"split": [0.1, 0.2]}


class WordLanguageModel(torch.nn.Module):
    """The form of pytorch/examples' model, as a reference."""

    def __init__(self, rnn_type, ntoken, ninp, nhid, nlayers, tied):
        super().__init__()
        self.encoder = torch.nn.Embedding(ntoken, ninp)
        self.rnn = getattr(torch.nn, rnn_type)(ninp, nhid, nlayers)
        self.decoder = torch.nn.Linear(nhid, ntoken)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, words):
        return self.decoder(self.rnn(self.encoder(words))[0]).log_softmax(2)


@pytest.mark.parametrize(("tied", "nhid", "nlayers"), [(True, 6, 2), (False, 9, 1), (False, 4, 3)])
@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU"])
def test_word_language_model(rnn_type, tied, nhid, nlayers, importer, script, corpus_dir, tmp_path):
    words = [word for word in Corpus(corpus_dir).dictionary.idx2word if word != "w7"]
    # A byte order mark is no part of a word.
    (tmp_path / "words").write_text("\n".join(["<unk>", *words]) + "\n", encoding="utf-8-sig")
    torch.manual_seed(0)
    model = WordLanguageModel(rnn_type, 61, 6, nhid, nlayers, tied).eval()
    torch.save(model.state_dict(), tmp_path / "exported")
    argv = [tmp_path / "exported", "--vocab", tmp_path / "words", "--save", tmp_path / "m.pt"]
    for _ in range(2):
        status, out, err = importer(*argv)
        assert (status, err) == (0, "")
    assert f"{rnn_type}, {nlayers} layers, emsize 6, nhid {nhid}, 61 words" in out
    # The file that was there is kept.
    assert checkpoint.load(tmp_path / "m.pt.previous").config["rnn_type"] == rnn_type
    text = "w1 w3 w7 w9"
    argv = ["--checkpoint", tmp_path / "m.pt", "--no-cuda", "--json", "--tokens", "--text", text]
    found = [json.loads(line) for line in script("score", *argv)[1].splitlines()][:-1]
    ids = [words.index(word) + 1 for word in "<eos> w1 w3 <unk> w9 <eos>".split() if word in words]
    ids.insert(3, 0)
    with torch.no_grad():
        expected = model(torch.tensor(ids[:-1]).unsqueeze(1)).squeeze(1)
    for token, row, word in zip(found, expected, ids[1:], strict=True):
        assert token["logprob"] == pytest.approx(row[word].item(), abs=1e-6)


def test_fastai_s_names(importer, corpus_dir, tmp_path):
    model = export(tmp_path / "exported", corpus_dir)
    names = {}
    for name, tensor in model.state_dict().items():
        part = "1" if name.startswith("decoder") else "0"
        names[f"{part}.{name.replace('module.weight_hh_l0_raw', 'weight_hh_l0_raw')}"] = tensor
        if name.endswith("_raw"):
            names[f"0.{name.removesuffix('_raw')}"] = tensor * 0
    names["0.encoder_dp.emb.weight"] = model.encoder.weight
    # Those of fastai 2.8.12; fastai 1 also stores a copy of each raw weight.
    parts = "weight_hh_l0_raw module.weight_ih_l0 module.bias_ih_l0 module.bias_hh_l0".split()
    expected = {f"0.rnns.{layer}.{part}" for layer in range(3) for part in parts}
    expected |= {"0.encoder.weight", "0.encoder_dp.emb.weight", "1.decoder.weight"}
    copies = {f"0.rnns.{layer}.module.weight_hh_l0" for layer in range(3)}
    assert names.keys() == expected | copies | {"1.decoder.bias"}
    # As docs/coming-from.md says.
    left_out = ("encoder_dp", "module.weight_hh")
    state = {k.split(".", 1)[1]: t for k, t in names.items() if not any(x in k for x in left_out)}
    torch.save(state, tmp_path / "fastai")
    for name in ("exported", "fastai"):
        argv = [tmp_path / name, "--data", corpus_dir, "--save", tmp_path / f"{name}.pt"]
        assert importer(*argv)[0] == 0
    first, second = (checkpoint.load(tmp_path / f"{n}.pt").model for n in ("exported", "fastai"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_later_stages_take_it(importer, script, corpus_dir, tmp_path):
    export(tmp_path / "exported", corpus_dir)
    path = tmp_path / "m.pt"
    assert importer(tmp_path / "exported", "--data", corpus_dir, "--save", path)[0] == 0
    flags = ["--data", corpus_dir, "--save", path, "--max-batches", 2]
    assert script("finetune", *flags, "--batch_size", 4, "--bptt", 9, "--epochs", 1)[0] == 0
    assert script("pointer", *flags, "--bptt", 9)[0] == 0


def test_a_split_softmax_comes_with_its_criterion(importer, corpus_dir, tmp_path):
    export(tmp_path / "exported", corpus_dir)
    both = {"model": torch.load(tmp_path / "exported"), "criterion": {}}
    torch.save(both, tmp_path / "both")
    assert importer(tmp_path / "both", "--data", corpus_dir, "--save", tmp_path / "m.pt")[0] == 0
    # The file may also hold the masked copy of the weight, which is ignored.
    both["model"]["rnns.0.module.weight_hh_l0"] = torch.zeros(28, 7)
    torch.save(both["model"], tmp_path / "copied")
    assert importer(tmp_path / "copied", "--data", corpus_dir, "--save", tmp_path / "c.pt")[0] == 0
    raw = checkpoint.load(tmp_path / "c.pt").model["rnns.0.module.weight_hh_l0_raw"]
    assert torch.equal(raw, both["model"]["rnns.0.module.weight_hh_l0_raw"])


# The state dict of a model, and what is saved in its place.
REFUSED = {
    "objects": lambda state: [torch.nn.Linear(2, 2), None, None],
    "names": lambda state: {name: t for name, t in state.items() if "rnns.1" not in name},
    "words": lambda state: {
        name: t[:9] if name in ("encoder.weight", "decoder.weight") else t
        for name, t in state.items()
    },
    "nan": lambda state: {**state, "decoder.bias": state["decoder.bias"] * torch.nan},
    "list": lambda state: [1, 2],
    "twice": lambda state: state,
    "both": lambda state: state,
}


@pytest.mark.parametrize("case", [*REFUSED, "missing", "flipped", "old"])
def test_what_is_refused(case, importer, corpus_dir, tmp_path):
    path = tmp_path / "exported"
    model = export(path, corpus_dir)
    if case in REFUSED:
        torch.save(REFUSED[case](model.state_dict()), path)
    elif case == "missing":
        path.unlink()
    elif case == "flipped":
        content = bytearray(path.read_bytes())
        content[content.index(model.rnns[0].module.bias_hh_l0.detach().numpy().tobytes())] ^= 1
        path.write_bytes(content)
    elif case == "old":
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    (tmp_path / "words").write_text("a b a\n")
    words = ["--data", corpus_dir] if case != "twice" else []
    words += ["--vocab", tmp_path / "words"] if case in ("twice", "both") else []
    status, _, err = importer(path, "--save", tmp_path / "m.pt", *words)
    assert status == 1 + (case == "both")
    assert len(err.splitlines()) == 1
    assert "error: " in err
