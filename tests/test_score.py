"""score.py compared with a naive reference and with main.py's test score; bad input."""

import html
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import references
import torch
from conftest import ORIGINAL_CELLS, ROOT, TINY, linux_only
from test_export import model_file
from test_readme import blocks

import checkpoint
import score
import training
from data import Dictionary
from model import RNNModel
from scoring.page import COLOURS, level_of
from scoring.spelling import Spelling
from scoring.tokens import Reader
from utils import ToolkitError


def tokens_of(text):
    return [word for line in text.splitlines() for word in [*line.split(), "<eos>"]]


def naive_logprobs(path, ids, window=1, theta=0.0, lambdasm=0.0, from_start=False):
    """`log p` of all `ids` but the first, from one call of the model and full distributions."""
    loaded = checkpoint.load(path)
    model, criterion = checkpoint.rebuild(loaded, torch.device("cpu"))
    model.eval()
    with torch.no_grad():
        data = torch.tensor(ids[:-1]).unsqueeze(1)
        output, _, raw, _ = model(data, model.init_hidden(1), return_h=True)
        logprob = criterion.logprob(model.decoder.weight, model.decoder.bias, output).double()
    words = torch.tensor(ids[1:])
    args = (raw[-1].squeeze(1), words, logprob.exp(), window, theta, lambdasm, from_start)
    return [-loss for loss in references.pointer_losses(*args)]


def ids_of(path, words):
    known = checkpoint.load(path).dictionary.word2idx
    return [known[word] for word in words]


def scored(script, path, *argv):
    """The JSON objects that score.py prints."""
    status, out, err = script("score", "--checkpoint", path, "--no-cuda", "--json", *argv)
    assert (status, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


def test_json_where_the_output_is_not_utf8(trained, tmp_path):
    model = checkpoint.load(trained["LSTM"])
    model.vocabulary["words"] = [f"{word}\xe9\U0001f600" for word in model.vocabulary["words"]]
    model.vocabulary["words"][model.vocabulary["words"].index("<eos>\xe9\U0001f600")] = "<eos>"
    checkpoint.save(tmp_path / "m.pt", model)
    command = [sys.executable, ROOT / "score.py", "--checkpoint", tmp_path / "m.pt", "--no-cuda"]
    command += ["--json", "--tokens", "--text", "w1\xe9\U0001f600"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    words = [json.loads(line).get("word") for line in result.stdout.splitlines()]
    assert result.stderr == ""
    assert "w1\xe9\U0001f600" in words


TEXT = "w1 w3  w9\n\n w27 w1\nw4"


@pytest.mark.parametrize("cell", ORIGINAL_CELLS)
@pytest.mark.parametrize("bptt", [1, 3, 1000])
@pytest.mark.parametrize("independent", [False, True])
def test_every_token(independent, bptt, cell, script, trained):
    argv = ["--tokens", "--lines", "--bptt", bptt, *["--independent"] * independent]
    objects = scored(script, trained[cell], "--text", TEXT, *argv)
    tokens = [o for o in objects if o["kind"] == "token"]
    lines = [o for o in objects if o["kind"] == "line"]
    (total,) = (o for o in objects if o["kind"] == "total")
    assert objects[-1] is total
    words = tokens_of(TEXT)
    assert [t["word"] for t in tokens] == words
    assert [t["line"] for t in tokens] == [1, 1, 1, 1, 2, 3, 3, 3, 4, 4]
    expected = []
    for text in TEXT.split("\n") if independent else [TEXT]:
        ids = ids_of(trained[cell], ["<eos>", *tokens_of(f"{text}\n")])
        expected += naive_logprobs(trained[cell], ids)
    assert [t["logprob"] for t in tokens] == pytest.approx(expected, abs=1e-5)
    assert total["tokens"] == len(words)
    assert total["logprob"] == pytest.approx(sum(expected), abs=1e-4)
    assert total["ppl"] == pytest.approx(math.exp(-sum(expected) / len(words)), rel=1e-5)
    # Characters: one space between words, none at the ends, one newline per line.
    assert total["chars"] == len("w1 w3 w9\n\nw27 w1\nw4\n") == sum(t["chars"] for t in tokens)
    in_bits = -sum(expected) / math.log(2)
    assert total["bits_per_char"] == pytest.approx(in_bits / total["chars"], rel=1e-5)
    assert total["bits_per_token"] == pytest.approx(in_bits / len(words), rel=1e-5)
    assert [line["tokens"] for line in lines] == [4, 1, 3, 2]
    for line in lines:
        part = sum(t["logprob"] for t in tokens if t["line"] == line["line"])
        assert line["logprob"] == pytest.approx(part)


@pytest.mark.parametrize("as_corpus", [False, True])
@pytest.mark.parametrize("from_start", [False, True])
@pytest.mark.parametrize("window", [3, 40, 500])
def test_cache(window, from_start, as_corpus, script, trained, corpus_dir):
    text = "\n".join((corpus_dir / "test.txt").read_text().splitlines()[:12])
    argv = ["--tokens", "--cache", "--window", window, "--theta", 2, "--lambdasm", 0.3]
    argv += ["--bptt", 7]
    argv += ["--cache-from-start"] if from_start else []
    argv += ["--as-corpus"] if as_corpus else []
    objects = scored(script, trained["QRNN"], "--text", text, *argv)
    ids = ids_of(trained["QRNN"], [*([] if as_corpus else ["<eos>"]), *tokens_of(text)])
    expected = naive_logprobs(trained["QRNN"], ids, window, 2.0, 0.3, from_start)
    found = [o["logprob"] for o in objects if o["kind"] == "token"]
    if as_corpus:
        assert found.pop(0) is None
    assert found == pytest.approx(expected, abs=1e-4)
    used = max(0, len(expected) - (1 if from_start else window + 1))
    note = objects[-1]["notes"]["cache"]
    assert f"used at {used} of {len(expected)} tokens" in note
    assert ("give --cache-from-start" in note) == (used == 0)


def test_the_cache_is_counted_in_equal_lines_too(script, trained):
    argv = ["--independent", "--cache", "--window", 1, "--text", "w1 w3 w9\nw1\nw1 w3 w9"]
    total = scored(script, trained["LSTM"], *argv)[-1]
    assert total["notes"]["cache"] == "used at 4 of 10 tokens"


@pytest.mark.parametrize("cell", [*ORIGINAL_CELLS, "split"])
def test_as_corpus_is_the_test_score_of_main(cell, script, corpus_dir, tmp_path, monkeypatch):
    import main

    if cell == "split":
        monkeypatch.setattr(main, "default_splits", lambda ntoken: [10, 25, 40])
    losses = []
    evaluate = training.evaluate

    def recorded(*args, **kwargs):
        losses.append(evaluate(*args, **kwargs))
        return losses[-1]

    monkeypatch.setattr(training, "evaluate", recorded)
    path = tmp_path / "m.pt"
    argv = ["--data", corpus_dir, *TINY, "--lr", 5, "--epochs", 1, "--save", path]
    assert script("main", *argv, "--model", "LSTM" if cell == "split" else cell)[0] == 0
    total = scored(script, path, corpus_dir / "test.txt", "--as-corpus")[-1]
    assert total["ppl"] == pytest.approx(math.exp(losses[-1]), abs=1e-4)
    words = tokens_of((corpus_dir / "test.txt").read_text())
    assert total["tokens"] == len(words) - 1
    # After an initial <eos> one word more is scored.
    assert scored(script, path, corpus_dir / "test.txt")[-1]["tokens"] == len(words)


def renamed(path, target, names, **more):
    """A copy of a model file in which words have other `names`."""
    loaded = checkpoint.load(path)
    loaded.vocabulary["words"] = [names.get(w, w) for w in loaded.vocabulary["words"]]
    loaded.vocabulary.update(more)
    checkpoint.save(target, loaded)
    return target


@pytest.fixture
def with_unk(trained, tmp_path):
    """The file of the trained LSTM with one of its words renamed to <unk>."""
    return renamed(trained["LSTM"], tmp_path / "unk.pt", {"w5": "<unk>"})


def test_unknown_words_are_judged_over_the_whole_text(script, with_unk, monkeypatch):
    monkeypatch.setattr(score, "BLOCK_TOKENS", 5)
    text = "a b c d e\n" + "w1 w3 w9 w1\n" * 9
    assert scored(script, with_unk, "--text", text)[-1]["unknown"] == 5
    status, _, err = script("score", "--checkpoint", with_unk, "--text", "a b c d e\na b c d e")
    assert (status, "of the tokens of the text are not in the model's" in err) == (1, True)


def test_words_outside_the_vocabulary(script, trained, with_unk):
    *tokens, total = scored(script, with_unk, "--text", "w1 zebra w3 zebra gnu <unk>", "--tokens")
    assert [t["unknown"] for t in tokens] == [False, True, False, True, True, False, False]
    assert total["unknown"] == 3
    assert total["notes"]["outside_the_vocabulary"] == (
        "3 of 7 tokens (2 distinct words), scored as <unk>"
    )
    mapped = ids_of(with_unk, "<eos> w1 <unk> w3 <unk> <unk> <unk> <eos>".split())
    expected = naive_logprobs(with_unk, mapped)
    assert [t["logprob"] for t in tokens] == pytest.approx(expected, abs=1e-5)
    # Characters are counted in the words as written.
    assert total["chars"] == len("w1 zebra w3 zebra gnu <unk>\n")

    status, out, err = script("score", "--checkpoint", trained["LSTM"], "--text", "w1 zebra gnu")
    assert (status, out) == (1, "")
    assert "'zebra' in line 1 is outside the model's vocabulary, which has no <unk>" in err
    assert len(err.splitlines()) == 1


# What each kind of vocabulary shows, a line of its tokens, and that line's text.
VOCABULARIES = {
    "words": ("the cat , a sat on mats w1 w2", "the cat , a sat", "the cat , a sat"),
    "characters": ("a b _ < > \u0915\u093f", "a b < \u0915\u093f _", "01234"),
    "pieces @@": ("ca@@ ts the s", "the ca@@ ts the", "the cats the"),
    "pieces ##": ("ca ##ts the ##s", "the ca ##ts ##s the", "the catss the"),
    "pieces \u2581": ("\u2581ca ts \u2581the", "\u2581the \u2581ca ts", "the cats"),
    "": ("a b c SPACE", "a b SPACE", None),
    " numbers": ("104 101 32", "104 32", None),
    "given joined": ("a b c SPACE", "a b SPACE", "abSPACE"),
    "given bytes": ("104 101 32", "104 32", "h "),
    "given words": ("104 101 32", "104 32", "104 32"),
    "given pieces": ("a@@ b the cat w1 w2", "the a@@ b the", "the ab the"),
}


@pytest.mark.parametrize("case", VOCABULARIES)
def test_characters_of_every_kind_of_tokens(case):
    words, line, text = VOCABULARIES[case]
    dictionary = Dictionary.from_words([*words.split(), "<eos>", "<unk>"])
    kind = case.removeprefix("given ")
    spelling = Spelling.of(dictionary, kind if case.startswith("given") else None)
    assert spelling.kind == kind.split(" ")[0]
    assert ("code points" in spelling.note) == (kind == "characters")
    ((*tokens, end),) = Reader(dictionary, spelling).blocks([line], 1)
    if text is None:
        assert [token.chars for token in (*tokens, end)] == [None] * (len(tokens) + 1)
        assert "--tokens-are words" in spelling.note
    else:
        assert sum(token.chars for token in tokens) == len(text)
        assert end.chars == 1
        assert spelling.unit == ("byte" if kind == "bytes" else "char")


def test_a_corpus_half_of_single_characters_is_unclear():
    words = ["a", "b", "the", "cat", "<eos>"]
    for counts, kind in (([1, 1, 5, 5, 99], "words"), ([5, 5, 4, 4, 99], "")):
        assert Spelling.of(Dictionary.from_words(words, counts)).kind == kind
    with pytest.raises(ToolkitError, match="no word of the vocabulary has a marker"):
        Spelling.of(Dictionary.from_words(words), "pieces")


def test_bits_by_characters_of_the_original_text(script, trained, tmp_path):
    letters = {f"w{n}": chr(33 + n) for n in range(60)}
    path = renamed(trained["LSTM"], tmp_path / "m.pt", letters)
    text = ["--text", "a b c\nd".upper()]
    total = scored(script, path, *text)[-1]
    in_bits = -total["logprob"] / math.log(2)
    assert (total["chars"], total["tokens_are"]) == (6, "characters")
    assert total["bits_per_char"] == pytest.approx(in_bits / 6)
    asked = scored(script, path, *text, "--chars", 8, "--words", 2)[-1]
    assert asked["bits_per_char"] == pytest.approx(in_bits / 8)
    assert asked["ppl_per_word"] == pytest.approx(math.exp(-total["logprob"] / 2))
    assert total["logprob"] == asked["logprob"]

    numbers = {f"w{n}": str(n) for n in range(60)}
    path = renamed(trained["LSTM"], tmp_path / "m.pt", numbers, tokens_are="bytes")
    total = scored(script, path, "--text", "7 8\n9")[-1]
    assert (total["bytes"], total["tokens_are"]) == (5, "bytes")
    assert total["bits_per_byte"] == pytest.approx(-total["logprob"] / math.log(2) / 5)
    argv = ["--checkpoint", path, "--text", "7 8\n9", "--no-cuda"]
    assert "| bits/byte " in script("score", *argv)[1]
    out = script("score", *argv, "--tokens-are", "words")[1]
    assert "| tokens are: words, as --tokens-are says" in out
    assert "| bits/char " in out


def test_perplexities_by_other_conventions(script, with_unk):
    *tokens, total = scored(script, with_unk, "--text", "w1 zebra w3\n<unk>\nw4", "--tokens")
    known = [t["logprob"] for t in tokens if t["word"] not in ("zebra", "<unk>")]
    words = [t["logprob"] for t in tokens if t["word"] != "<eos>"]
    for name, logprob, count in (
        ("ppl_without_unk", sum(known), 6),
        ("ppl_without_eos", sum(words), 5),
        ("ppl1", sum(known), 3),
    ):
        assert total[name] == pytest.approx(math.exp(-logprob / count))
        assert total[name.replace("ppl", "tokens", 1)] == count
    out = script("score", "--checkpoint", with_unk, "--text", "w1 zebra w3\n<unk>\nw4")[1]
    assert f"| without unknown words: ppl {total['ppl_without_unk']:.4f} over 6" in out


def rows_of(table):
    head, *rows = (line.split("\t") for line in table.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def stock_lstm(path, ids):
    """Outputs of every layer (n, size), and log p (n, ntoken), from PyTorch's own modules."""
    loaded = checkpoint.load(path)
    state = {name.replace(".module", "").replace("_raw", ""): t for name, t in loaded.model.items()}
    x = torch.nn.functional.embedding(torch.tensor(ids), state["encoder.weight"])
    layers = []
    for k in range(loaded.config["nlayers"]):
        own = {
            name.removeprefix(f"rnns.{k}."): t for name, t in state.items() if f"rnns.{k}." in name
        }
        lstm = torch.nn.LSTM(x.size(1), own["weight_hh_l0"].size(1))
        lstm.load_state_dict(own)
        with torch.no_grad():
            x, _ = lstm(x)
        layers.append(x)
    logits = torch.nn.functional.linear(x, state["decoder.weight"], state["decoder.bias"])
    return layers, logits.double().log_softmax(1)


@pytest.mark.parametrize("independent", [False, True])
def test_a_table_of_tokens_and_the_states(independent, script, with_unk, tmp_path):
    text = "w1 zebra w3\n\nw4\nw1 zebra w3"
    argv = ["--checkpoint", with_unk, "--no-cuda", "--text", text, "--entropy", "--bptt", 4]
    argv += ["--states", tmp_path / "s.npz"] + ["--independent"] * independent
    status, out, err = script("score", *argv, "--tsv", "-")
    assert (status, err) == (0, "")
    assert script("score", *argv, "--tsv", tmp_path / "t.tsv")[0] == 0
    assert (tmp_path / "t.tsv").read_text() == out
    rows = rows_of(out)
    words = tokens_of(text)
    assert [row["token"] for row in rows] == words
    places = ["1 1", "1 2", "1 3", "1 4", "2 1", "3 1", "3 2", "4 1", "4 2", "4 3", "4 4"]
    assert [f"{row['sentence_id']} {row['token_id']}" for row in rows] == places
    assert [row["unknown"] for row in rows] == ["1" if w == "zebra" else "0" for w in words]
    with np.load(tmp_path / "s.npz") as states:
        assert states["words"].tolist() == words
        assert states["sentence_id"].tolist() == [int(row["sentence_id"]) for row in rows]
        layers = [states["layer_1"], states["layer_2"]]
    at = 0
    for part in text.split("\n") if independent else [text]:
        ids = ids_of(with_unk, ["<eos>", *tokens_of(f"{part}\n".replace("zebra", "<unk>"))])
        expected, logprob = stock_lstm(with_unk, ids)
        for t, word in enumerate(ids[1:]):
            row = rows[at + t]
            p, in_bits = logprob[t].exp(), -logprob[t] / math.log(2)
            assert float(row["surprisal"]) == pytest.approx(in_bits[word].item(), abs=1e-5)
            assert float(row["entropy"]) == pytest.approx((p @ in_bits).item(), abs=1e-5)
        for found, layer in zip(layers, expected, strict=True):
            assert found[at : at + len(ids) - 1] == pytest.approx(layer[1:].numpy(), abs=1e-5)
        at += len(ids) - 1
    assert at == len(rows)
    tokens = scored(script, with_unk, *argv[3:], "--tokens")[:-1]
    for token, row in zip(tokens, rows, strict=True):
        assert (str(token["line"]), str(token["number"])) == (row["sentence_id"], row["token_id"])
        assert token["bits"] == pytest.approx(float(row["surprisal"]), abs=1e-6)
        assert token["entropy"] == pytest.approx(float(row["entropy"]), abs=1e-6)


@pytest.mark.parametrize("cell", ORIGINAL_CELLS)
def test_the_page_in_python(cell, script, trained, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    names = "<unk> the company said it would sell".split()
    renamed(trained[cell], "PTB.pt", {f"w{n}": name for n, name in enumerate(names)})
    page = {}
    exec(blocks(ROOT / "docs" / "in-python.md")[0], page)
    assert "company" in capfd.readouterr().out
    found = scored(script, "PTB.pt", "--text", page["text"], "--tokens", "--states", "s.npz")[:-1]
    assert [token.bits for token in page["tokens"]] == [o["bits"] for o in found]
    assert [o["unknown"] for o in found] == [False] * 6 + [True] * 2 + [False]
    with np.load("s.npz") as states:
        for number, layer in enumerate(page["layers"], start=1):
            assert np.array_equal(states[f"layer_{number}"], layer.numpy())
    # The states after each token predict the next one.
    network, tokens = page["network"], page["tokens"]
    assert not any(module.training for module in network.modules())
    decoder = network.model.decoder
    logprob = network.criterion.logprob(decoder.weight, decoder.bias, page["layers"][-1][:-1])
    nats = logprob.gather(1, torch.tensor([[token.id] for token in tokens[1:]])).squeeze(1)
    assert nats.tolist() == pytest.approx([token.logprob for token in tokens[1:]], abs=1e-5)


def test_what_is_not_scored_is_missing_in_a_table(script, trained):
    argv = ["--checkpoint", trained["LSTM"], "--text", "w1 w3", "--as-corpus", "--tsv", "-"]
    rows = rows_of(script("score", *argv, "--entropy")[1])
    assert [row["surprisal"] == "NA" for row in rows] == [True, False, False]
    assert [row["entropy"] == "NA" for row in rows] == [True, False, False]


def test_n_best_lists(script, trained, corpus_dir):
    lines = (corpus_dir / "valid.txt").read_text().splitlines()
    lines = [f"utt-{n} {line}" for n, line in enumerate([*lines, "", *lines[::-1]])]
    argv = ["--checkpoint", trained["LSTM"], "--no-cuda", "--independent", "--lines", "--ids"]
    status, out, err = script("score", *argv, "--tsv", "-", "--text", "\n".join(lines))
    assert (status, err) == (0, "")
    rows = rows_of(out)
    scores = {}
    for row, line in zip(rows, lines, strict=True):
        name, *words = line.split()
        assert (row["sentence_id"], int(row["tokens"])) == (name, len(words) + 1)
        assert scores.setdefault(tuple(words), row["logprob"]) == row["logprob"]
        ids = ids_of(trained["LSTM"], ["<eos>", *words, "<eos>"])
        expected = sum(naive_logprobs(trained["LSTM"], ids))
        assert float(row["logprob"]) == pytest.approx(expected, abs=1e-4)
        assert float(row["ppl"]) == pytest.approx(math.exp(-expected / (len(words) + 1)), rel=1e-5)
    assert f"line {lines[3].split()[0]}" in script("score", *argv, "--text", "\n".join(lines))[1]
    objects = scored(script, trained["LSTM"], *argv[3:], "--text", "a w1\nb w1")
    assert [o["line"] for o in objects[:-1]] == ["a", "b"]


def test_lines_of_equal_length_are_computed_together(script, trained, monkeypatch):
    calls = []
    forward = RNNModel.forward
    monkeypatch.setattr(
        RNNModel, "forward", lambda self, *a, **k: calls.append(len(a[0])) or forward(self, *a, **k)
    )
    text = "\n".join(f"w{n % 60} w{n % 59} w{n % 58}" for n in range(2000))
    scored(script, trained["LSTM"], "--text", text, "--independent")
    # A step of --bptt 1000 tokens is 250 lines of four.
    assert calls == [4] * 8


@linux_only
def test_memory_does_not_grow_with_the_text(tmp_path):
    words = ["<eos>", *map(str, range(1000, 6999))]
    model_file(tmp_path / "m.pt", words=words)
    peaks = []
    for lines in (50, 5000):
        text = tmp_path / "t.txt"
        text.write_text("".join(" ".join(words[n + 1 : n + 20]) + "\n" for n in range(lines)))
        # A process of its own: the maximum is over all children.
        code = (
            "import resource, subprocess, sys\n"
            "assert subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode == 0\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        command = [sys.executable, ROOT / "score.py", "--checkpoint", tmp_path / "m.pt", text]
        runner = [sys.executable, "-c", code, *command, "--bptt", "100", "--no-cuda"]
        peaks.append(int(subprocess.check_output(runner)))
    assert peaks[1] < 1.25 * peaks[0]


@linux_only
@pytest.mark.parametrize("source", ["<(cat t.txt)", "/dev/stdin < t.txt", "/dev/stdin", "fifo"])
def test_text_from_a_pipe(source, script, trained, tmp_path):
    (tmp_path / "t.txt").write_text("w1 w3\nw9\n")
    os.mkfifo(tmp_path / "fifo")
    command = f"{sys.executable} {ROOT}/score.py --checkpoint {trained['LSTM']} --json {source}"
    if source == "fifo":
        # Opening the pipe waits for the writer.
        command = f"(cat t.txt > fifo) & exec 5< fifo; {command}"
    elif source == "/dev/stdin":
        # Another command has read the first line.
        command = f"(echo head; cat t.txt) > h.txt; (read head; {command}) < h.txt"
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.stderr == ""
    total = scored(script, trained["LSTM"], "--text", "w1 w3\nw9\n")[-1]
    assert json.loads(result.stdout.splitlines()[-1]) == total


def test_text_from_everywhere(script, trained, tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    expected = scored(script, trained["GRU"], "--text", "w1 w3\nw9\n")[-1]
    for raw in (b"w1 w3\nw9", b"w1 w3\r\nw9\r\n", b"\xef\xbb\xbfw1\tw3\rw9\n"):
        path.write_bytes(raw)
        assert scored(script, trained["GRU"], path)[-1] == expected
        for argv in ([], ["-"]):
            # As Python opens it.
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), newline="\n"))
            assert scored(script, trained["GRU"], *argv)[-1] == expected


def test_report_for_people(script, trained):
    argv = ["--checkpoint", trained["LSTM"], "--text", "w1 w3\n\nw4", "--as-corpus"]
    status, out, err = script("score", *argv, "--lines", "--tokens")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert "not scored" in lines[0]
    assert lines[0].endswith("| w1")
    assert sum("bits/char" in line for line in lines) == 4
    assert "| first token: an input only, not scored" in out
    match = re.search(r"\| End of scoring \| 5 tokens \| log p +(\S+) .* \| ppl +(\S+)", out)
    total = scored(script, trained["LSTM"], "--text", "w1 w3\n\nw4", "--as-corpus")[-1]
    assert [float(x) for x in match.groups()] == pytest.approx(
        [total["logprob"], total["ppl"]], abs=0.006
    )
    # A line without scored tokens.
    argv = ["--checkpoint", trained["LSTM"], "--text", "\nw4", "--as-corpus", "--lines"]
    status, out, _ = script("score", *argv)
    assert status == 0
    assert re.search(r"line 1 \| +0 tokens \| .* ppl +- ", out)
    first = scored(script, trained["LSTM"], *argv[2:])[0]
    assert (first["tokens"], first["ppl"], first["bits_per_char"]) == (0, None, None)


def test_html(script, with_unk, tmp_path):
    path = tmp_path / "t.html"
    text = 'w1 <b>&"</b> w3'
    status, _, err = script(
        "score", "--checkpoint", with_unk, "--text", text, "--html", path, "--as-corpus"
    )
    assert (status, err) == (0, "")
    page = path.read_text("utf-8")
    assert not re.search("src=|href=", page)
    found = re.findall('<b class="([^"]*)" title="([^"]*)">(.*?)</b>', page)
    assert [html.unescape(word) for *_, word in found] == [*text.split(), "↵"]
    kinds = [kind.split() for kind, *_ in found]
    assert (kinds[0], "u" in kinds[1], "e" in kinds[3]) == (["n"], True, True)
    assert found[0][1] == "w1: not scored"
    objects = scored(script, with_unk, "--text", text, "--as-corpus", "--tokens")
    full = math.ceil(math.log2(checkpoint.load(with_unk).config["ntoken"]))
    for (kind, tip, _), token in zip(found[1:], objects[1:-1], strict=True):
        surprisal = -token["logprob"] / math.log(2)
        assert html.unescape(tip).startswith(token["word"])
        assert f": {surprisal:.2f} bits" in tip
        assert f"s{level_of(surprisal, full)}" in kind.split()


def test_a_page_of_a_text_whose_name_is_not_utf8(script, with_unk, tmp_path):
    text, page = tmp_path / os.fsdecode(b"t\xff.txt"), tmp_path / "t.html"
    text.write_text("w1 w2\n")
    status, _, err = script("score", "--checkpoint", with_unk, text, "--html", page)
    assert (status, err) == (0, "")
    assert r"<title>t\udcff.txt, scored by" in page.read_text("utf-8")


def test_colours_follow_surprisal():
    levels = [level_of(bits / 4, 10) for bits in range(60)]
    assert levels == sorted(levels)
    assert set(levels) == set(range(len(COLOURS)))
    assert level_of(math.inf, 10) == len(COLOURS) - 1
    lightness = [
        sum(int(colour[i : i + 2], 16) * w for i, w in ((1, 3), (3, 6), (5, 1)))
        for colour in COLOURS
    ]
    # The order is also visible in greyscale print.
    assert lightness == sorted(lightness, reverse=True)


BAD_INPUT = {
    "no file": (["none.txt"], 1, "cannot read none.txt"),
    "a folder": (["."], 1, r"cannot read \."),
    "empty": (["empty.txt"], 1, r"empty\.txt is empty"),
    "empty --text": (["--text", ""], 1, "--text is empty"),
    "not UTF-8": (["latin.txt"], 1, r"line 2 of latin\.txt is not UTF-8"),
    "file and text": (["t.txt", "--text", "w1"], 2, "not both"),
    "two ways": (["t.txt", "--as-corpus", "--independent"], 2, "give one"),
    "one token": (["--text", "\n", "--as-corpus"], 1, "one token"),
    "no cache": (["t.txt", "--theta", "1"], 2, "--theta has no effect without --cache"),
    "no cache, from start": (["t.txt", "--cache-from-start"], 2, "without --cache: add it"),
    "no model": (["t.txt", "--checkpoint", "none.pt"], 1, r"no model file none\.pt"),
    "model as text": (["m.pt"], 1, r"m\.pt is not UTF-8: .* a model file with --checkpoint"),
    "model and text": (["m.pt", "t.txt"], 2, "the model with --checkpoint"),
    "table and JSON": (["t.txt", "--tsv", "-", "--json"], 2, "--tsv - is the whole output"),
    "table and words": (["t.txt", "--tsv", "-", "--words", "9"], 2, "--tsv - is the whole output"),
    "entropy of a cache": (
        ["t.txt", "--tsv", "-", "--cache", "--entropy"],
        2,
        "without the cache:",
    ),
    "entropy of no tokens": (["t.txt", "--entropy"], 2, "add --tsv"),
    "no ids": (["--text", "a w1\n\nb w3", "--ids"], 1, "line 2 of the text is empty"),
    "no marker": (["t.txt", "--tokens-are", "pieces"], 1, "has a marker of pieces"),
    "no folder for --tsv": (["t.txt", "--tsv", "none/x.tsv"], 1, "cannot write none/x.tsv"),
    "no folder for --html": (["t.txt", "--html", "none/x.html"], 1, "cannot write none/x.html"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, script, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "t.txt").write_text("w1 w3\n")
    shutil.copy(trained["LSTM"], tmp_path / "m.pt")
    (tmp_path / "latin.txt").write_bytes(b"w1\ncaf\xe9\n")
    argv, expected, message = BAD_INPUT[case]
    if "--checkpoint" not in argv:
        argv = [*argv, "--checkpoint", trained["LSTM"]]
    status, out, err = script("score", *argv)
    assert (status, out) == (expected, "")
    assert re.search(message, err), err
    assert len(err.splitlines()) == 1


def test_a_vocabulary_without_end_of_line(script, trained, tmp_path):
    renamed(trained["LSTM"], tmp_path / "m.pt", {"<eos>": "end"})
    status, _, err = script("score", "--checkpoint", tmp_path / "m.pt", "--text", "w1")
    assert status == 1
    assert "has no <eos>" in err
