"""Time loading a corpus: the classic double loop, ours, and ours from the cache.

Run as `python bench/corpus.py [--data DIR]` from the repository's root.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.common import in_turns, print_heading, spread
from data import EOS, SPLITS, Corpus, Dictionary

ROOT = Path(__file__).resolve().parent.parent


def load_by_double_loop(folder: Path) -> tuple[Dictionary, list[torch.Tensor]]:
    """Load as in the classic code: read each file once for the words, again for the ids."""
    dictionary = Dictionary()
    splits = []
    for split in SPLITS:
        path = folder / f"{split}.txt"
        tokens = 0
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                words = [*line.split(), EOS]
                tokens += len(words)
                for word in words:
                    dictionary.add_word(word)
        ids = torch.empty(tokens, dtype=torch.int64)
        token = 0
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                for word in [*line.split(), EOS]:
                    ids[token] = dictionary.word2idx[word]
                    token += 1
        splits.append(ids)
    return dictionary, splits


def load_into_list(folder: Path) -> tuple[Dictionary, list[torch.Tensor]]:
    """Load in one pass, into a list, as assigning single items of a tensor is slow."""
    dictionary = Dictionary()
    splits = []
    for split in SPLITS:
        ids: list[int] = []
        with (folder / f"{split}.txt").open(encoding="utf-8") as lines:
            for line in lines:
                ids.extend(dictionary.add_word(word) for word in [*line.split(), EOS])
        splits.append(torch.tensor(ids, dtype=torch.int32))
    return dictionary, splits


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="corpus folder (data/penn, or data/sample)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each, taken in turn")
    args = parser.parse_args(argv)
    penn = ROOT / "data" / "penn"
    source = args.data or (penn if penn.is_dir() else ROOT / "data" / "sample")

    # In a copy, so that no cache is written into the corpus's own folder.
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        reference = Corpus(source, cache=False)
        for split in SPLITS:
            shutil.copyfile(source / f"{split}.txt", folder / f"{split}.txt")
        ways: dict[str, Callable[[], object]] = {
            "classic double loop": lambda: load_by_double_loop(folder),
            "single loop into a list": lambda: load_into_list(folder),
            "ours, no cache": lambda: Corpus(folder, cache=False),
            "ours, from the cache": lambda: Corpus(folder),
        }
        dictionary, splits = load_by_double_loop(folder)
        assert dictionary.idx2word == reference.dictionary.idx2word
        for split, ids in zip(SPLITS, splits, strict=True):
            assert torch.equal(ids.int(), getattr(reference, split))

        seconds = in_turns(ways, args.runs)

    tokens = reference.dictionary.total
    print_heading(
        f"corpus {source.name}: {tokens:,} tokens in three files, vocabulary "
        f"{len(reference.dictionary):,}; median of {args.runs} interleaved runs, files in memory"
    )
    print("| loading | ms | fastest to slowest, ms | tokens/s | times the classic |")
    print("|---|---|---|---|---|")
    classic = statistics.median(seconds["classic double loop"])
    for way, times in seconds.items():
        median = statistics.median(times)
        rate = f"{tokens / median:,.0f} | {classic / median:.1f}"
        print(f"| {way} | {spread(times, 1e-3)} | {rate} |")


if __name__ == "__main__":
    main()
