"""Score any text with a trained model: log-probability, perplexity and bits per character.

The text is a FILE, --text, or standard input. It is read as a corpus is: words apart by white
space, and one <eos> after each line, which is scored like a word. The hidden state is carried from
line to line. A language model needs a first input: by default that is one <eos>, so that every word
of the text is scored as what follows it.

Bits per character are all bits divided by the characters of the scored text: the characters of each
word as it is written, one for the white space between two words of a line, one for each line's end.
Where every word of the vocabulary is one character, or one byte written as a number, each token is
one character.
"""

import html
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import model_file as checkpoint
from cli import flags as options
from cli.progress import Bar
from continuous_cache import ContinuousCache
from data import EOS, UNK, Dictionary
from model import RNNModel
from scoring import stream as scoring
from splitcross import SplitCrossEntropyLoss
from utils import (
    ToolkitError,
    bits,
    perplexity,
    score_as_trained,
    select_device,
    unwritable,
    writing,
)

CACHE_FLAGS = ("window", "theta", "lambdasm", "cache_from_start")


def build_parser() -> options.Parser:
    """The command line of score.py."""
    parser = options.Parser((), __doc__)
    add = parser.group("text").add_argument
    add("file", nargs="?", metavar="FILE", help="text to score, UTF-8; - is standard input")
    add("--text", metavar="WORDS", help="text to score, instead of a FILE")
    add(
        "--as-corpus",
        action="store_true",
        help="score as main.py does test.txt: the text's first token is only an input and is not "
        "scored",
    )
    add(
        "--independent",
        action="store_true",
        help="score each line on its own, after one <eos>, as if no other had been read",
    )
    add = parser.group("output").add_argument
    add("--lines", action="store_true", help="one line of output for each line of text")
    add("--tokens", action="store_true", help="one line of output for each token")
    add("--json", action="store_true", help="JSON lines; the last one is the total")
    add(
        "--html",
        metavar="FILE",
        help="write the text with each token coloured by its surprisal, to be read in a browser",
    )
    parser.group("files").add_argument(
        "--checkpoint", "--save", default="model.pt", metavar="FILE", help="model file"
    )
    parser.group("cache").add_argument(
        "--cache", action="store_true", help="add the continuous cache, as pointer.py does"
    )
    options.add_cache(parser)
    options.add_chunk(parser, 1000)
    options.add_device(parser)
    return parser


@dataclass
class Token:
    """A token of the text; `logprob` is in nats, None where it is not scored."""

    word: str
    line: int  # counted from 1
    chars: int
    unknown: bool = False
    logprob: float | None = None


@dataclass
class Summary:
    """Sums over scored tokens; `logprob` in nats, `unknown` counts words outside the vocabulary."""

    tokens: int
    chars: int
    unknown: int
    logprob: float

    @classmethod
    def of(cls, tokens: Iterable[Token]) -> "Summary":
        """Sum up those of `tokens` that are scored."""
        scored = [token for token in tokens if token.logprob is not None]
        return cls(
            len(scored),
            sum(token.chars for token in scored),
            sum(token.unknown for token in scored),
            math.fsum(token.logprob for token in scored),
        )

    def numbers(self) -> dict[str, float | None]:
        """What is reported, by name; None where nothing was scored or a number is infinite."""
        loss = -self.logprob / self.tokens if self.tokens else math.nan
        values = {
            "tokens": self.tokens,
            "chars": self.chars,
            "unknown": self.unknown,
            "logprob": self.logprob,
            "loss": loss,
            "ppl": perplexity(loss),
            "bits_per_token": bits(loss),
            "bits_per_char": bits(-self.logprob) / self.chars if self.chars else math.nan,
        }
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


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
            raw = Path(file).read_bytes()
        except OSError as error:
            raise ToolkitError(
                f"cannot read {file} ({os.strerror(error.errno)}): name a text file, or give the "
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


def is_character_level(dictionary: Dictionary) -> bool:
    """Whether each word is a character, or a byte as a decimal number; <...> are not looked at."""
    words = [word for word in dictionary.idx2word if not re.fullmatch("<.*>", word)]
    single = all(len(word) == 1 for word in words)
    return single or all(word.isascii() and word.isdigit() and int(word) < 256 for word in words)


def tokenize(text: str, dictionary: Dictionary) -> tuple[list[Token], Tensor]:
    """The tokens of `text` and their ids (n,); every line ends in one <eos>.

    A word that the vocabulary lacks gets the id of <unk>. Raises ToolkitError if that is lacking
    too, or if <eos> is.
    """
    if EOS not in dictionary.word2idx:
        raise ToolkitError(f"the model's vocabulary has no {EOS}: it cannot score lines of text")
    characters = is_character_level(dictionary)
    known = dictionary.word2idx
    unknown_id = known.get(UNK, -1)
    tokens, ids = [], []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        for position, word in enumerate(line.split()):
            chars = 1 if characters else len(word) + (position > 0)
            tokens.append(Token(word, number, chars, word not in known))
            ids.append(known.get(word, unknown_id))
        tokens.append(Token(EOS, number, 1))
        ids.append(known[EOS])
    outside = [token.word for token in tokens if token.unknown]
    if outside and unknown_id < 0:
        examples = ", ".join(map(repr, list(dict.fromkeys(outside))[:3]))
        raise ToolkitError(
            f"{_count(len(outside), 'token')} of {len(tokens)} "
            f"({_count(len(set(outside)), 'distinct word')}, such as {examples}) are outside the "
            f"model's vocabulary, which has no {UNK} to take their place: write the text as the "
            "model's corpus is written"
        )
    return tokens, torch.tensor(ids)


@torch.inference_mode()
def stream_logprobs(
    model: RNNModel,
    criterion: SplitCrossEntropyLoss,
    ids: Tensor,
    bptt: int,
    cache: ContinuousCache | None,
    lambdasm: float,
    bar: Bar,
) -> tuple[Tensor, int]:
    """`log p` (n - 1,) in nats of every token of `ids` (n,) but the first, given those before it.

    With a `cache`, of its mixture with the model. Also returns for how many tokens the cache spoke.
    """
    results, spoke = [], 0
    for piece in scoring.pieces(model, criterion, ids.unsqueeze(1), bptt):
        logprob = piece.logprob
        if cache is not None:
            logprob, speaks = scoring.with_cache(piece, cache, lambdasm)
            spoke += int(speaks.sum())
        results.append(logprob.double().cpu())
        if bar.shown:
            bar.update(len(logprob), loss=f"{-results[-1].mean():.2f}")
    return torch.cat(results), spoke


def fill_in(
    tokens: list[Token],
    ids: Tensor,
    model: RNNModel,
    criterion: SplitCrossEntropyLoss,
    args: Any,
    eos: int,
    bar: Bar,
) -> int:
    """Score `tokens` in place, in the way `args` say; return for how many the cache spoke.

    `ids` (n,) are on the model's device, `eos` is the id of <eos>.
    """
    if args.independent:
        # By the line's number: an <eos> may also stand written within a line.
        ends = list(itertools.accumulate(map(len, by_line(tokens))))
    else:
        ends = [len(tokens)]
    spoke = start = 0
    for end in ends:
        stream = ids[start:end]
        first = start + 1 if args.as_corpus else start
        if not args.as_corpus:
            stream = torch.cat([ids.new_tensor([eos]), stream])
        cache = (
            ContinuousCache(args.window, args.theta, args.cache_from_start) if args.cache else None
        )
        logprobs, more = stream_logprobs(
            model, criterion, stream, args.bptt, cache, args.lambdasm, bar
        )
        for token, logprob in zip(tokens[first:end], logprobs.tolist(), strict=True):
            token.logprob = logprob
        spoke += more
        start = end
    return spoke


def by_line(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens of each line in turn."""
    line: list[Token] = []
    for token in tokens:
        if line and token.line != line[0].line:
            yield line
            line = []
        line.append(token)
    yield line


def notes(tokens: Sequence[Token], args: Any, spoke: int, characters: bool) -> dict[str, str]:
    """What to know about the numbers, in words, by subject."""
    if args.as_corpus:
        first = f"{tokens[0].word!r} is an input only and is not scored, as in main.py's test score"
    elif args.independent:
        first = f"the first of each line is scored as what follows one {EOS}"
    else:
        first = f"scored as what follows one {EOS}; each line's {EOS} is scored too"
    outside = [token.word for token in tokens if token.unknown]
    unknown = f"{len(outside)} of {_count(len(tokens), 'token')}"
    if outside:
        unknown += f" ({_count(len(set(outside)), 'distinct word')}), scored as {UNK}"
    said = {"first token": first, "outside the vocabulary": unknown}
    said["characters"] = "one a token" if characters else "those of the words, spaces, line ends"
    if args.cache:
        scored = sum(token.logprob is not None for token in tokens)
        said["cache"] = f"speaks at {spoke} of {_count(scored, 'token')}"
        if not spoke:
            said["cache"] += (
                f": no text is longer than its window of {args.window}; --cache-from-start, or a "
                "smaller --window, lets it speak"
            )
    return said


def print_text(tokens: list[Token], args: Any, said: dict[str, str]) -> None:
    """The report for people."""
    width = len(str(len(tokens)))
    for line in by_line(tokens):
        if args.tokens:
            for token in line:
                shown = f"{token.word} (as {UNK})" if token.unknown else token.word
                print(f"| line {token.line:{width}d} | {_surprisal(token)} | {shown}")
        if args.lines:
            print(f"| line {line[0].line:{width}d} | {_numbers(Summary.of(line), width)}")
    for subject, text in said.items():
        print(f"| {subject}: {text}")
    print("=" * 89)
    print(f"| End of scoring | {_numbers(Summary.of(tokens), width)}")
    print("=" * 89)


def print_json(tokens: list[Token], args: Any, said: dict[str, str]) -> None:
    """The report for programs: objects of kind token, line and, last, total."""
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
    named = {subject.replace(" ", "_"): text for subject, text in said.items()}
    _print_object("total", **Summary.of(tokens).numbers(), notes=named)


def _print_object(kind: str, **values: Any) -> None:
    # What an output cannot show would otherwise be escaped as Python does it, which is no JSON.
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


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


# The coloured text

_STYLE = """
:root { color-scheme: only light; }
body { margin: 2rem auto; max-width: 50rem; padding: 0 1rem; background: #fff; color: #111;
       font: 1.05rem/1.9 Georgia, "Noto Serif", serif; }
h1 { font-size: 1.3rem; margin: 0 0 .3rem; }
header, footer { font: .85rem/1.5 system-ui, "Noto Sans", sans-serif; color: #333; }
header { border-bottom: 1px solid #999; padding-bottom: .8rem; margin-bottom: 1rem; }
table { border-collapse: collapse; margin: .4rem 0; }
td { padding: 0 1.2rem 0 0; font-variant-numeric: tabular-nums; }
.legend { display: flex; margin-top: .6rem; }
.legend i { flex: 1; font-style: normal; text-align: center; }
p { margin: 0 0 .3rem; overflow-wrap: anywhere; }
i, p b { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
p b { font-weight: normal; border-radius: .2em; padding: .08em .12em; }
p b:hover { outline: 2px solid #06c; }
.e { font-family: system-ui, sans-serif; font-size: .8em; }
.u { text-decoration: underline dotted; }
.n { outline: 1px dashed #888; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; } p { orphans: 2; } }
"""
_LEVELS = 15


def full_bits(ntoken: int) -> int:
    """The surprisal, in bits, that gets the strongest colour: a guess among all words."""
    return max(1, math.ceil(math.log2(ntoken)))


def level_of(surprisal: float, full: float) -> int:
    """Which of the colours, from 0 for the pale one, a surprisal in bits gets."""
    if not math.isfinite(surprisal):
        return _LEVELS - 1
    return min(_LEVELS - 1, max(0, int(surprisal / full * _LEVELS)))


def _colour(level: int) -> str:
    """From white by way of yellow to red: lighter and darker also without colours, in print."""
    x = level / (_LEVELS - 1)
    stops = [(255, 255, 255), (255, 224, 130), (250, 130, 70), (200, 30, 45)]
    at = min(x * (len(stops) - 1), len(stops) - 1 - 1e-9)
    low, high, share = stops[int(at)], stops[int(at) + 1], at - int(at)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def to_html(
    tokens: Sequence[Token], title: str, said: dict[str, str], ntoken: int, characters: bool = False
) -> str:
    """A page with the text, each token coloured by its surprisal; it needs no other file.

    `ntoken` is the size of the vocabulary; with `characters` nothing stands between two tokens.
    """
    full = full_bits(ntoken)
    ink = ["#111" if level < 0.8 * _LEVELS else "#fff" for level in range(_LEVELS)]
    colours = "\n".join(
        f".s{level} {{ background: {_colour(level)}; color: {ink[level]}; }}"
        for level in range(_LEVELS)
    )
    labels = [f"{level * full / _LEVELS:.1f}" for level in range(_LEVELS)]
    labels[-1] += "+"
    legend = "".join(f'<i class="s{level}">{label}</i>' for level, label in enumerate(labels))
    values = Summary.of(tokens).numbers()
    units = [
        ("tokens", "tokens", "d"),
        ("log p, nats", "logprob", ".2f"),
        ("perplexity", "ppl", ".2f"),
        ("bits per token", "bits_per_token", ".3f"),
        ("bits per character", "bits_per_char", ".3f"),
    ]
    cells = "".join(
        f"<td>{name}<br><strong>{'-' if values[key] is None else format(values[key], form)}"
        "</strong></td>"
        for name, key, form in units
    )
    remarks = "<br>".join(html.escape(f"{subject}: {text}") for subject, text in said.items())
    gap = "" if characters else " "
    body = "\n".join(
        f"<p>{gap.join(_token_html(token, full) for token in line)}</p>" for line in by_line(tokens)
    )
    return f"""<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}{colours}
</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
<table><tr>{cells}</tr></table>
<div>Surprisal of each token in bits, <code>-log2 p</code>; {full} bits is a blind guess among
{ntoken} words. Point at a token for its number; &crarr; is the end of a line.</div>
<div class="legend">{legend}</div>
</header>
<main>
{body}
</main>
<footer><p>{remarks}</p></footer>
</body>
</html>
"""


def _token_html(token: Token, full: float) -> str:
    shown = "&crarr;" if token.word == EOS else html.escape(token.word)
    classes = ["e"] if token.word == EOS else []
    tip = token.word
    if token.unknown:
        classes.append("u")
        tip += f", scored as {UNK}"
    if token.logprob is None:
        classes.append("n")
        tip += ": not scored"
    else:
        surprisal = bits(-token.logprob)
        classes.append(f"s{level_of(surprisal, full)}")
        tip += f": {surprisal:.2f} bits, p = {math.exp(token.logprob):.2g}"
    return f'<b class="{" ".join(classes)}" title="{html.escape(tip)}">{shown}</b>'


def main(argv: Sequence[str] | None = None) -> None:
    """Score a text; raises ToolkitError for what the user can mend."""
    args = options.parse(build_parser, argv)
    if args.file is not None and args.text is not None:
        build_parser().error("give a FILE or --text, not both")
    if args.as_corpus and args.independent:
        build_parser().error("--as-corpus scores one stream and --independent many: give one")
    idle = [flag for flag in CACHE_FLAGS if flag in args.given and not args.cache]
    if idle:
        build_parser().error(f"--{idle[0].replace('_', '-')} is for the cache: add --cache")
    loaded = checkpoint.load(args.checkpoint)
    device = select_device(args.cuda)
    score_as_trained(loaded.args, device)
    problem = unwritable(args.html) if args.html else None
    if problem:
        raise ToolkitError(f"cannot write {args.html} ({problem}): pass another --html")
    dictionary = loaded.dictionary
    tokens, ids = tokenize(read_text(args.file, args.text), dictionary)
    if args.as_corpus and len(tokens) == 1:
        raise ToolkitError(
            "the text is one token and --as-corpus does not score the first: leave the flag out"
        )
    model, criterion = checkpoint.rebuild(loaded, device)
    eos = dictionary.word2idx[EOS]
    with Bar(len(tokens), "scoring") as bar:
        spoke = fill_in(tokens, ids.to(device), model, criterion, args, eos, bar)
    characters = is_character_level(dictionary)
    said = notes(tokens, args, spoke, characters)
    (print_json if args.json else print_text)(tokens, args, said)
    if args.html:
        source = "text" if args.file in (None, "-") else Path(args.file).name
        title = f"{source}, scored by {Path(args.checkpoint).name}"
        page = to_html(tokens, title, said, len(dictionary), characters)
        with writing(args.html, "--html") as file:
            file.write(page.encode())


if __name__ == "__main__":
    options.run(main)
