"""Score any text with a trained model: log-probability, perplexity and bits per character.

The text is a FILE, --text, or standard input. It is read like a corpus: words are separated by
white space, and each line ends in one <eos>, which is scored like a word. The hidden state is
carried from line to line. A language model needs a first input: by default it is one <eos>, so that
the first word of the text is scored too. The report is written while the text is read.

Bits per character are the total bits divided by the characters of the scored text, which depend on
what the tokens are: see --tokens-are.
"""

import run.interpreter  # noqa: F401

import functools
import io
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import checkpoint
from cli import flags
from cli.parser import Parser
from cli.types import positive_int
from continuous_cache import ContinuousCache
from data import EOS
from files.reading import opened
from files.writing import check_writable, writing
from loss import TrainingLoss
from run import program
from run.corpus import check_known
from run.network import network_of
from run.progress import Bar
from scoring.page import to_html
from scoring.report import Report, notes, table_file
from scoring.scores import Scorer, states_of
from scoring.spelling import Spelling
from scoring.tokens import Reader, Summary, Token, by_line
from utils import ToolkitError

# Whole lines of about so many tokens are read, scored and written at a time.
BLOCK_TOKENS = 10_000


def build_parser() -> Parser:
    """The command line of score.py."""
    parser = Parser("score", __doc__)
    add = parser.group("text")
    add("file", [], "text to score; - is standard input", nargs="*", metavar="FILE")
    add("--text", metavar="WORDS", help="text to score, instead of a FILE")
    add("--as-corpus", False, "as main.py's test score: the first is an input")
    add("--independent", False, "score each line on its own, after one <eos>")
    add("--ids", False, "the first field of each line is its id, not scored")
    flags.add_tokens_are(parser)
    add("--chars", type=positive_int, help="characters of the original text, for bits/char")
    add("--words", type=positive_int, help="words of the original text, for the perplexity a word")
    add = parser.group("output")
    add("--lines", False, "one line of output for each line of text")
    add("--tokens", False, "one line of output for each token")
    add("--json", False, "JSON lines; the last one is the total")
    add("--tsv", metavar="FILE", help="write a table of tokens, or of --lines; - is all the output")
    add("--entropy", False, "add each prediction's entropy to --tsv and --json")
    add("--states", metavar="FILE", help="write each layer's output after each token, as .npz")
    add("--html", metavar="FILE", help="write a page with tokens coloured by their surprisal")
    add = parser.group("files")
    add("--checkpoint", "model.pt", "model file", metavar="FILE")
    add = parser.group("cache")
    add("--cache", False, "add the continuous cache, as pointer.py does")
    flags.add_cache(parser, needs="--cache")
    flags.add_chunk(parser, 1000)
    flags.add_device(parser)
    return parser


def check_flags(parser: Parser, args: Any) -> None:
    """End with an error for flags that contradict each other or would have no effect."""
    if len(args.file) + (args.text is not None) > 1:
        parser.error("give one text, a FILE or --text, not both, and the model with --checkpoint")
    if args.as_corpus and args.independent:
        parser.error("--as-corpus scores one stream and --independent many: give one")
    if args.tsv == "-" and (args.json or args.tokens or args.chars or args.words):
        parser.error(
            "--tsv - is the whole output: name a file, or leave out --json, --tokens, --chars and "
            "--words"
        )
    of_tokens = (args.tsv and not args.lines) or (args.json and args.tokens)
    if args.entropy and (args.cache or not of_tokens):
        parser.error(
            "--entropy is a column of tokens, without the cache: add --tsv, or --json --tokens"
        )


def text_lines(file: str | None, text: str | None) -> Iterator[str]:
    """The lines of --text, of the file or pipe, or of standard input, as they are read.

    Raises ToolkitError if the text cannot be read, is not UTF-8, or is empty.
    """
    # A byte order mark is dropped, and any system's ends of lines are read.
    utf8 = {"encoding": "utf-8-sig", "errors": "surrogateescape"}
    if text is not None:
        name, lines = "--text", io.TextIOWrapper(io.BytesIO(os.fsencode(text)), **utf8)
    elif file in (None, "-", "/dev/stdin"):
        name, lines = "standard input", sys.stdin
        if lines is None:
            raise ToolkitError("standard input is closed: name a file, or give --text")
        if lines.isatty():
            sys.stderr.write("reading standard input: end it with Ctrl-D\n")
        lines.reconfigure(**utf8, newline=None)
    else:
        name = file
        try:
            lines = opened(file, "r", pipe=True, **utf8)
        except OSError as error:
            raise ToolkitError(
                f"cannot read {file} ({error.strerror}): name a text file, or give the text with "
                "--text or on standard input"
            ) from error
    number = 0
    for number, line in enumerate(lines, start=1):
        if re.search("[\udc80-\udcff]", line):
            raise ToolkitError(
                f"line {number} of {name} is not UTF-8: convert the text to UTF-8 (iconv does it), "
                "or name a model file with --checkpoint"
            )
        yield line
    if not number:
        raise ToolkitError(f"{name} is empty: there is nothing to score")


def states(
    network: TrainingLoss, tokens: Sequence[Token], first: int | None, args: Any
) -> dict[str, np.ndarray]:
    """The arrays of --states: each layer's outputs (tokens, size), the words, and their lines."""
    before = [] if first is None else [first]
    texts = by_line(tokens) if args.independent else [tokens]
    ids = ([*before, *(token.id for token in text)] for text in texts)
    parts = [states_of(network, text, len(before), args.bptt) for text in ids]
    layers = [np.concatenate([part[k].numpy() for part in parts]) for k in range(len(parts[0]))]
    return {
        "words": np.array([token.word for token in tokens]),
        "sentence_id": np.array([token.line for token in tokens]),
        **{f"layer_{number}": layer for number, layer in enumerate(layers, start=1)},
    }


@program.out_of_memory("--bptt")
def main(argv: Sequence[str] | None = None) -> None:
    """Score a text; raises ToolkitError for problems the user can fix."""
    parser = build_parser()
    given = parser.given(argv)
    args = parser.settle(given)
    check_flags(parser, args)
    file = args.file[0] if args.file else None
    loaded = checkpoint.load(args.checkpoint)
    for flag in ("html", "tsv", "states"):
        path = getattr(args, flag)
        if path and path != "-":
            check_writable(path, f"--{flag}", args.checkpoint, file or "-")
    dictionary = loaded.dictionary
    spelling = Spelling.of(dictionary, args.tokens_are)
    reader = Reader(dictionary, spelling, args.ids)
    network = network_of(loaded, args)
    first = None if args.as_corpus else dictionary.word2idx[EOS]
    summary = functools.partial(Summary, dictionary.word2idx.get(dictionary.unk), spelling.unit)
    total, kept = summary(), []
    cache = functools.partial(ContinuousCache, args.window, args.theta, args.cache_from_start)
    with Bar(None, "scoring") as bar, table_file(args.tsv) as file_of_table:
        report = Report(args, reader, file_of_table)
        scorer = Scorer(
            network,
            first,
            bptt=args.bptt,
            new_cache=cache if args.cache else None,
            lambdasm=args.lambdasm,
            entropy=args.entropy,
            tick=bar.update,
        )
        lines = text_lines(file, args.text)
        blocks = reader.blocks(lines, math.inf if args.independent else BLOCK_TOKENS)
        done = map(scorer.independent, blocks) if args.independent else scorer.stream(blocks)
        for tokens in done:
            total.add(tokens)
            if args.lines or args.tokens or args.tsv:
                for line in by_line(tokens):
                    report.line(line, summary().add(line))
            if args.html or args.states:
                kept += tokens
        if not total.counts:
            raise ToolkitError(
                "the text is one token and --as-corpus does not score the first: leave that flag "
                "out"
            )
        check_known(reader.outside.total() / reader.tokens, dictionary, "the text")
        remarks = notes(reader, args, scorer.used, total.counts.total())
        numbers = total.numbers(args.chars)
        report.total(numbers, total.conventions(args.words), remarks)
    if args.states:
        with writing(args.states, "--states") as target:
            np.savez(target, **states(network, kept, first, args))
    if args.html:
        source = "text" if file in (None, "-") else Path(file).name
        title = f"{source}, scored by {Path(args.checkpoint).name}"
        page = to_html(kept, title, remarks, numbers, len(dictionary), spelling)
        with writing(args.html, "--html") as target:
            target.write(page.encode(errors="backslashreplace"))


if __name__ == "__main__":
    program.run(main)
