"""A corpus's texts as token ids, and a cache of them, keyed on the content of the files."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np

from files.reading import not_utf8, opened
from files.writing import replacing
from utils import ToolkitError

EOS, UNK = "<eos>", "<unk>"
SPLITS = ("train", "valid", "test")

# Text is read in blocks of this size, so that no corpus fills the memory. A block's words stay in
# the processor's cache, which is a fifth faster than blocks of 4 MiB.
BLOCK_CHARS = 1 << 17

CACHE_NAME = ".corpus-cache"
CACHE_FORMAT = b"awd-lstm-lm corpus cache 2"


class CorpusError(ToolkitError):
    """A corpus that is missing, cannot be read, or does not fit the model's vocabulary."""


@dataclass
class Encoded:
    """A corpus with ids in order of first appearance."""

    words: list[str]
    counts: np.ndarray  # (vocabulary,) int64: occurrences over all three files
    splits: list[np.ndarray]  # train, valid, test: (tokens,) int32


def read(
    folder: Path,
    split: Sequence[float] | None,
    cache: bool,
    tick: Callable[[int], object],
    train: bool,
) -> Encoded:
    """Encode the texts of a corpus folder; arguments and errors are those of `data.Corpus`."""
    _check_files(folder, split is not None, train)
    if split is None and not (folder / "train.txt").exists():
        others = _encode(folder, tick, SPLITS[1:])
        return replace(others, splits=[np.empty(0, np.int32), *others.splits])
    names = SPLITS if split is None else SPLITS[:1]
    encoded = (_encode_cached if cache else _encode)(folder, tick, names)
    return encoded if split is None else _split_lines(encoded, split, folder)


def _check_files(folder: Path, split: bool, train: bool) -> None:
    """Raise CorpusError unless the folder has the three files, with `split` train.txt alone.

    Without `train` and `split` train.txt may be missing.
    """
    if folder.is_file():
        raise CorpusError(
            f"{folder} is a file: --data takes the folder that holds train.txt, valid.txt and "
            "test.txt"
        )
    if not folder.is_dir():
        raise CorpusError(
            f"there is no corpus folder {folder}: fetch one with ./getdata.sh NAME, give another "
            "with --data, or try --data data/sample"
        )
    names = [f"{split}.txt" for split in SPLITS]
    found = [name for name in names if (folder / name).exists()]
    if split and "train.txt" in found[:-1]:
        raise CorpusError(f"{folder} has a {found[1]} already: leave --split out, or move it away")
    if not split and found == ["train.txt"]:
        raise CorpusError(
            f"the corpus folder {folder} has a train.txt alone: cut valid and test off its end "
            "with --split 0.05 0.05, or bring valid.txt and test.txt"
        )
    needed = names[:1] if split else names if train else names[1:]
    missing = [name for name in needed if name not in found]
    if missing:
        raise CorpusError(
            f"the corpus folder {folder} has no {' and no '.join(missing)}: fetch the corpus with "
            "./getdata.sh NAME, or give another folder with --data"
        )


def _split_lines(encoded: Encoded, split: Sequence[float], folder: Path) -> Encoded:
    """Cut valid and test off the end of the only part, each a given fraction of the lines."""
    (ids,) = encoded.splits
    ends = np.flatnonzero(ids == encoded.words.index(EOS)) + 1
    valid, test = (round(fraction * len(ends)) for fraction in split)
    train = len(ends) - valid - test
    if min(train, valid, test) < 1:
        raise CorpusError(
            f"--split {split[0]:g} {split[1]:g} makes {train}, {valid} and {test} of the "
            f"{len(ends)} lines of {folder / 'train.txt'} train, valid and test: each needs at "
            "least one line"
        )
    cuts = [ends[train - 1], ends[train + valid - 1]]
    return Encoded(encoded.words, encoded.counts, np.split(ids, cuts))


# Reading and encoding


def _text_blocks(path: Path, tick: Callable[[int], object]) -> Iterator[str]:
    r"""Yield the file's text in blocks that cut no word, with every line ended by one "\n".

    `tick` gets the number of bytes of each read. Raises OSError, and CorpusError if the file cannot
    be decoded.
    """
    rest: list[str] = []
    last_char, place = "\n", 0
    try:
        with opened(path, "r", encoding="utf-8-sig") as file:  # without a byte order mark
            while block := file.read(BLOCK_CHARS):
                last_char, before, place = block[-1], place, file.buffer.tell()
                tick(place - before)
                cut = max(map(block.rfind, " \n\t")) + 1
                if cut:
                    yield "".join([*rest, block[:cut]])
                    rest = []
                rest.append(block[cut:])
    except UnicodeDecodeError:
        raise CorpusError(not_utf8(path)) from None
    if last_char != "\n":
        yield "".join([*rest, "\n"])


def _encode(folder: Path, tick: Callable[[int], object], names: Sequence[str]) -> Encoded:
    """Encode the files of `names`."""
    # The first look-up of a word gives it the counter's next number, all in C.
    word2idx: defaultdict[str, int] = defaultdict(count().__next__)
    splits = []
    for split in names:
        path = folder / f"{split}.txt"
        ids = array("i")  # one that grows: pieces to be joined leave holes in the memory
        for text in _text_blocks(path, tick):
            ids.extend(map(word2idx.__getitem__, text.replace("\n", f" {EOS} ").split()))
        if not ids:
            raise CorpusError(
                f"{path} is empty: fetch the corpus again with ./getdata.sh NAME, or give another "
                "folder with --data"
            )
        splits.append(np.frombuffer(ids, np.int32))
    return Encoded(list(word2idx), _count(splits, len(word2idx)), splits)


def _count(splits: list[np.ndarray], vocabulary: int) -> np.ndarray:
    """Return how often each id occurs in all the splits together: (vocabulary,) int64."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    step = 1 << 22  # bincount makes a copy of twice the size
    for ids in splits:
        for start in range(0, len(ids), step):
            counts += np.bincount(ids[start : start + step], minlength=vocabulary)
    return counts


# The cache: a file of a line with a key and a checksum, a line of JSON, and the ids as they are in
# memory, which are mapped.


def _hash_files(folder: Path, names: Sequence[str] = SPLITS) -> str:
    """Return a digest of the files' contents and the cache's format, as hex digits."""
    key = _new_digest(CACHE_FORMAT)
    for split in names:
        digest = _new_digest()
        with opened(folder / f"{split}.txt") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        key.update(digest.digest())
    return key.hexdigest()


def _new_digest(content: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(content, digest_size=32)


def _cache_places(folder: Path, key: str) -> list[Path]:
    """Return the paths of a cache, best first: beside the corpus, in the user's cache folder."""
    places = [folder / CACHE_NAME]
    user_cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    if user_cache.is_absolute():  # there may be no home folder
        places.append(user_cache / "awd-lstm-lm" / key)
    return places


def _encode_cached(folder: Path, tick: Callable[[int], object], names: Sequence[str]) -> Encoded:
    """Read the encoded corpus from a cache that fits, else encode it and write a cache."""
    key = _hash_files(folder, names)
    places = _cache_places(folder, key)
    for path in places:
        if (encoded := _read_cache(path, key)) is not None:
            return encoded
    encoded = _encode(folder, tick, names)
    # Files that have changed meanwhile are not cached.
    for path in places if _hash_files(folder, names) == key else ():
        try:
            _write_cache(path, key, encoded)
            return _read_cache(path, key) or encoded
        except BlockingIOError:
            break  # another run is writing it
        except OSError:
            continue  # no run needs a cache: the encoded corpus stays in memory
    return encoded


def _read_cache(path: Path, key: str) -> Encoded | None:
    """The cached corpus, or None unless the cache is intact and belongs to the files of `key`.

    The ids are mapped from the file: they take memory only where and while they are used.
    """
    try:
        with opened(path) as file:
            first = file.readline(len(key) * 2 + 2)
            if not first.startswith(key.encode()):
                return None
            header = file.readline()
            ids = np.memmap(file, np.int32, "r", file.tell())
    except (OSError, ValueError):
        return None
    if first != _first_line(key, header, [ids]):
        return None
    content = json.loads(header)
    return Encoded(
        content["words"], np.array(content["counts"]), np.split(ids, np.cumsum(content["tokens"]))
    )


def _write_cache(path: Path, key: str, encoded: Encoded) -> None:
    """Write the cache in one step; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = [len(ids) for ids in encoded.splits[:-1]]
    content = {"tokens": tokens, "counts": encoded.counts.tolist(), "words": encoded.words}
    header = json.dumps(content).encode() + b"\n"
    with replacing(path, own=True) as file:
        file.write(_first_line(key, header, encoded.splits) + header)
        for ids in encoded.splits:
            file.write(ids.data)


def _first_line(key: str, header: bytes, splits: Sequence[np.ndarray]) -> bytes:
    checksum = _new_digest(header)
    for ids in splits:
        checksum.update(ids.data)
    return f"{key} {checksum.hexdigest()}\n".encode()
