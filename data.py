"""Corpora: the vocabulary, and three texts as token ids."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from files.encoded import EOS, SPLITS, UNK, CorpusError, read
from utils import batchify


class Dictionary:
    """The vocabulary: words to ids and back, with the number of occurrences of each id.

    `counter` maps an id to its occurrences and `total` is their sum; both count tokens. `unk` is
    the word that stands for unknown ones, if the vocabulary has it, and `tokens_are` the kind of
    its tokens, one of scoring.spelling.KINDS, if main.py was given it.
    """

    def __init__(self) -> None:
        self.word2idx: dict[str, int] = {}
        self.idx2word: list[str] = []
        self.counter: Counter[int] = Counter()
        self.total = 0
        self.unk = UNK
        self.tokens_are = ""

    def __len__(self) -> int:
        return len(self.idx2word)

    def add_word(self, word: str) -> int:
        """Count one occurrence of `word`, which gets the next free id if new, and return its id."""
        idx = self.word2idx.get(word)
        if idx is None:
            idx = self.word2idx[word] = len(self.idx2word)
            self.idx2word.append(word)
        self.counter[idx] += 1
        self.total += 1
        return idx

    @classmethod
    def from_words(
        cls,
        words: Sequence[str],
        counts: Sequence[int] | None = None,
        unk: str = UNK,
        tokens_are: str = "",
    ) -> Dictionary:
        """Build the vocabulary in which `words[i]` has id `i` and occurred `counts[i]` times.

        Without `counts` every count is 0.
        """
        dictionary = cls()
        dictionary.unk, dictionary.tokens_are = unk, tokens_are
        dictionary.idx2word = list(words)
        dictionary.word2idx = {word: idx for idx, word in enumerate(dictionary.idx2word)}
        if counts is not None:
            # `counts` may be a list, an array or a tensor; the Counter holds plain ints.
            dictionary.counter = Counter(dict(enumerate(map(int, counts))))
            dictionary.total = sum(dictionary.counter.values())
        return dictionary


class Corpus:
    """A folder's train.txt, valid.txt and test.txt as token ids.

    `train`, `valid` and `test` are torch.int32 tensors of shape `(tokens,)`. Each line is split on
    white space and followed by one `<eos>`. Ids are given in order of first appearance over train,
    valid, test, unless `dictionary` (a model's vocabulary) says which ids to use; it then stays
    unchanged, counts included. With `cache`, the encoded corpus is kept beside the text, or in the
    user's cache folder, and used until the content of one of the three files changes.

    Words that `dictionary` lacks are read as its `<unk>`; `unknown` is the number of such tokens.
    With `split`, the fractions of lines for valid and test, the folder has only a train.txt: its
    last lines become test, the lines before those valid. Without `train` a missing train.txt is an
    empty `train`, and the corpus is not cached. `tick` gets the number of bytes of each read.

    Raises CorpusError if a file is missing, empty or not UTF-8, if the corpus has words that a
    `dictionary` without `<unk>` lacks, and if `split` leaves a part without lines; and OSError if a
    file cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dictionary: Dictionary | None = None,
        cache: bool = True,
        split: Sequence[float] | None = None,
        tick: Callable[[int], object] = lambda size: None,
        train: bool = True,
    ) -> None:
        folder = Path(path)
        encoded = read(folder, split, cache, tick, train)
        self._ids = dict(zip(SPLITS, encoded.splits, strict=True))
        # The id in `dictionary` for each id in `_ids`; None if they are the same.
        self._new_ids: np.ndarray | None = None
        self.unknown = 0
        if dictionary is None:
            self.dictionary = Dictionary.from_words(encoded.words, encoded.counts.tolist())
        else:
            self.dictionary = dictionary
            self._new_ids, lacking = _ids_in(dictionary, encoded.words, folder)
            self.unknown = int(encoded.counts[lacking].sum())

    def __len__(self) -> int:
        """The number of tokens in all three parts."""
        return sum(map(len, self._ids.values()))

    def part(self, split: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The ids of train, valid or test, or of the tokens from `first` to before `last`: (n,).

        A cached corpus stays in its file: only the part that is returned takes memory.
        """
        ids = np.array(self._ids[split][first:last])
        return torch.from_numpy(ids if self._new_ids is None else self._new_ids[ids])

    train = property(lambda self: self.part("train"), doc="(tokens,), int32.")
    valid = property(lambda self: self.part("valid"), doc="(tokens,), int32.")
    test = property(lambda self: self.part("test"), doc="(tokens,), int32.")

    def columns(
        self, split: str, count: int, first: int = 0, last: int | None = None
    ) -> torch.Tensor:
        """`batchify` of a part in `count` columns; only columns `first` to before `last` of it."""
        rows = len(self._ids[split]) // count
        last = count if last is None else last
        return batchify(self.part(split, first * rows, last * rows), last - first)

    def with_fewer_words(self, vocab_size: int | None = None, min_count: int = 0) -> Corpus:
        """Return the same corpus with rare words read as `<unk>`, the dictionary's `unk`.

        The words kept occur `min_count` times or more in train. If they are too many, the most
        frequent are kept, ties by first appearance, so that the vocabulary has at most `vocab_size`
        words, `<unk>` and `<eos>` included. Ids stay in order of first appearance; an `<unk>` that
        occurs nowhere is last.
        """
        old = self.dictionary
        counts = np.bincount(self.train, minlength=len(old))
        special = [old.word2idx[word] for word in (EOS, old.unk) if word in old.word2idx]
        keep = counts >= min_count
        keep[special] = True
        if vocab_size is not None:
            ranked = np.argsort(np.where(keep, -counts, 1), kind="stable")
            ranked = ranked[~np.isin(ranked, special)][: max(0, vocab_size - 2)]
            keep &= np.isin(np.arange(len(old)), [*ranked, *special])
        words: dict[str, int] = {}
        new_ids = np.empty(len(old), dtype=np.int32)
        for idx, word in enumerate(old.idx2word):
            new_ids[idx] = words.setdefault(word if keep[idx] else old.unk, len(words))
        words.setdefault(old.unk, len(words))
        occurrences = np.zeros(len(words), dtype=np.int64)
        np.add.at(occurrences, new_ids, [old.counter[idx] for idx in range(len(old))])
        return self._renumbered(new_ids, list(words), occurrences)

    def sorted_by_frequency(self) -> Corpus:
        """Return the same corpus with ids renumbered by falling count, ties in their old order.

        A split softmax needs this: it expects the frequent words at the low ids.
        """
        old = self.dictionary
        counts = np.array([old.counter[idx] for idx in range(len(old))], dtype=np.int64)
        order = np.argsort(-counts, kind="stable")  # order[new id] = old id
        new_ids = np.empty(len(order), dtype=np.int32)
        new_ids[order] = np.arange(len(order), dtype=np.int32)

        words = [old.idx2word[idx] for idx in order.tolist()]
        return self._renumbered(new_ids, words, counts[order])

    def _renumbered(self, new_ids: np.ndarray, words: list[str], counts: np.ndarray) -> Corpus:
        """Return a copy with the vocabulary `words`; `new_ids` has the new id of each old one."""
        renumbered = copy.copy(self)
        old = self.dictionary
        renumbered.dictionary = Dictionary.from_words(
            words, counts.tolist(), old.unk, old.tokens_are
        )
        renumbered._new_ids = new_ids if self._new_ids is None else new_ids[self._new_ids]
        return renumbered


def partial_shuffle(text: torch.Tensor, rng: np.random.RandomState) -> None:
    """Rotate every column of `text` (rows, columns) by a random offset of its own, in place.

    "Partially Shuffling the Training Data to Improve Language Models", arXiv 1903.04167: sentences
    stay intact except one per column, and every epoch has different batches.
    """
    for column, offset in enumerate(rng.randint(len(text), size=text.size(1))):
        text[:, column] = text[:, column].roll(int(offset))


def _ids_in(dictionary: Dictionary, words: list[str], folder: Path) -> tuple[np.ndarray, list[int]]:
    """Return the ids of `words` in `dictionary`, int32, and the positions of words it lacks."""
    unk = dictionary.word2idx.get(dictionary.unk, -1)
    ids = [dictionary.word2idx.get(word) for word in words]
    unknown = [place for place, idx in enumerate(ids) if idx is None]
    if unknown and unk < 0:
        examples = ", ".join(repr(words[place]) for place in unknown[:3])
        noun = "word" if len(unknown) == 1 else "words"
        raise CorpusError(
            f"the corpus {folder} has {len(unknown)} distinct {noun} that the model's vocabulary "
            f"lacks, such as {examples}, and the vocabulary has no {dictionary.unk} to read them "
            "as: use the corpus that the model was trained on, or train a model on this one"
        )
    for place in unknown:
        ids[place] = unk
    return np.array(ids, np.int32), unknown
