"""Score any text with a trained model: log-probability, perplexity and bits per character.

The text is a FILE, --text, or standard input. It is read like a corpus: words are separated by
white space, and each line ends in one <eos>, which is scored like a word. The hidden state is
carried from line to line. A language model needs a first input: by default it is one <eos>, so that
the first word of the text is scored too.

Bits per character are the total bits divided by the characters of the scored text: those of each
word as written, one for each space between words, one for each end of a line. If every word of the
vocabulary is one character, or one byte written as a number, each token counts as one character.
"""

import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
from cli import flags
from cli.parser import Parser
from continuous_cache import ContinuousCache
from data import EOS, UNK
from files.reading import opened
from files.writing import check_writable, writing
from loss import TrainingLoss
from run import program
from run.corpus import check_known
from run.network import network_of
from run.progress import Bar
from scoring.page import to_html
from scoring.stream import pieces, with_cache
from scoring.tokens import Summary, Token, by_line, counted, is_character_level, tokenize
from utils import ToolkitError, bits

CACHE_FLAGS = ("window", "theta", "lambdasm", "cache_from_start")


def build_parser() -> Parser:
    """The command line of score.py."""
    parser = Parser("", __doc__)
    parser.flag(
        "text", "file", nargs="?", metavar="FILE", help="text to score, UTF-8; - is standard input"
    )
    parser.flag("text", "--text", metavar="WORDS", help="text to score, instead of a FILE")
    parser.flag(
        "text",
        "--as-corpus",
        action="store_true",
        help="score as main.py scores test.txt: the first token is only an input and is not scored",
    )
    parser.flag(
        "text",
        "--independent",
        action="store_true",
        help="score each line on its own, after one <eos>, without the lines before it",
    )
    parser.flag(
        "output", "--lines", action="store_true", help="one line of output for each line of text"
    )
    parser.flag("output", "--tokens", action="store_true", help="one line of output for each token")
    parser.flag(
        "output", "--json", action="store_true", help="JSON lines; the last one is the total"
    )
    parser.flag(
        "output",
        "--html",
        metavar="FILE",
        help="write a web page of the text with each token coloured by its surprisal",
    )
    parser.flag(
        "files", "--checkpoint", "--save", default="model.pt", metavar="FILE", help="model file"
    )
    parser.flag(
        "cache", "--cache", action="store_true", help="add the continuous cache, as pointer.py does"
    )
    flags.add_cache(parser)
    flags.add_chunk(parser, 1000)
    flags.add_device(parser)
    return parser


def read_text(file: str | None, text: str | None) -> str:
    """The text of --text, of the file, or of standard input, every line ended by one newline.

    Raises ToolkitError if it cannot be read, is not UTF-8, or is empty.
    """
    if text is not None:
        name, raw = "--text", text.encode("utf-8", "surrogateescape")
    elif file in (None, "-"):
        name = "standard input"
        if sys.stdin is None:
            raise ToolkitError("standard input is closed: name a file, or give --text")
        if sys.stdin.isatty():
            sys.stderr.write("reading standard input: end it with Ctrl-D\n")
        raw = sys.stdin.buffer.read()
    else:
        name = file
        try:
            with opened(file) as text_file:
                raw = text_file.read()
        except OSError as error:
            raise ToolkitError(
                f"cannot read {file} ({error.strerror}): name a text file, or give the "
                "text with --text or on standard input"
            ) from error
    try:
        decoded = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ToolkitError(
            f"line {line} of {name} is not UTF-8: convert the text to UTF-8 (iconv does it)"
        ) from None
    if not decoded:
        raise ToolkitError(f"{name} is empty: there is nothing to score")
    decoded = decoded.replace("\r\n", "\n").replace("\r", "\n")
    return decoded if decoded.endswith("\n") else decoded + "\n"


@torch.inference_mode()
def stream_logprobs(
    network: TrainingLoss,
    ids: Tensor,
    bptt: int,
    cache: ContinuousCache | None,
    lambdasm: float,
    bar: Bar,
) -> tuple[Tensor, int]:
    """`log p` (n - 1,) in nats of each token of `ids` (n,) after the first, given those before it.

    With a `cache`, p is that of its mixture with the model. Also returns the number of tokens at
    which the cache was in use.
    """
    results, used = [], 0
    for piece in pieces(network, ids.unsqueeze(1), bptt):
        logprob = piece.logprob
        if cache is not None:
            logprob, in_use = with_cache(piece, cache, lambdasm)
            used += int(in_use.sum())
        results.append(logprob.double().cpu())
        if bar.shown:
            bar.update(len(logprob), loss=f"{-results[-1].mean():.2f}")
    return torch.cat(results), used


def fill_in(
    tokens: list[Token],
    ids: Tensor,
    network: TrainingLoss,
    args: Any,
    eos: int,
    bar: Bar,
) -> int:
    """Set the log p of `tokens` as `args` say; return at how many of them the cache was in use.

    `ids` (n,) are on the model's device, `eos` is the id of <eos>.
    """
    if args.independent:
        # Lines differ by number: a line may also contain a written <eos>.
        ends = list(itertools.accumulate(map(len, by_line(tokens))))
    else:
        ends = [len(tokens)]
    used = start = 0
    for end in ends:
        stream = ids[start:end]
        first = start + 1 if args.as_corpus else start
        if not args.as_corpus:
            stream = torch.cat([ids.new_tensor([eos]), stream])
        cache = (
            ContinuousCache(args.window, args.theta, args.cache_from_start) if args.cache else None
        )
        logprobs, more = stream_logprobs(network, stream, args.bptt, cache, args.lambdasm, bar)
        for token, logprob in zip(tokens[first:end], logprobs.tolist(), strict=True):
            token.logprob = logprob
        used += more
        start = end
    return used


def notes(tokens: Sequence[Token], args: Any, used: int, characters: bool) -> dict[str, str]:
    """Remarks on the numbers, by subject."""
    if args.as_corpus:
        first = f"{tokens[0].word!r} is an input only and is not scored, as in main.py's test score"
    elif args.independent:
        first = f"the first of each line is scored after one {EOS}"
    else:
        first = f"scored after one {EOS}; each line's {EOS} is scored too"
    outside = [token.word for token in tokens if token.unknown]
    unknown = f"{len(outside)} of {counted(len(tokens), 'token')}"
    if outside:
        unknown += f" ({counted(len(set(outside)), 'distinct word')}), scored as {UNK}"
    remarks = {"first token": first, "outside the vocabulary": unknown}
    remarks["characters"] = "one per token" if characters else "those of words, spaces, line ends"
    if args.cache:
        scored = sum(token.logprob is not None for token in tokens)
        remarks["cache"] = f"used at {used} of {counted(scored, 'token')}"
        if not used:
            remarks["cache"] += (
                f": no text is longer than its window of {args.window}; to use it, give "
                "--cache-from-start or a smaller --window"
            )
    return remarks


def print_text(tokens: list[Token], args: Any, remarks: dict[str, str]) -> None:
    """Print the report as text."""
    width = len(str(len(tokens)))
    for line in by_line(tokens):
        if args.tokens:
            for token in line:
                shown = f"{token.word} (as {UNK})" if token.unknown else token.word
                print(f"| line {token.line:{width}d} | {_surprisal(token)} | {shown}")
        if args.lines:
            print(f"| line {line[0].line:{width}d} | {_numbers(Summary.of(line), width)}")
    for subject, text in remarks.items():
        print(f"| {subject}: {text}")
    print("=" * 89)
    print(f"| End of scoring | {_numbers(Summary.of(tokens), width)}")
    print("=" * 89)


def print_json(tokens: list[Token], args: Any, remarks: dict[str, str]) -> None:
    """Print the report as JSON lines: objects of kind token, line and, last, total."""
    for line in by_line(tokens):
        if args.tokens:
            for token in line:
                nats = token.logprob
                _print_object(
                    "token",
                    line=token.line,
                    word=token.word,
                    unknown=token.unknown,
                    chars=token.chars,
                    logprob=nats if nats is None or math.isfinite(nats) else None,
                )
        if args.lines:
            _print_object("line", line=line[0].line, **Summary.of(line).numbers())
    named = {subject.replace(" ", "_"): text for subject, text in remarks.items()}
    _print_object("total", **Summary.of(tokens).numbers(), notes=named)


def _print_object(kind: str, **values: Any) -> None:
    # An output that is not UTF-8 would get Python's escapes, which are not valid JSON.
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf8")
    print(json.dumps({"kind": kind, **values}, ensure_ascii=not utf8, allow_nan=False))


def _surprisal(token: Token) -> str:
    if token.logprob is None:
        return f"{'not scored':^36s}"
    p = math.exp(token.logprob)
    return f"log p {token.logprob:8.3f} | bits {bits(-token.logprob):6.2f} | p {p:8.6f}"


def _numbers(summary: Summary, width: int) -> str:
    values = summary.numbers()

    def shown(name: str, form: str) -> str:
        value = values[name]
        return f"{'-':>{len(format(0.0, form))}s}" if value is None else format(value, form)

    return (
        f"{summary.tokens:{width}d} tokens | log p {shown('logprob', '9.2f')} | "
        f"loss {shown('loss', '6.4f')} | ppl {shown('ppl', '9.4f')} | "
        f"bits/token {shown('bits_per_token', '6.3f')} | "
        f"bits/char {shown('bits_per_char', '6.4f')}"
    )


@program.out_of_memory("--bptt")
def main(argv: Sequence[str] | None = None) -> None:
    """Score a text; raises ToolkitError for problems the user can fix."""
    parser = build_parser()
    given = parser.given(argv)
    args = parser.settle(given)
    if args.file is not None and args.text is not None:
        parser.error("give a FILE or --text, not both")
    if args.as_corpus and args.independent:
        parser.error("--as-corpus scores one stream and --independent many: give one")
    idle = [flag for flag in CACHE_FLAGS if flag in given.line and not args.cache]
    if idle:
        parser.error(f"--{idle[0].replace('_', '-')} is for the cache: add --cache")
    loaded = checkpoint.load(args.checkpoint)
    if args.html:
        check_writable(args.html, "--html", args.checkpoint, args.file or "-")
    dictionary = loaded.dictionary
    tokens, ids = tokenize(read_text(args.file, args.text), dictionary)
    check_known(sum(token.unknown for token in tokens) / len(tokens), "the text")
    if args.as_corpus and len(tokens) == 1:
        raise ToolkitError(
            "the text is one token and --as-corpus does not score the first: leave that flag out"
        )
    network = network_of(loaded, args)
    eos = dictionary.word2idx[EOS]
    with Bar(len(tokens), "scoring") as bar:
        used = fill_in(tokens, ids.to(network.device), network, args, eos, bar)
    characters = is_character_level(dictionary)
    remarks = notes(tokens, args, used, characters)
    (print_json if args.json else print_text)(tokens, args, remarks)
    if args.html:
        source = "text" if args.file in (None, "-") else Path(args.file).name
        title = f"{source}, scored by {Path(args.checkpoint).name}"
        page = to_html(tokens, title, remarks, len(dictionary), characters)
        with writing(args.html, "--html") as file:
            file.write(page.encode(errors="backslashreplace"))


if __name__ == "__main__":
    program.run(main)
