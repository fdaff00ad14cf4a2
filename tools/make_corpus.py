"""Make a corpus folder for main.py from raw text.

The texts, UTF-8, are read line by line, one after the other; empty lines are left out. Tokens are

words       words, numbers and punctuation marks, each on its own
characters  single characters, with _ for the space
pieces      parts of words, from SentencePiece, whose model is kept as OUT/pieces.model

The last tenth of the lines becomes valid.txt and test.txt. The same texts and flags give the same
bytes.
"""

import argparse
import io
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run.interpreter  # noqa: F401

from checkpoint.model_file import in_short
from cli import types
from cli.parser import Parser
from files.encoded import SPLITS, UNK
from files.reading import not_utf8, opened
from run import program
from utils import ToolkitError

SPACE = "_"
# \w has no accents that are characters of their own, which many scripts write within words.
_MARKS = "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] == "M")
_LETTER = rf"[\w{re.escape(_MARKS)}]"
WORD = re.compile(
    rf"{UNK}|\d+(?:[.,]\d+)+|{_LETTER}+(?:['\u2019-]{_LETTER}+)*|(\S)\1*", re.IGNORECASE
)


def build_parser() -> Parser:
    """The command line of make_corpus.py."""
    parser = Parser("", __doc__)
    parser.flag("", "texts", nargs="+", metavar="TEXT", help="file of raw text, UTF-8")
    parser.flag("", "--out", required=True, metavar="FOLDER", help="corpus folder to make")
    kinds = ["words", "characters", "pieces"]
    parser.flag("", "--as", "words", "kind of tokens", dest="kind", choices=kinds)
    parser.flag("", "--lower", False, "write everything in lower case")
    parser.flag(
        "",
        "--vocab-size",
        8000,
        "number of pieces; for words, the limit in the main.py command that is printed",
        type=types.vocabulary_size,
    )
    return parser


def lines_of(texts: Sequence[str], lower: bool) -> Iterator[str]:
    """The lines of the files that are not empty, with single spaces between words.

    Raises OSError, and ToolkitError if a file is not UTF-8.
    """
    for path in texts:
        try:
            with opened(path, "r", encoding="utf-8-sig", newline="\n") as file:
                for text in file:
                    line = " ".join((text.lower() if lower else text).split())
                    if line:
                        yield line
        except UnicodeDecodeError:
            raise ToolkitError(not_utf8(path)) from None


def words(line: str) -> list[str]:
    """Words and numbers, and runs of one punctuation mark."""
    return [match[0] for match in WORD.finditer(line)]


def pieces(lines: Iterator[str], size: int, folder: Path) -> Callable[[str], list[str]]:
    """Train SentencePiece on lines, keep its model in the folder, and return its tokeniser."""
    try:
        import sentencepiece
    except ImportError:
        raise ToolkitError(
            "--as pieces needs the package sentencepiece: pip install sentencepiece"
        ) from None
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=size,
            # A short text has fewer pieces.
            hard_vocab_limit=False,
            # The sums of several threads would differ from run to run.
            num_threads=1,
            # The lines that SentencePiece keeps in memory: the first ones, not random ones.
            input_sentence_size=1_000_000,
            shuffle_input_sentence=False,
            max_sentence_length=2**24,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ToolkitError(
            f"SentencePiece makes no {size} pieces of this text ({in_short(error)}): choose "
            "another --vocab-size"
        ) from error
    (folder / "pieces.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return lambda line: processor.encode(line, out_type=str)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the folder; raises ToolkitError for problems the user can fix."""
    args = build_parser().parse_args(argv)
    out = Path(args.out)
    if os.path.lexists(out):
        raise ToolkitError(f"{out} exists already: name a new folder with --out")
    lines = sum(1 for _ in lines_of(args.texts, args.lower))
    if lines < 3:
        raise ToolkitError("the text needs three lines, for train, valid and test: split it up")
    held_out = max(1, lines // 20)
    counts = [lines - 2 * held_out, held_out, held_out]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        made = Path(folder) / out.name
        made.mkdir()
        vocabulary, marks = write(args, made, counts)
        made.rename(out)
    sizes = ", ".join(f"{name}.txt {n}" for name, n in zip(SPLITS, counts, strict=True))
    print(f"Wrote {out}: lines of {sizes}; {vocabulary} distinct tokens")
    if marks:
        print(f"The text has {marks} underscores of its own: they look like the mark of a space")
    print(f"For score.py: --tokens-are {args.kind}")
    rare = f"--vocab-size {args.vocab_size}" if vocabulary > args.vocab_size else "--min-count 2"
    rare = f"{rare} " if args.kind == "words" else ""
    print(f"\npython main.py --preset small --data {out} {rare}--save OWN.pt")


def write(args: argparse.Namespace, folder: Path, counts: Sequence[int]) -> tuple[int, int]:
    """Write the parts' files; the number of distinct tokens, and of the text's own SPACE marks."""
    tokenise = words if args.kind == "words" else lambda line: list(line.replace(" ", SPACE))
    if args.kind == "pieces":
        train = islice(lines_of(args.texts, args.lower), counts[0])
        tokenise = pieces(train, args.vocab_size, folder)
    lines, vocabulary, marks = lines_of(args.texts, args.lower), set(), 0
    for name, count in zip(SPLITS, counts, strict=True):
        with open(folder / f"{name}.txt", "w", encoding="utf-8", newline="\n") as file:
            for line in islice(lines, count):
                marks += line.count(SPACE) * (args.kind == "characters")
                tokens = tokenise(line)
                vocabulary.update(tokens)
                file.write(" ".join(tokens) + "\n")
    return len(vocabulary), marks


if __name__ == "__main__":
    program.run(main)
