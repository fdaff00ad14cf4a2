"""tools/import_original.py: weights named as in the original, and refused files."""

import importlib.util

import pytest
import torch
from conftest import ORIGINAL_CELLS, ROOT

import checkpoint
from data import Corpus
from model import RNNModel
from run import program


@pytest.fixture
def importer(capfd):
    spec = importlib.util.spec_from_file_location(
        "import_original", ROOT / "tools" / "import_original.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*argv):
        with pytest.raises(SystemExit) as exit_info:
            program.run(lambda: module.main([str(arg) for arg in argv]))
        out, err = capfd.readouterr()
        return exit_info.value.code, out, err

    return run


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


@pytest.mark.parametrize("case", ["missing", "pickle", "names", "words", "nan", "list", "flipped"])
def test_what_is_refused(case, importer, corpus_dir, tmp_path):
    path = tmp_path / "exported"
    model = export(path, corpus_dir)
    state = model.state_dict()
    if case == "missing":
        path.unlink()
    elif case == "pickle":
        torch.save([model, None, None], path)
    elif case == "names":
        torch.save({name: t for name, t in state.items() if "rnns.1" not in name}, path)
    elif case == "words":
        state["encoder.weight"] = state["decoder.weight"] = torch.zeros(9, 5)
        torch.save(state, path)
    elif case == "nan":
        state["decoder.bias"] = torch.full_like(state["decoder.bias"], torch.nan)
        torch.save(state, path)
    elif case == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        torch.save([1, 2], path)
    status, _, err = importer(path, "--data", corpus_dir, "--save", tmp_path / "m.pt")
    assert status == 1
    assert len(err.splitlines()) == 1
    assert "error: " in err
