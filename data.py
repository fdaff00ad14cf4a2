"""Corpora: text files to token ids, with a cache that is keyed on what the files hold."""

from __future__ import annotations

import copy
import hashlib
import os
import secrets
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch

from utils import ToolkitError

EOS, UNK = "<eos>", "<unk>"
SPLITS = ("train", "valid", "test")

# Text is read in blocks of this size: small enough that a block's words stay in the processor's
# cache, which is a fifth faster than blocks of 4 MiB, and that no corpus fills the memory.
BLOCK_BYTES = 1 << 17

CACHE_NAME = ".corpus-cache.npz"
CACHE_FORMAT = b"awd-lstm-lm corpus cache 1"
ZIP_MAGIC = b"PK\x03\x04"


class CorpusError(ToolkitError):
    """A corpus that is missing, cannot be read, or does not fit the model's vocabulary."""


class Dictionary:
    """The vocabulary: words to ids and back, with the number of occurrences of each id.

    `counter` maps an id to its occurrences and `total` is their sum; both count tokens.
    """

    def __init__(self) -> None:
        self.word2idx: dict[str, int] = {}
        self.idx2word: list[str] = []
        self.counter: Counter[int] = Counter()
        self.total = 0

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
    def from_words(cls, words: Sequence[str], counts: Sequence[int] | None = None) -> Dictionary:
        """Build the vocabulary in which `words[i]` has id `i` and occurred `counts[i]` times.

        Without `counts` nothing has occurred yet. Raises CorpusError when a word stands in the
        list twice or when there is not one count per word.
        """
        dictionary = cls()
        dictionary.idx2word = list(words)
        dictionary.word2idx = {word: idx for idx, word in enumerate(dictionary.idx2word)}
        if len(dictionary.word2idx) != len(dictionary.idx2word):
            twice = Counter(dictionary.idx2word).most_common(1)[0][0]
            raise CorpusError(
                f"the vocabulary holds the word {twice!r} more than once: "
                "rebuild it, each word must have one id"
            )
        if counts is not None:
            # A Counter of plain ints, whatever was handed over (list, array, tensor).
            numbers = [int(number) for number in counts]
            if len(numbers) != len(dictionary):
                raise CorpusError(
                    f"the vocabulary has {len(dictionary)} words but {len(numbers)} counts: "
                    "rebuild it, each word needs one count"
                )
            dictionary.counter = Counter(dict(enumerate(numbers)))
            dictionary.total = sum(numbers)
        return dictionary


class Corpus:
    """A folder's train.txt, valid.txt and test.txt as token ids.

    `train`, `valid` and `test` are torch.int32 tensors of shape `(tokens,)`. Each line is split on
    white space and followed by one `<eos>`. Ids are given in order of first appearance over train,
    valid, test, unless `dictionary` (a model's vocabulary) says which ids to use; it is then
    kept as it is, counts included. With `cache`, the encoded corpus is kept beside the text, or in
    the user's cache folder, and used for as long as the three files hold the same bytes.

    Words that `dictionary` lacks are read as `<unk>`, if it has that; `unknown` is the number of
    such tokens. With `split`, two fractions, the folder has only a train.txt, whose last lines
    become test, and those before them valid, each that share of all lines. `tick` is told of bytes
    as they are read.

    Raises CorpusError when a file is missing, empty, unreadable or not UTF-8, when the corpus has
    words that a `dictionary` without `<unk>` lacks, and when `split` leaves a part without a line.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dictionary: Dictionary | None = None,
        cache: bool = True,
        split: Sequence[float] | None = None,
        tick: Callable[[int], object] = lambda size: None,
    ) -> None:
        folder = Path(path)
        _check_files(folder, split is not None)
        if split is not None:
            encoded = _split_lines(_encode(folder, tick=tick, names=SPLITS[:1]), split, folder)
        elif cache:
            encoded = _encode_cached(folder, tick)
        else:
            encoded = _encode(folder, tick=tick)
        self.unknown = 0
        if dictionary is None:
            self.dictionary = Dictionary.from_words(encoded.words, encoded.counts.tolist())
            splits = encoded.splits
        else:
            self.dictionary = dictionary
            new_ids, lacking = _ids_in(dictionary, encoded.words, folder)
            splits = [new_ids[ids] for ids in encoded.splits]
            self.unknown = int(encoded.counts[lacking].sum())
        self.train, self.valid, self.test = (torch.from_numpy(ids) for ids in splits)

    def __len__(self) -> int:
        """The number of tokens in all three parts."""
        return len(self.train) + len(self.valid) + len(self.test)

    def with_fewer_words(self, vocab_size: int | None = None, min_count: int = 0) -> Corpus:
        """Return the same corpus with rare words read as `<unk>`.

        Kept are the words that occur `min_count` times or more in train, and of these the most
        frequent, ties by first appearance, so that the vocabulary has at most `vocab_size` words,
        `<unk>` and `<eos>` among them. Ids stay in order of first appearance. If nothing need go,
        the corpus is returned as it is.
        """
        old = self.dictionary
        counts = np.bincount(self.train.numpy(), minlength=len(old))
        special = [old.word2idx[word] for word in (EOS, UNK) if word in old.word2idx]
        keep = counts >= min_count
        keep[special] = True
        if vocab_size is not None and (keep.sum() > vocab_size or not keep.all()):
            room = max(0, vocab_size - 2)
            ranked = np.argsort(np.where(keep, -counts, 1), kind="stable")
            ranked = ranked[~np.isin(ranked, special)][:room]
            keep &= np.isin(np.arange(len(old)), [*ranked, *special])
        if keep.all():
            return self
        words: dict[str, int] = {}
        new_ids = np.empty(len(old), dtype=np.int32)
        for idx, word in enumerate(old.idx2word):
            new_ids[idx] = words.setdefault(word if keep[idx] else UNK, len(words))
        occurrences = np.zeros(len(words), dtype=np.int64)
        np.add.at(occurrences, new_ids, [old.counter[idx] for idx in range(len(old))])
        return self._renumbered(new_ids, list(words), occurrences)

    def sorted_by_frequency(self) -> Corpus:
        """Return the same corpus with ids renumbered by falling count, ties in their old order.

        A split softmax needs this: it takes the low ids for the frequent words.
        """
        old = self.dictionary
        counts = np.array([old.counter[idx] for idx in range(len(old))], dtype=np.int64)
        order = np.argsort(-counts, kind="stable")  # order[new id] = old id
        new_ids = np.empty(len(order), dtype=np.int32)
        new_ids[order] = np.arange(len(order), dtype=np.int32)

        words = [old.idx2word[idx] for idx in order.tolist()]
        return self._renumbered(new_ids, words, counts[order])

    def _renumbered(self, new_ids: np.ndarray, words: list[str], counts: np.ndarray) -> Corpus:
        """Return a copy under `new_ids`, one for each old id, which are those of `words`."""
        renumbered = copy.copy(self)
        renumbered.dictionary = Dictionary.from_words(words, counts.tolist())
        for split in SPLITS:
            ids = getattr(self, split).numpy()
            setattr(renumbered, split, torch.from_numpy(new_ids[ids]))
        return renumbered


@dataclass
class _Encoded:
    """A corpus under its own ids, by first appearance."""

    words: list[str]
    counts: np.ndarray  # (vocabulary,) int64: occurrences over all three files
    splits: list[np.ndarray]  # train, valid, test: (tokens,) int32


def _check_files(folder: Path, split: bool = False) -> None:
    """Raise CorpusError unless the folder has its files, with `split` a train.txt and no other."""
    try:
        is_file, is_folder = folder.is_file(), folder.is_dir()
        names = [f"{split}.txt" for split in SPLITS]
        missing = [name for name in names if is_folder and not (folder / name).exists()]
        given = [name for name in names if name not in missing]
    except OSError as error:
        raise _cannot_read(folder, error) from None
    if is_file:
        raise CorpusError(
            f"{folder} is a file: --data takes the folder that holds train.txt, valid.txt and "
            "test.txt"
        )
    if not is_folder:
        raise CorpusError(
            f"there is no corpus folder {folder}: fetch one with ./getdata.sh NAME, or say with "
            "--data where it is"
        )
    if split:
        others = [name for name in given if name != "train.txt"]
        if others and "train.txt" in given:
            raise CorpusError(
                f"{folder} has a {others[0]} already: leave --split out, or move it away"
            )
        missing = [name for name in missing if name == "train.txt"]
    elif missing == names[1:]:
        raise CorpusError(
            f"the corpus folder {folder} has a train.txt alone: cut valid and test off its end "
            "with --split 0.05 0.05, or bring valid.txt and test.txt"
        )
    if missing:
        raise CorpusError(
            f"the corpus folder {folder} has no {' and no '.join(missing)}: fetch the corpus with "
            "./getdata.sh NAME, or give another folder with --data"
        )


def _cannot_read(path: Path, error: OSError) -> CorpusError:
    return CorpusError(
        f"cannot read {path} ({error.strerror or error}): check the file and its permissions"
    )


def _ids_in(dictionary: Dictionary, words: list[str], folder: Path) -> tuple[np.ndarray, list[int]]:
    """Return the id in `dictionary` of each of `words`, int32, and the places of those it lacks."""
    unk = dictionary.word2idx.get(UNK, -1)
    ids = [dictionary.word2idx.get(word) for word in words]
    unknown = [place for place, idx in enumerate(ids) if idx is None]
    if unknown and unk < 0:
        examples = ", ".join(repr(words[place]) for place in unknown[:3])
        noun = "word" if len(unknown) == 1 else "words"
        raise CorpusError(
            f"the corpus {folder} has {len(unknown)} distinct {noun} that the model's vocabulary "
            f"lacks, such as {examples}, and no {UNK} to read them as: use the corpus that the "
            "model was trained on, or train a model on this one"
        )
    for place in unknown:
        ids[place] = unk
    return np.array(ids, np.int32), unknown


def _split_lines(encoded: _Encoded, split: Sequence[float], folder: Path) -> _Encoded:
    """Cut valid and test off the end of the only part, each so much of all its lines."""
    (ids,) = encoded.splits
    ends = np.flatnonzero(ids == encoded.words.index(EOS)) + 1
    valid, test = (round(share * len(ends)) for share in split)
    train = len(ends) - valid - test
    if min(train, valid, test) < 1:
        raise CorpusError(
            f"--split {split[0]:g} {split[1]:g} makes {train}, {valid} and {test} of the "
            f"{len(ends)} lines of {folder / 'train.txt'} train, valid and test: each must have "
            "one or more"
        )
    cuts = [ends[train - 1], ends[train + valid - 1]]
    return _Encoded(encoded.words, encoded.counts, np.split(ids, cuts))


# Reading and encoding


def _text_blocks(
    path: Path,
    digest: hashlib.blake2b | None = None,
    tick: Callable[[int], object] = lambda size: None,
) -> Iterator[str]:
    r"""Yield the file's text in blocks that cut no word, with every line ended by one "\n".

    `digest` is fed the file's bytes, `tick` their number. Raises CorpusError when the file cannot
    be read or decoded.
    """
    line = 1
    encoding = "utf-8-sig"  # a byte order mark is dropped, at the file's start only
    rest = b""
    last_char = "\n"
    at_end = False
    try:
        with path.open("rb") as file:
            while not at_end:
                chunk = file.read(BLOCK_BYTES)
                tick(len(chunk))
                if digest is not None:
                    digest.update(chunk)
                at_end = not chunk
                block = rest + chunk
                # A space or "\n" is never part of a word, of a UTF-8 sequence or of a "\r\n" that
                # goes on after it, so a block may end there.
                cut = len(block) if at_end else max(block.rfind(b"\n"), block.rfind(b" ")) + 1
                block, rest = block[:cut], block[cut:]
                if not block:
                    continue
                text = block.decode(encoding)
                encoding = "utf-8"
                text = _universal_newlines(text)
                line += text.count("\n")
                last_char = text[-1:] or last_char
                yield text
    except UnicodeDecodeError as error:
        good = error.object[: error.start].decode("utf-8")
        line += _universal_newlines(good).count("\n")
        raise CorpusError(
            f"line {line} of {path} is not UTF-8: convert the file to UTF-8 (iconv does it)"
        ) from None
    except OSError as error:
        raise _cannot_read(path, error) from None
    if last_char != "\n":
        yield "\n"


def _universal_newlines(text: str) -> str:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def _encode(
    folder: Path,
    digests: list[hashlib.blake2b] | None = None,
    tick: Callable[[int], object] = lambda size: None,
    names: Sequence[str] = SPLITS,
) -> _Encoded:
    """Encode the files of `names`; `digests`, one for each, are fed the bytes that were encoded."""
    # A word that is looked up for the first time takes the counter's next number, all in C.
    word2idx: defaultdict[str, int] = defaultdict(count().__next__)
    splits = []
    for number, split in enumerate(names):
        path = folder / f"{split}.txt"
        pieces = []
        for text in _text_blocks(path, digests[number] if digests else None, tick):
            words = text.replace("\n", f" {EOS} ").split()
            pieces.append(np.fromiter(map(word2idx.__getitem__, words), np.int32, len(words)))
        if not any(map(len, pieces)):
            raise CorpusError(
                f"{path} is empty: fetch the corpus again with ./getdata.sh NAME, or give another "
                "folder with --data"
            )
        splits.append(np.concatenate(pieces))
    return _Encoded(list(word2idx), _count(splits, len(word2idx)), splits)


def _count(splits: list[np.ndarray], vocabulary: int) -> np.ndarray:
    """Return how often each id occurs in all the splits together: (vocabulary,) int64."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    step = 1 << 22  # bincount makes a copy of twice the size
    for ids in splits:
        for start in range(0, len(ids), step):
            counts += np.bincount(ids[start : start + step], minlength=vocabulary)
    return counts


# The cache


def _new_digests() -> list[hashlib.blake2b]:
    return [hashlib.blake2b(digest_size=32) for _ in SPLITS]


def _cache_key(digests: list[hashlib.blake2b]) -> str:
    """Return what the three files' contents and the cache's format come to, as hex digits."""
    parts = [CACHE_FORMAT, *(digest.digest() for digest in digests)]
    return hashlib.blake2b(b"".join(parts), digest_size=32).hexdigest()


def _hash_files(folder: Path) -> str:
    digests = _new_digests()
    for split, digest in zip(SPLITS, digests, strict=True):
        path = folder / f"{split}.txt"
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise _cannot_read(path, error) from None
    return _cache_key(digests)


def _cache_places(folder: Path, key: str) -> list[Path]:
    """Return where a cache may be, best first: beside the corpus, in the user's cache folder."""
    places = [folder / CACHE_NAME]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with suppress(RuntimeError):  # there may be no home folder
        user_cache = user_cache.expanduser()
    if user_cache.is_absolute():
        places.append(user_cache / "awd-lstm-lm" / f"{key}.npz")
    return places


def _encode_cached(folder: Path, tick: Callable[[int], object]) -> _Encoded:
    """Take the encoded corpus from a cache that fits, else encode it and leave a cache."""
    key = _hash_files(folder)
    for path in _cache_places(folder, key):
        encoded = _read_cache(path, key)
        if encoded is not None:
            return encoded
    # Hashed again while encoding: the key stays true if a file changes between the two readings.
    digests = _new_digests()
    encoded = _encode(folder, digests, tick)
    key = _cache_key(digests)
    for path in _cache_places(folder, key):
        if _write_cache(path, key, encoded):
            break
    return encoded


def _read_cache(path: Path, key: str) -> _Encoded | None:
    """Return what the cache holds, or None if it is not a whole cache of the files behind `key`."""
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
                return None
            file.seek(0)
            with np.load(file, allow_pickle=False) as stored:
                if _array(stored, "key", np.uint8).tobytes() != key.encode():
                    return None
                words = _array(stored, "words", np.uint8).tobytes().decode("utf-8").split("\n")
                counts = _array(stored, "counts", np.int64)
                splits = [_array(stored, split, np.int32) for split in SPLITS]
    except (
        OSError,
        EOFError,
        KeyError,
        ValueError,
        MemoryError,  # a damaged header can ask for any size,
        RuntimeError,  # a damaged zip for any compression or a password
        zipfile.BadZipFile,
        zlib.error,
    ):
        return None
    if len(counts) != len(words) or not all(map(len, splits)):
        return None
    if min(ids.min() for ids in splits) < 0 or max(ids.max() for ids in splits) >= len(words):
        return None
    return _Encoded(words, counts, splits)


def _array(stored: np.lib.npyio.NpzFile, name: str, dtype: type[np.generic]) -> np.ndarray:
    array = stored[name]
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
        raise ValueError(f"{name} is not a row of {dtype.__name__}")
    return array


def _write_cache(path: Path, key: str, encoded: _Encoded) -> bool:
    """Write the cache in one step, and say whether that worked: a cache is only a convenience."""
    # Two runs may write the same cache at once: each has a file of its own until it is whole.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    words = "\n".join(encoded.words).encode("utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.stat().st_mode & 0o222:
            return False  # marked read-only: root could write there all the same, and must not
        with temporary.open("xb") as file:
            np.savez(
                file,
                key=np.frombuffer(key.encode(), np.uint8),
                words=np.frombuffer(words, np.uint8),
                counts=encoded.counts,
                **dict(zip(SPLITS, encoded.splits, strict=True)),
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        return False
    finally:
        with suppress(OSError):  # already renamed, or never made
            temporary.unlink()
    return True
