"""checkpoint/: the content of a model file, refused files, and complete writes."""

import os
import pickle
import random
import signal
import zipfile

import pytest
import torch
from conftest import ORIGINAL_CELLS, full_disk, put

import checkpoint
from checkpoint import Checkpoint, CheckpointError, model_file
from data import Dictionary
from files.writing import check_writable, replacing, writing
from model import RNNModel, make_network
from run.rehearsal import differing
from splitcross import SplitCrossEntropyLoss
from utils import ToolkitError

CPU = torch.device("cpu")


def make(rnn_type="LSTM", wdrop=0.5, splits=(), tie=True):
    torch.manual_seed(0)
    sizes = {"rnn_type": rnn_type, "ntoken": 30, "ninp": 5, "nhid": 7, "nlayers": 2}
    config = {"splits": list(splits), **sizes, "wdrop": wdrop, "tie_weights": tie}
    model, criterion = make_network(**config)
    for p in criterion.parameters():
        torch.nn.init.normal_(p)
    dictionary = Dictionary.from_words([f"w{i}" for i in range(30)], range(30))
    return Checkpoint(
        config=config,
        model=checkpoint.snapshot(model),
        criterion=checkpoint.snapshot(criterion),
        vocabulary=checkpoint.vocabulary_of(dictionary),
        args={"lr": 30.0, "when": [-1]},
        stage="main.py",
        epoch=3,
        valid_loss=4.5,
    )


def test_weights_that_the_network_lacks_are_an_error():
    written = make()
    written.criterion["prior.weight"] = torch.zeros(3, 5)
    with pytest.raises(CheckpointError, match=r"prior\.weight"):
        checkpoint.rebuild(written, CPU)


def test_a_compiled_model_is_written_and_read_under_plain_names():
    written = make()
    model, _ = checkpoint.rebuild(written, CPU)
    compiled = torch.compile(model, backend="eager")
    snapshot = checkpoint.snapshot(compiled)
    assert snapshot.keys() == written.model.keys()
    checkpoint.load_state(compiled, {name: weight + 1 for name, weight in snapshot.items()})
    assert torch.equal(model.decoder.bias, written.model["decoder.bias"] + 1)


def outputs(model, criterion):
    model.eval()
    model.reset()
    with torch.no_grad():
        output, _ = model(torch.arange(12).view(6, 2), model.init_hidden(2))
        return criterion.logprob(model.decoder.weight, model.decoder.bias, output)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("rnn_type", ORIGINAL_CELLS)
def test_rebuilding_draws_nothing(rnn_type, tie):
    # For a large vocabulary, initial weights that are replaced at once would take seconds.
    written = make(rnn_type, splits=(5, 20), tie=tie)
    before = torch.get_rng_state()
    model, criterion = checkpoint.rebuild(written, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    for module, state in ((model, written.model), (criterion, written.criterion)):
        assert module.state_dict().keys() == state.keys()
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def test_a_file_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    # torch opens the file twice, and a run that saves often may replace it in between.
    path, newer = tmp_path / "model.pt", tmp_path / "newer.pt"
    old = make("LSTM")
    checkpoint.save(path, old)
    checkpoint.save(newer, make("QRNN"))
    from_file = torch.UntypedStorage.from_file

    def opened_again(*args, **options):
        if newer.exists():
            os.replace(newer, path)
        return from_file(*args, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", opened_again)
    loaded = checkpoint.load(path)
    assert not newer.exists()
    assert loaded.config == old.config
    for name, tensor in old.model.items():
        assert torch.equal(loaded.model[name], tensor), name


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("splits", [(), (5, 20)])
@pytest.mark.parametrize("rnn_type", ORIGINAL_CELLS)
def test_round_trip(tmp_path, rnn_type, splits, tie):
    before = make(rnn_type, splits=splits, tie=tie)
    expected = outputs(*checkpoint.rebuild(before, CPU))
    checkpoint.save(tmp_path / "model.pt", before)
    after = checkpoint.load(tmp_path / "model.pt")
    assert torch.equal(outputs(*checkpoint.rebuild(after, CPU)), expected)
    for name in ("config", "vocabulary", "args", "stage", "epoch", "valid_loss", "training"):
        assert getattr(after, name) == getattr(before, name)
    assert after.dictionary.word2idx["w7"] == 7
    assert after.dictionary.counter[7] == 7
    model, _ = checkpoint.rebuild(after, CPU)
    assert (model.decoder.weight is model.encoder.weight) == tie


def test_it_is_a_plain_dictionary(tmp_path):
    path = tmp_path / "model.pt"
    checkpoint.save(path, make())
    content = torch.load(path, weights_only=True)
    assert content["format"] == "awd-lstm-lm"
    assert content["config"]["nhid"] == 7
    assert "rnns.0.module.weight_hh_l0_raw" in content["model"]
    # Tied weights are stored once.
    tied = content["model"]["encoder.weight"], content["model"]["decoder.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("rnn_type", ORIGINAL_CELLS)
@pytest.mark.parametrize(("saved", "asked"), [(0.5, 0.0), (0.0, 0.5), (0.5, 0.2)])
def test_weight_drop_may_be_switched_on_and_off(tmp_path, rnn_type, saved, asked):
    checkpoint.save(tmp_path / "m.pt", make(rnn_type, wdrop=saved))
    loaded = checkpoint.load(tmp_path / "m.pt")
    model, criterion = checkpoint.rebuild(loaded, CPU, wdrop=asked, dropouth=0.1)
    assert model.wdrop == asked
    assert model.dropouth == 0.1
    assert torch.equal(outputs(model, criterion), outputs(*checkpoint.rebuild(loaded, CPU)))


BREAKS = {
    "not all weights are finite": put("model", "encoder.weight", to=lambda t: t.fill_(torch.nan)),
    "size mismatch for decoder.bias": put("model", "decoder.bias", to=torch.zeros(31)),
    r"[Mm]issing key.* \"decoder\.bias": lambda content: content["model"].pop("decoder.bias"),
    r"[Uu]nexpected key.* \"other": lambda content: content["model"].update(
        other=content["model"]["decoder.bias"]
    ),
    "missing 1 required": lambda content: content["config"].pop("nlayers"),
    "not 'RNN_TANH'": put("config", "rnn_type", to="RNN_TANH"),
    "no model file of this toolkit": put("format", to="something"),
    "version 99": put("version", to=99),
}


@pytest.mark.parametrize("message", BREAKS)
def test_damaged_content_is_refused(tmp_path, message):
    path = tmp_path / "m.pt"
    checkpoint.save(path, make())
    content = torch.load(path, weights_only=True)
    BREAKS[message](content)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.rebuild(checkpoint.load(path), CPU)
    assert "\n" not in str(error.value)


def write_truncated(path):
    checkpoint.save(path, make())
    path.write_bytes(path.read_bytes()[:-2000])


def write_original(path):
    # The original pickles the objects themselves.
    model = RNNModel("LSTM", 30, 5, 7, 1)
    torch.save([model, SplitCrossEntropyLoss(5, []), None], path)


def write_empty(path):
    path.write_bytes(b"")


def write_text(path):
    path.write_text("not a model\n" * 50)


def write_tensor(path):
    torch.save(torch.zeros(3), path)


@pytest.mark.parametrize(
    "write", [write_truncated, write_original, write_empty, write_text, write_tensor]
)
def test_other_files_are_refused(tmp_path, write):
    path = tmp_path / "m.pt"
    write(path)
    with pytest.raises(CheckpointError, match="no model file of this toolkit"):
        checkpoint.load(path)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def write_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [torch.save, write_pickle])
def test_nothing_in_a_file_is_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"format": "awd-lstm-lm", "version": 1, "model": Bomb()}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "m.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "m.pt").touch()
    monkeypatch.setattr(model_file, "opened", refused)
    with pytest.raises(PermissionError):
        checkpoint.load(tmp_path / "m.pt")


def test_a_model_stays_when_its_file_is_written_over(tmp_path):
    model, path = make(), tmp_path / "m.pt"
    checkpoint.save(path, model)
    kept = checkpoint.in_memory(checkpoint.load(path))
    os.truncate(path, 0)
    for name, tensor in model.model.items():
        assert torch.equal(kept.model[name], tensor)
    weights = [kept.model["encoder.weight"], kept.model["decoder.weight"]]
    assert weights[0].data_ptr() == weights[1].data_ptr()


def hidden_by_another(error):
    try:
        raise error
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672]")  # noqa: B904


def test_the_error_gives_the_reason_of_the_system(tmp_path):
    message = r"cannot write .*m.pt \(No space left on device\): "
    with pytest.raises(ToolkitError, match=message), writing(tmp_path / "m.pt", "--save"):
        hidden_by_another(OSError(28, "No space left on device"))


def test_a_place_beside_which_nothing_can_be_written(tmp_path, monkeypatch):
    with pytest.raises(ToolkitError, match="its name is too long"):
        check_writable(tmp_path / ("x" * 250), "--save")
    (tmp_path / "m.pt").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ToolkitError, match="its folder cannot be written"):
        check_writable(tmp_path / "m.pt", "--save")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no model file .*train one"):
        checkpoint.load(tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="there is no model file"):
        checkpoint.load(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.pt"
    checkpoint.save(path, make())
    old = path.read_bytes()
    bigger = make()
    bigger.args = {"much": "x" * 100_000}
    message = "the old file, if any, is unchanged"
    with full_disk(len(old) + 1000), pytest.raises(ToolkitError, match=message):
        checkpoint.save(path, bigger)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["m.pt"]


def test_a_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ToolkitError, match="Permission denied"):
        checkpoint.save(path, make())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.pt"]


def test_save_follows_a_link(tmp_path):
    (tmp_path / "real.pt").write_bytes(b"old")
    (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
    checkpoint.save(tmp_path / "link.pt", make())
    assert (tmp_path / "link.pt").is_symlink()
    assert checkpoint.load(tmp_path / "real.pt").epoch == 3


def test_check_writable(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    check_writable(path, "--save")
    assert os.listdir(tmp_path) == []
    path.write_bytes(b"old")
    check_writable(path, "--save")
    assert path.read_bytes() == b"old"
    with pytest.raises(ToolkitError, match="folder"):
        check_writable(tmp_path, "--save")
    with pytest.raises(ToolkitError, match="no folder"):
        check_writable(tmp_path / "none" / "m.pt", "--save")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ToolkitError, match="write-protected"):
        check_writable(path, "--save")
    with pytest.raises(ToolkitError, match="cannot be written"):
        check_writable(tmp_path / "other.pt", "--save")


def mutated(content, rng):
    """A file's bytes with one random change."""
    content = bytearray(content)
    start = rng.randrange(len(content))
    length = rng.choice([1, 1, 8, 64, 1000])
    kind = rng.choice(["flip", "flip", "cut", "zero", "twice", "random", "end"])
    if kind == "flip":
        for _ in range(length):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[start : start + length]
    elif kind == "zero":
        content[start : start + length] = bytes(len(content[start : start + length]))
    elif kind == "twice":
        content[start:start] = content[start : start + length]
    elif kind == "random":
        content[start : start + length] = rng.randbytes(len(content[start : start + length]))
    else:
        del content[start:]
    return bytes(content)


def refused_or_the_same(path, content, expected):
    """Whether a file of these bytes is refused; if not, its values must be as expected."""
    path.write_bytes(content)
    try:
        found = vars(checkpoint.load(path))
    except CheckpointError:
        return True
    assert list(differing(found, expected)) == []
    return False


@pytest.mark.parametrize("rnn_type", ["LSTM", "QRNN"])
def test_a_changed_file_is_refused_or_holds_the_same(rnn_type, trained, tmp_path):
    content = trained[rnn_type].read_bytes()
    expected, path = vars(checkpoint.load(trained[rnn_type])), tmp_path / "m.pt"
    rng = random.Random(5)
    # The pickle is a small but dangerous part of the file, so it gets half of the changes.
    pickled = content.index(b"data.pkl"), content.index(b"PK\x03\x04", 4)
    head, middle, tail = content[: pickled[0]], content[slice(*pickled)], content[pickled[1] :]
    refused = 0
    for number in range(400):
        whole = mutated(content, rng) if number % 2 else head + mutated(middle, rng) + tail
        refused += refused_or_the_same(path, whole, expected)
    assert refused > 300


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / "m.pt"
    checkpoint.save(path, make())
    content, expected, refused = path.read_bytes(), vars(checkpoint.load(path)), []
    for place in range(0, len(content), 97):
        flipped = content[place] ^ 1 << place % 8
        whole = content[:place] + bytes([flipped]) + content[place + 1 :]
        refused.append(refused_or_the_same(path, whole, expected))
    assert 0.5 < sum(refused) / len(refused) < 1


def test_compressed_records_are_refused_and_rewritten_ones_read(tmp_path):
    # A compressed record of a few bytes may claim gigabytes.
    path, before = tmp_path / "m.pt", tmp_path / "before.pt"
    checkpoint.save(before, make())
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        with zipfile.ZipFile(before) as old, zipfile.ZipFile(path, "w", compression) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
        if compression == zipfile.ZIP_DEFLATED:
            with pytest.raises(CheckpointError, match="no model file of this toolkit, or is dam"):
                checkpoint.load(path)
    refused_or_the_same(path, path.read_bytes(), vars(checkpoint.load(before)))


def test_what_a_killed_run_left_goes_with_the_next_save(tmp_path):
    path = tmp_path / "m.pt"
    pid = os.fork()
    if not pid:
        try:
            with replacing(path):
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    assert os.listdir(tmp_path) == [".m.pt.tmp"]
    checkpoint.save(path, make())
    assert os.listdir(tmp_path) == ["m.pt"]


def test_two_processes_cannot_write_one_file_at_once(tmp_path):
    path = tmp_path / "m.pt"
    with replacing(path) as file:
        file.write(b"first")
        with pytest.raises(BlockingIOError), replacing(path):
            pass
    assert path.read_bytes() == b"first"
    with replacing(path) as file:
        file.write(b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["m.pt"]
