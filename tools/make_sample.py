"""Make data/sample from the King James Bible: `python tools/make_sample.py [TEXT] [--out DIR]`.

TEXT is a file with the output of `bible -f gen1:1-rev22:21` (Debian's package bible-kjv: one verse
a line, such as `Ge1:3 And God said, ...`); without it the command itself is run. The three files
go to DIR (data/sample by default), and their figures are printed as rows for its README.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
from collections import Counter
from pathlib import Path

COMMAND = ["bible", "-f", "gen1:1-rev22:21"]
# Only narrative prose, so that the text is of one kind: no laws, lists or poems.
BOOKS = ["Ge", "Exo", "Jdgs", "Ruth", "1Sm", "2Sm", "1Ki", "2Ki", "Est"]
VERSE = re.compile(r"(\d?[A-Za-z]+)(\d+):\d+ (.*)")
WORD = re.compile(r"[a-z]+(?:-[a-z]+)*|'s\b")
MIN_COUNT = 3
SPLITS = ("train", "valid", "test")


def words_of(verse: str) -> list[str]:
    """Return the verse's words: lower case, no punctuation, the possessive 's a word of its own."""
    return WORD.findall(verse.lower())


def split_by_chapter(text: str) -> dict[str, list[list[str]]]:
    """Split the chosen books: of every ten chapters the ninth is valid, the tenth test."""
    verses: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    chapters: dict[tuple[str, str], int] = {}
    for line in text.splitlines():
        match = VERSE.fullmatch(line.strip())
        if match is None:
            raise SystemExit(f"not a verse as `{' '.join(COMMAND)}` prints it: {line!r}")
        book, chapter, verse = match.groups()
        if book in BOOKS:
            number = chapters.setdefault((book, chapter), len(chapters))
            split = {8: "valid", 9: "test"}.get(number % 10, "train")
            verses[split].append(words_of(verse))
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


def unigram_perplexity(train: Counter[str], tokens: Counter[str]) -> float:
    """Return exp of the mean of -log p(token), p being the share of the token in train.

    Both are counts of tokens, `<eos>` included; every token has to occur in train.
    """
    total = train.total()
    log_probs = sum(count * math.log(train[token] / total) for token, count in tokens.items())
    return math.exp(-log_probs / tokens.total())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", type=Path, help="the whole text, one verse a line")
    default = Path(__file__).resolve().parent.parent / "data" / "sample"
    parser.add_argument("--out", type=Path, default=default, help="folder for the three files")
    args = parser.parse_args(argv)
    if args.text is None:
        # The command gets no input: on a terminal it would start to ask questions.
        try:
            text = subprocess.run(
                COMMAND, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
            ).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"`{' '.join(COMMAND)}` failed ({error}): install Debian's package bible-kjv, or "
                "give its output as a file"
            ) from None
    else:
        text = args.text.read_text(encoding="utf-8")

    verses = split_by_chapter(text)
    replace_rare(verses)
    args.out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split in SPLITS:
        lines = "".join(f"{' '.join(verse)}\n" for verse in verses[split])
        (args.out / f"{split}.txt").write_text(lines, encoding="utf-8", newline="\n")
        counts[split] = Counter(lines.replace("\n", " <eos> ").split())

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
