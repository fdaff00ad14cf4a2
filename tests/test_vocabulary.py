"""Own corpora: smaller vocabularies, one text cut in three, a corpus other than the model's."""

import re
from collections import Counter

import pytest
import torch
from conftest import TINY

import checkpoint
from data import Corpus, CorpusError, Dictionary
from files import encoded

TEXTS = {
    "train": "the cat sat on the mat\nthe dog sat\na cat ran\n",
    "valid": "the bird sat\n",
    "test": "a cat flew\n",
}


def folder_of(path, texts):
    path.mkdir()
    for name, text in texts.items():
        (path / f"{name}.txt").write_text(text)
    return path


def words(corpus, part):
    return [corpus.dictionary.idx2word[i] for i in getattr(corpus, part).tolist()]


def by_hand(texts, kept):
    """Each part's words, with <unk> for words not in `kept`; the words by first appearance."""
    parts, ids = {}, {}
    for name, text in texts.items():
        tokens = text.replace("\n", " <eos> ").split()
        parts[name] = [t if t in kept else "<unk>" for t in tokens]
        for token in parts[name]:
            ids.setdefault(token, len(ids))
    return parts, list(ids)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"min_count": 2}, {"the", "cat", "sat", "<eos>"}),
        ({"min_count": 3}, {"the", "<eos>"}),
        # The most frequent words, ties by first appearance; the size includes <unk> and <eos>.
        ({"vocab_size": 5}, {"the", "cat", "sat", "<eos>"}),
        ({"vocab_size": 6}, {"the", "cat", "sat", "on", "<eos>"}),
        ({"vocab_size": 3}, {"the", "<eos>"}),
    ],
)
def test_fewer_words(options, kept, tmp_path):
    corpus = Corpus(folder_of(tmp_path / "c", TEXTS)).with_fewer_words(**options)
    parts, vocabulary = by_hand(TEXTS, kept)
    assert corpus.dictionary.idx2word == vocabulary
    for name, expected in parts.items():
        assert words(corpus, name) == expected
        assert getattr(corpus, name).dtype == torch.int32
    counts = Counter(token for part in parts.values() for token in part)
    assert {vocabulary[i]: n for i, n in corpus.dictionary.counter.items()} == counts
    if "vocab_size" in options:
        assert len(vocabulary) == options["vocab_size"]


def test_an_unk_in_the_text_is_the_unk(tmp_path):
    texts = {**TEXTS, "train": "<unk> cat the the\n"}
    corpus = Corpus(folder_of(tmp_path / "c", texts)).with_fewer_words(min_count=2)
    assert corpus.dictionary.idx2word == ["<unk>", "the", "<eos>"]


def test_nothing_changes_where_nothing_need_go(tmp_path):
    corpus = Corpus(folder_of(tmp_path / "c", TEXTS))
    same = corpus.with_fewer_words(vocab_size=len(corpus.dictionary) + 1)
    assert same.dictionary.idx2word == [*corpus.dictionary.idx2word, "<unk>"]
    assert torch.equal(same.train, corpus.train)
    # Words that are not in train.txt occur less than once there.
    fewer = corpus.with_fewer_words(min_count=1)
    assert "bird" not in fewer.dictionary.word2idx
    assert "mat" in fewer.dictionary.word2idx


def test_words_that_a_model_lacks_are_its_unk_or_an_error(tmp_path):
    folder = folder_of(tmp_path / "c", TEXTS)
    known = Dictionary.from_words(["<eos>", "the", "<unk>", "cat"])
    corpus = Corpus(folder, known)
    assert words(corpus, "train")[:6] == ["the", "cat", "<unk>", "<unk>", "the", "<unk>"]
    assert corpus.dictionary is known
    tokens = [t for text in TEXTS.values() for t in text.split()]
    assert corpus.unknown == sum(t not in ("the", "cat") for t in tokens)
    message = r"8 distinct words .*'sat', 'on', 'mat'.* no <unk> to read them as"
    with pytest.raises(CorpusError, match=message):
        Corpus(folder, Dictionary.from_words(["<eos>", "the", "cat"]))


def test_split(tmp_path, monkeypatch):
    lines = [f"line {i}\n" for i in range(10)]
    folder = folder_of(tmp_path / "c", {"train": "".join(lines)})
    corpus = Corpus(folder, split=(0.2, 0.1))
    assert words(corpus, "train") == "".join(lines[:7]).replace("\n", " <eos> ").split()
    assert words(corpus, "valid") == "line 7 <eos> line 8 <eos>".split()
    assert words(corpus, "test") == "line 9 <eos>".split()
    # The corpus is equal to one with three files.
    three = {"train": lines[:7], "valid": lines[7:9], "test": lines[9:]}
    other = Corpus(folder_of(tmp_path / "d", {k: "".join(v) for k, v in three.items()}))
    assert other.dictionary.idx2word == corpus.dictionary.idx2word
    assert other.dictionary.counter == corpus.dictionary.counter
    assert all(torch.equal(getattr(other, k), getattr(corpus, k)) for k in three)
    # It is cached, before it is split.
    monkeypatch.setattr(encoded, "_encode", None)
    again = Corpus(folder, split=(0.1, 0.2))
    assert words(again, "valid") == "line 7 <eos>".split()
    assert again.dictionary.counter == corpus.dictionary.counter


@pytest.mark.parametrize(
    ("texts", "split", "message"),
    [
        ({"train": "a\n"}, None, "train.txt alone: .*--split 0.05 0.05"),
        (TEXTS, (0.1, 0.1), "has a valid.txt already: leave --split out"),
        ({"train": "a\nb\nc\n"}, (0.1, 0.4), "makes 2, 0 and 1 of the 3 lines"),
        ({"train": "a\nb\nc\n"}, (0.6, 0.6), "makes -1, 2 and 2 of the 3 lines"),
        ({"valid": "a\n"}, (0.1, 0.1), "has no train.txt"),
        ({"train": ""}, (0.1, 0.1), "train.txt is empty"),
    ],
)
def test_bad_splits(texts, split, message, tmp_path):
    with pytest.raises(CorpusError, match=message):
        Corpus(folder_of(tmp_path / "c", texts), split=split)


@pytest.fixture
def long_texts():
    generator = torch.Generator().manual_seed(0)
    # The square makes some words rare.
    ids = (torch.rand(3000, generator=generator) ** 2 * 60).int().tolist()
    lines = [" ".join(f"w{i}" for i in ids[n : n + 10]) for n in range(0, 3000, 10)]
    return "\n".join(lines) + "\n"


def test_all_stages_on_one_text_with_a_small_vocabulary(script, long_texts, tmp_path):
    folder, model = folder_of(tmp_path / "c", {"train": long_texts}), tmp_path / "m.pt"
    flags = ["--data", folder, "--save", model]
    few = [*TINY, "--lr", 5, "--max-batches", 3]
    status, _, err = script("main", *flags, *few, "--epochs", 1)
    assert status == 1
    assert "--split" in err
    cut = [*flags, *few, "--split", 0.1, 0.1, "--vocab-size", 20]
    status, out, err = script("main", *cut, "--epochs", 2)
    assert (status, err) == (0, "")
    # Of the words and <eos>, 19 are kept, and <unk> is new.
    rare = len(set(long_texts.split())) + 1 - 19
    assert f"| vocabulary of 20 words, {rare} rarer words left out" in out
    vocabulary = checkpoint.load(model).dictionary.idx2word
    assert len(vocabulary) == 20
    assert {"<unk>", "<eos>"} <= set(vocabulary)
    # The later stages take vocabulary and split from the file, whichever stage wrote it last.
    for argv in (
        ["main", "--resume", model, "--data", folder, "--epochs", 3, "--max-batches", 3],
        ["finetune", *flags, *TINY, "--lr", 5, "--max-batches", 20, "--epochs", 2],
        ["pointer", *flags, "--max-batches", 2, "--bptt", 20],
    ):
        status, out, err = script(*argv)
        assert (status, err) == (0, ""), argv
        assert "are not in the model's vocabulary: read as <unk>" in out
    written = checkpoint.load(model)
    assert (written.stage, written.args["split"]) == ("finetune.py", [0.1, 0.1])
    for flag in (["--vocab-size", 10], ["--min-count", 2]):
        status, _, err = script("main", "--init", model, *flags[:2], *flag)
        assert status == 1
        assert f"{flag[0]} makes a vocabulary" in err


def test_a_model_of_a_text_that_is_mostly_unknown_words(script, corpus_dir, tmp_path):
    model, test = tmp_path / "m.pt", corpus_dir / "test.txt"
    flags = ["--data", corpus_dir, "--save", model, *TINY, "--lr", 5, "--epochs", 1]
    script("main", *flags, "--vocab-size", 10)
    for argv in (
        ["main", "--resume", model, "--epochs", 2],
        ["finetune", *flags],
        ["score", "--checkpoint", model, test],
    ):
        status, out, _ = script(*argv)
        assert status == 0, argv
        assert re.search(r"\([67].\...%\) are not in the model's|: 223 of 324 tokens", out), argv


def test_finetuning_on_another_corpus(script, long_texts, corpus_dir, trained, tmp_path):
    # Some words of the other corpus are in the model's vocabulary.
    lines = long_texts.replace("w1", "z1").splitlines(keepends=True)
    texts = {"train": lines[:200], "valid": lines[200:250], "test": lines[250:]}
    other = folder_of(tmp_path / "other", {k: "".join(v) for k, v in texts.items()})
    model = tmp_path / "m.pt"
    flags = ["--data", other, "--save", model, *TINY, "--lr", 5, "--epochs", 1]
    script("main", "--data", corpus_dir, "--save", model, *TINY, "--lr", 5, "--epochs", 1,
           "--max-batches", 2, "--vocab-size", 50)  # fmt: skip
    before = checkpoint.load(model).dictionary.idx2word
    status, out, err = script("finetune", *flags)
    assert (status, err) == (0, "")
    assert "read as <unk>" in out
    assert "| End of training | test loss" in out
    assert checkpoint.load(model).dictionary.idx2word == before
    status, out, _ = script("main", "--init", model, *flags[:3], tmp_path / "n.pt", *flags[4:])
    assert status == 0
    assert "read as <unk>" in out
    # A text of mostly unknown words is refused.
    (other / "train.txt").write_text("z1 z2\n" * 900)
    for argv in (
        ["finetune", *flags],
        ["pointer", *flags[:4]],
        ["score", "--checkpoint", model, "--text", "z1 z2 w2"],
    ):
        status, _, err = script(*argv)
        assert status == 1
        assert re.search("[5-9].% of the tokens of .* are not in the model's vocabulary", err)
    # Unknown words are refused if the vocabulary has no <unk>.
    plain = ["--save", trained["LSTM"], "--data", other]
    status, _, err = script("finetune", *plain)
    assert status == 1
    assert "no <unk> to read them as" in err
    assert len(err.splitlines()) == 1
