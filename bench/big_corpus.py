"""Time and memory of a made-up corpus of WikiText-103's size: encoding it, and one rank's columns.

Run as `python bench/big_corpus.py` from the repository's root; it needs 1.2 GB under --scratch.
Memory is the peak of the process's private pages (RssAnon) above an import of torch; the encoded
file is mapped, and its pages belong to all processes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bench.common import print_heading
from data import Corpus
from run.ranks import Ranks

COLUMNS = 80


def make(folder: Path, tokens: int, words: int) -> None:
    """Lines of 25 words whose ranks follow Zipf's law, and every word at least once."""
    rng = np.random.RandomState(0)
    for name, size in (("train", tokens), ("valid", 200_000), ("test", 200_000)):
        with open(folder / f"{name}.txt", "w", encoding="utf-8") as file:
            if name == "train":
                file.write(" ".join(f"w{n}" for n in range(words - 1)) + "\n")
            for _ in range(0, size, 2_500_000):
                count = min(size, 2_500_000)
                ranks = ((words - 1) ** rng.random_sample(count)).astype(int) - 1
                lines = np.char.add("w", ranks.astype(str)).reshape(-1, 25)
                file.writelines(" ".join(line) + "\n" for line in lines)


def own_memory() -> int:
    """Bytes that belong to this process alone."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def load(folder: Path, rank: int, world: int) -> None:
    """Load as one of several processes, and print its time and memory as JSON."""
    before, highest, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    corpus = Corpus(folder)
    parts = [corpus.columns("train", COLUMNS, *Ranks(rank, world).span(COLUMNS))]
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    kept = own_memory() - before
    found = {"seconds": seconds, "highest": highest - before, "kept": kept}
    print(json.dumps({**found, "columns": parts[0].shape, "words": len(corpus.dictionary)}))


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--words", type=int, default=267_000)
    parser.add_argument("--scratch", type=Path, help="folder for the made corpus")
    parser.add_argument("--load", nargs=3, metavar=("FOLDER", "RANK", "WORLD"), help="one process")
    args = parser.parse_args(argv)
    if args.load:
        load(Path(args.load[0]), int(args.load[1]), int(args.load[2]))
        return
    print_heading(f"{args.tokens:,} tokens, {args.words:,} words, {COLUMNS} columns")
    print("| process | s | peak MB | MB kept | train (rows, columns) |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        make(Path(scratch), args.tokens, args.words)
        for what, rank, world in (
            ("encodes", 0, 1),
            ("from the cache, alone", 0, 1),
            ("from the cache, one of 8", 5, 8),
        ):
            command = [sys.executable, __file__, "--load", scratch, str(rank), str(world)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found = json.loads(output)
            print(
                f"| {what} | {found['seconds']:.1f} | {found['highest'] / 1e6:.0f} | "
                f"{found['kept'] / 1e6:.0f} | {tuple(found['columns'])} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
