"""Make data/sample from the King James Bible, Debian's package bible-kjv.

    bible -f gen1:1-rev22:21 </dev/null | python tools/make_sample.py

The input has one verse a line, such as `Ge1:3 And God said, ...`. The three files go to --out, and
their figures are printed as rows for its README.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from pathlib import Path

# Only narrative prose, so that the text is of one kind: no laws, lists or poems.
BOOKS = ["Ge", "Exo", "Jdgs", "Ruth", "1Sm", "2Sm", "1Ki", "2Ki", "Est"]
VERSE = re.compile(r"(\d?[A-Za-z]+)(\d+):\d+ (.*)")
WORD = re.compile(r"[a-z]+(?:-[a-z]+)*|'s\b")
MIN_COUNT = 3
SAMPLE = Path(__file__).resolve().parent.parent / "data" / "sample"
SPLITS = ("train", "valid", "test")


def split_by_chapter(text: str) -> dict[str, list[list[str]]]:
    """Split the chosen books: of every ten chapters the ninth is valid, the tenth test."""
    verses: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    chapters: dict[tuple[str, str], int] = {}
    for line in text.splitlines():
        match = VERSE.fullmatch(line.strip())
        if match is None:
            raise SystemExit(f"not a verse as bible -f prints it: {line!r}")
        book, chapter, verse = match.groups()
        if book in BOOKS:
            number = chapters.setdefault((book, chapter), len(chapters))
            split = {8: "valid", 9: "test"}.get(number % 10, "train")
            # Lower case, no punctuation, the possessive 's a word of its own.
            verses[split].append(WORD.findall(verse.lower()))
    missing = set(BOOKS) - {book for book, _ in chapters}
    if missing:
        raise SystemExit(f"the text lacks these books: {', '.join(sorted(missing))}")
    return verses


def replace_rare(verses: dict[str, list[list[str]]]) -> None:
    """Replace the words that train has fewer than MIN_COUNT times by <unk>, in every file."""
    counts = Counter(word for verse in verses["train"] for word in verse)
    for split in SPLITS:
        verses[split] = [
            [word if counts[word] >= MIN_COUNT else "<unk>" for word in verse]
            for verse in verses[split]
        ]


def token_counts(folder: Path, split: str) -> Counter[str]:
    """How often each token occurs in a file of the sample, `<eos>` once a line."""
    text = (folder / f"{split}.txt").read_text(encoding="utf-8")
    return Counter(text.replace("\n", " <eos> ").split())


def unigram_perplexity(train: Counter[str], tokens: Counter[str]) -> float:
    """Return exp of the mean of -log p(token), p being the share of the token in train.

    Both are counts of tokens, `<eos>` included; every token has to occur in train.
    """
    total = train.total()
    log_probs = sum(count * math.log(train[token] / total) for token, count in tokens.items())
    return math.exp(-log_probs / tokens.total())


def main(argv: list[str] | None = None) -> None:
    """Write the files and print their figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=SAMPLE, help="folder for the three files")
    args = parser.parse_args(argv)
    verses = split_by_chapter(sys.stdin.read())
    replace_rare(verses)
    args.out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = "".join(f"{' '.join(verse)}\n" for verse in verses[split])
        (args.out / f"{split}.txt").write_text(lines, encoding="utf-8", newline="\n")
    counts = {split: token_counts(args.out, split) for split in SPLITS}
    for split, tokens in counts.items():
        share = 100 * tokens["<unk>"] / tokens.total()
        perplexity = unigram_perplexity(counts["train"], tokens)
        print(
            f"| {split} | {tokens.total():,} | {tokens['<eos>']:,} | {share:.2f} % "
            f"| {perplexity:.2f} |"
        )
    print(f"vocabulary of {len(counts['train']):,} words")


if __name__ == "__main__":
    main()
