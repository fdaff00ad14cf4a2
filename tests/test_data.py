"""data.py and files/encoded.py: encoding compared with a double loop, errors, the cache."""

import os
import random
import re
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CORPORA, ROOT, full_disk

from data import Corpus, CorpusError, Dictionary, partial_shuffle
from files import encoded as encoded_files

SAMPLE = ROOT / "data" / "sample"

TRAIN, VALID, TEST = "the cat sat\non the mat\n", "the dog\n\n", "a cat\n"
TEXTS = (TRAIN, VALID, TEST)


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    """Keep every test away from the real user's cache folder."""
    folder = tmp_path / "user-cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def write(folder, texts=TEXTS):
    """Write the three texts (str or bytes) as a corpus folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in zip(encoded_files.SPLITS, texts, strict=True):
        raw = text if isinstance(text, bytes) else text.encode("utf-8")
        (folder / f"{split}.txt").write_bytes(raw)
    return folder


def by_double_loop(folder):
    """The reference: line by line, word by word. Returns the vocabulary and three lists of ids."""
    dictionary = Dictionary()
    splits = []
    for split in ("train", "valid", "test"):
        ids = []
        with open(folder / f"{split}.txt", encoding="utf-8-sig") as lines:
            for line in lines:
                ids.extend(dictionary.add_word(word) for word in [*line.split(), "<eos>"])
        splits.append(ids)
    return dictionary, splits


def assert_same(corpus, dictionary, splits):
    assert corpus.dictionary.idx2word == dictionary.idx2word
    assert corpus.dictionary.word2idx == dictionary.word2idx
    assert corpus.dictionary.counter == dictionary.counter
    assert corpus.dictionary.total == dictionary.total
    for split, ids in zip(encoded_files.SPLITS, splits, strict=True):
        assert getattr(corpus, split).dtype == torch.int32
        assert getattr(corpus, split).tolist() == ids


def words(corpus, split):
    return [corpus.dictionary.idx2word[idx] for idx in getattr(corpus, split).tolist()]


def leftovers(folder):
    """The names of all files in a corpus folder except its texts."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".txt")


# Encoding


# Everything that str.split or a text file's line iteration treats specially, and lookalikes.
NASTY = [
    *"ab \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2028\u3000\ufeff\u200b\0é語\U0001f600",
    *("\n\n", "\r\n", "<eos>"),
]
ENDS = ["a", " ", "\n", "a\r", "\r\n", "\n ", "\x85"]  # so that no file is empty


@pytest.mark.parametrize("block_chars", [1, 2, 3, 5, 16, 1 << 17])
def test_same_as_the_double_loop_on_nasty_text(tmp_path, monkeypatch, block_chars):
    monkeypatch.setattr(encoded_files, "BLOCK_CHARS", block_chars)
    rng = random.Random(block_chars)
    for trial in range(60):
        texts = [
            "".join(rng.choices(NASTY, k=rng.randint(0, 40))) + rng.choice(ENDS) for _ in TEXTS
        ]
        marks = [rng.choice([b"", b"\xef\xbb\xbf"]) for _ in TEXTS]
        raw = [mark + text.encode("utf-8") for mark, text in zip(marks, texts, strict=True)]
        folder = write(tmp_path / str(trial), raw)
        assert_same(Corpus(folder, cache=False), *by_double_loop(folder))
        assert leftovers(folder) == []


@pytest.mark.parametrize("space", ["\t", " ", "\n"])
def test_a_text_is_read_in_small_blocks(tmp_path, monkeypatch, space):
    # A block that grew with the text took quadratic time.
    monkeypatch.setattr(encoded_files, "BLOCK_CHARS", 64)
    (tmp_path / "text").write_text(f"ab{space}" * 1000)
    blocks = list(encoded_files._text_blocks(tmp_path / "text", tick=lambda size: None))
    assert "".join(blocks).split() == ["ab"] * 1000
    assert max(map(len, blocks)) < 128


# The vocabulary


def test_dictionary_from_words_counts_as_add_word_does():
    added = Dictionary()
    assert [added.add_word(word) for word in ["b", "a", "b"]] == [0, 1, 0]
    built = Dictionary.from_words(["b", "a"], torch.tensor([2, 1]))
    assert len(built) == len(added) == 2
    assert (built.idx2word, built.word2idx) == (added.idx2word, added.word2idx)
    assert (
        (built.counter, built.total) == (added.counter, added.total) == (Counter({0: 2, 1: 1}), 3)
    )
    assert built.add_word("c") == 2


def test_a_given_vocabulary_decides_the_ids(tmp_path):
    folder = write(tmp_path / "c")
    vocabulary = Dictionary.from_words(
        ["extra", "a", "cat", "dog", "mat", "on", "<eos>", "sat", "the"], range(9)
    )
    for cache in (False, True, True):
        corpus = Corpus(folder, dictionary=vocabulary, cache=cache)
        assert corpus.dictionary is vocabulary
        assert words(corpus, "train") == ["the", "cat", "sat", "<eos>", "on", "the", "mat", "<eos>"]
        assert corpus.train.tolist()[:3] == [8, 2, 7]
        assert corpus.train.dtype == torch.int32
    assert vocabulary.counter == Counter(dict(enumerate(range(9))))
    # The cache holds the corpus's own ids, so a run without a given vocabulary can use it.
    assert_same(Corpus(folder), *by_double_loop(folder))


def test_sorted_by_frequency(tmp_path):
    rng = random.Random(0)
    often = {f"w{n}": rng.randint(1, 3) for n in range(300)}  # too many to be in order by chance
    text = "".join(f"{word} " * times for word, times in often.items())
    corpus = Corpus(write(tmp_path / "c", (text, "w0", "w0")))
    before = list(corpus.dictionary.idx2word)
    by_count = corpus.sorted_by_frequency()
    often["w0"] += 2
    often["<eos>"] = 3
    # Equal counts stay in order of first appearance.
    expected = sorted(often, key=lambda word: -often[word])
    assert by_count.dictionary.idx2word == expected
    assert by_count.dictionary.counter == Counter(dict(enumerate(map(often.get, expected))))
    assert by_count.dictionary.total == sum(often.values())
    for split in encoded_files.SPLITS:
        assert words(by_count, split) == words(corpus, split)
        assert getattr(by_count, split).dtype == torch.int32
    assert corpus.dictionary.idx2word == before, "the corpus it was made from stays as it was"


# Errors: one sentence each


def message(folder):
    with pytest.raises(CorpusError) as caught:
        Corpus(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_what_is_missing_or_of_another_kind(tmp_path):
    folder = write(tmp_path / "c")
    missing = message(tmp_path / "nowhere")
    assert re.search(r"no corpus folder .*nowhere.*getdata\.sh.*--data", missing)
    assert "is a file" in message(folder / "train.txt")
    (folder / "test.txt").unlink()
    assert re.search(r"has no test\.txt.*getdata\.sh.*--data", message(folder))
    (folder / "test.txt").mkdir()
    with pytest.raises(IsADirectoryError):
        Corpus(folder)


@pytest.mark.parametrize("nothing", [b"", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path, nothing):
    assert re.search(r"test\.txt is empty", message(write(tmp_path / "c", (TRAIN, VALID, nothing))))


@pytest.mark.parametrize("block_chars", [1, 4, 1 << 17])
@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"\xff", 1),
        (b"a\nb\ncaf\xe9\nd\n", 3),
        (b"a\r\nb\rc\r\xe9 x\n", 4),
        (b"\xef\xbb\xbfa\n\xe8\xaa", 2),
        ("a\n".encode("utf-16"), 1),
    ],
)
def test_not_utf8_names_the_line(tmp_path, monkeypatch, raw, line, block_chars):
    monkeypatch.setattr(encoded_files, "BLOCK_CHARS", block_chars)
    folder = write(tmp_path / "c", (TRAIN, raw, TEST))
    assert re.search(rf"line {line} of .*valid\.txt is not UTF-8", message(folder))


# The cache


@pytest.fixture
def no_encoding(monkeypatch):
    """Return a function that makes any further encoding of text fail."""

    def forbid():
        def encode(*_):
            pytest.fail("the text was encoded although a cache fits")

        monkeypatch.setattr(encoded_files, "_encode", encode)

    return forbid


def test_cache_gives_the_same_corpus(tmp_path, no_encoding):
    folder = write(tmp_path / "c", ("é \u200b\n", VALID, "\0 x\n"))
    reference = by_double_loop(folder)
    assert_same(Corpus(folder), *reference)
    assert leftovers(folder) == [encoded_files.CACHE_NAME]
    no_encoding()
    cached = Corpus(folder)
    assert_same(cached, *reference)
    cached.train[0] = 1  # is writable, like a fresh corpus; torch warns about read-only tensors


def test_cache_is_keyed_on_content_not_on_size_time_or_path(tmp_path, no_encoding):
    folder = write(tmp_path / "c")
    Corpus(folder)
    path = folder / "train.txt"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text(TRAIN.replace("cat", "cow"))
    os.utime(path, ns=times)
    assert_same(Corpus(folder), *by_double_loop(folder))
    # Moving text from one file to the next changes the content, not the concatenated bytes.
    write(folder, ("a\n", "b\nc\n", "d\n"))
    Corpus(folder)
    write(folder, ("a\nb\n", "c\n", "d\n"))
    corpus = Corpus(folder)
    assert words(corpus, "valid") == ["c", "<eos>"]
    # A moved corpus keeps its cache.
    moved = folder.rename(tmp_path / "moved")
    no_encoding()
    assert words(Corpus(moved), "valid") == ["c", "<eos>"]


def test_file_that_changes_between_hashing_and_encoding(tmp_path, monkeypatch):
    folder = write(tmp_path / "c")
    hash_files = encoded_files._hash_files

    def hash_then_change(path, names):
        key = hash_files(path, names)
        (path / "train.txt").write_text("changed meanwhile\n")
        return key

    monkeypatch.setattr(encoded_files, "_hash_files", hash_then_change)
    assert words(Corpus(folder), "train") == ["changed", "meanwhile", "<eos>"]
    monkeypatch.undo()
    (folder / "train.txt").write_text(TRAIN)
    assert_same(Corpus(folder), *by_double_loop(folder))


def test_a_link_in_the_caches_place_is_replaced_not_followed(tmp_path):
    folder = write(tmp_path / "c")
    (tmp_path / "thesis.tex").write_text("years of work")
    (folder / encoded_files.CACHE_NAME).symlink_to(tmp_path / "thesis.tex")
    assert_same(Corpus(folder), *by_double_loop(folder))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert not (folder / encoded_files.CACHE_NAME).is_symlink()


def test_no_damaged_cache_is_used_or_fatal(tmp_path):
    folder = write(tmp_path / "c")
    reference = by_double_loop(folder)
    assert_same(Corpus(folder), *reference)
    path = folder / encoded_files.CACHE_NAME
    key = encoded_files._hash_files(folder)
    intact = path.read_bytes()
    for size in range(len(intact)):
        path.write_bytes(intact[:size])
        assert encoded_files._read_cache(path, key) is None
    for position in range(len(intact)):
        damaged = bytearray(intact)
        damaged[position] ^= 0x08
        path.write_bytes(damaged)
        assert encoded_files._read_cache(path, key) is None
    assert_same(Corpus(folder), *reference)
    assert path.read_bytes() == intact, "rebuilt"


def test_user_cache_folder_when_the_corpus_folder_cannot_be_written(
    tmp_path, user_cache, no_encoding
):
    folder = write(tmp_path / "c")
    # Root may write to a read-only folder; nobody can replace a folder by a file.
    (folder / encoded_files.CACHE_NAME).mkdir()
    Corpus(folder)
    assert os.listdir(user_cache / "awd-lstm-lm") == [encoded_files._hash_files(folder)]
    no_encoding()
    assert words(Corpus(folder), "valid") == ["the", "dog", "<eos>", "<eos>"]


def test_full_disk_leaves_no_half_made_file(tmp_path, user_cache):
    folder = write(tmp_path / "c")
    with full_disk(100):
        corpus = Corpus(folder)
    assert_same(corpus, *by_double_loop(folder))
    assert leftovers(folder) == []
    assert not [path for path in user_cache.rglob("*") if path.is_file()]


def test_many_at_once(tmp_path, user_cache):
    folder = write(tmp_path / "c", ("a b c\n" * 2000, VALID, TEST))
    reference = by_double_loop(folder)
    results = []
    gate = threading.Barrier(8)

    def load():
        gate.wait()
        results.append(Corpus(folder))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for corpus in results:
        assert_same(corpus, *reference)
    assert leftovers(folder) == [encoded_files.CACHE_NAME]
    assert not user_cache.exists()


# The corpora themselves


def test_sample_is_as_its_readme_says():
    corpus = Corpus(SAMPLE, cache=False)
    readme = (SAMPLE / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (train|valid|test) \| ([\d,]+) \|", readme, flags=re.M))
    stated = {split: int(tokens.replace(",", "")) for split, tokens in rows.items()}
    assert stated == {split: len(getattr(corpus, split)) for split in encoded_files.SPLITS}
    vocabulary = re.search(r"vocabulary of ([\d,]+) words", readme)
    assert int(vocabulary[1].replace(",", "")) == len(corpus.dictionary)

    counts = np.bincount(corpus.train.numpy(), minlength=len(corpus.dictionary))
    assert counts.min() >= 3, "no word is rarer than 3 in train, none in valid and test is unseen"
    assert 180_000 < corpus.dictionary.total < 220_000
    for split in ("valid", "test"):
        log_probs = np.log(counts / counts.sum())[getattr(corpus, split).numpy()]
        perplexity = float(np.exp(-log_probs.mean()))
        stated_perplexity = float(re.search(rf"\| {split} \|.*\| ([\d.]+) \|$", readme, re.M)[1])
        assert perplexity == pytest.approx(stated_perplexity, abs=0.006)


@pytest.mark.corpora
@pytest.mark.parametrize(
    ("name", "tokens", "vocabulary"),
    [
        ("penn", (929_589, 73_760, 82_430), 10_000),
        ("pennchar", (5_017_483, 393_043, 442_424), 50),
        ("wikitext-2", (2_088_628, 217_646, 245_569), 33_278),
    ],
)
def test_published_counts(name, tokens, vocabulary):
    folder = CORPORA / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    corpus = Corpus(folder, cache=False)
    assert tuple(len(getattr(corpus, split)) for split in encoded_files.SPLITS) == tokens
    assert len(corpus.dictionary) == vocabulary
    assert corpus.dictionary.total == sum(tokens)
    if name == "penn":
        assert_same(corpus, *by_double_loop(folder))


def test_partial_shuffle_rotates_every_column_by_its_own_offset():
    text = torch.arange(300).view(3, 100).t().contiguous().int()
    columns = [column.tolist() for column in text.t()]
    partial_shuffle(text, np.random.RandomState(4))
    offsets = [
        column.tolist().index(first[0]) for column, first in zip(text.t(), columns, strict=True)
    ]
    assert len(set(offsets)) == 3
    for column, before, offset in zip(text.t(), columns, offsets, strict=True):
        assert column.tolist() == before[-offset:] + before[:-offset]
