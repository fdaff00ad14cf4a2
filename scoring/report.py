"""The report of score.py: as text, as JSON lines, and as a table."""

import codecs
import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from data import EOS
from files.writing import writing
from scoring.tokens import Reader, Summary, Token, counted, shown

# What JSON says of a token, and the columns of --tsv, some of which have another name there.
TOKEN = ["line", "number", "word", "unknown", "chars", "logprob", "bits"]
TOKEN_COLUMNS = ["line", "number", "word", "bits", "unknown"]
LINE_COLUMNS = ["line", "tokens", "logprob", "ppl"]
IN_TABLE = {"line": "sentence_id", "number": "token_id", "word": "token", "bits": "surprisal"}
PERPLEXITIES = {
    "ppl_without_unk": "without unknown words",
    "ppl_without_eos": f"without {EOS}",
    "ppl1": f"ppl1 as SRILM's, {EOS} in the sum only",
    "ppl_per_word": "a word of --words",
}


def notes(reader: Reader, args: Any, used: int, scored: int) -> dict[str, str]:
    """Remarks on the numbers, by subject; the cache was `used` at so many of `scored` tokens."""
    if args.as_corpus:
        start = "an input only, not scored, as in main.py's test score"
    elif args.independent:
        start = f"the first of each line is scored after one {EOS}"
    else:
        start = f"scored after one {EOS}; each line's {EOS} is scored too"
    outside = reader.outside
    unknown = f"{outside.total()} of {counted(reader.tokens, 'token')}"
    if outside:
        unknown += f" ({counted(len(outside), 'distinct word')}), scored as {reader.dictionary.unk}"
    remarks = {"first token": start, "outside the vocabulary": unknown}
    remarks["tokens are"] = reader.spelling.note
    if any("\ufeff" in word for word in outside):
        remarks["byte order mark"] = "U+FEFF is within the text, as a part of words: take it out"
    if args.cache:
        remarks["cache"] = f"used at {used} of {counted(scored, 'token')}"
        if not used:
            remarks["cache"] += (
                f": no text is longer than its window of {args.window}; to use it, give "
                "--cache-from-start or a smaller --window"
            )
    return remarks


@contextlib.contextmanager
def table_file(path: str | None) -> Iterator[TextIO | None]:
    """The file of --tsv, standard output for `-`, None without a path."""
    if path in (None, "-"):
        yield sys.stdout if path else None
        return
    with writing(path, "--tsv") as file:
        yield codecs.getwriter("utf-8")(file)


class Report:
    """Writes the lines of a text as they are scored, and the total, as score.py's `args` say.

    `table` is the file of --tsv, if there is one. With `--tsv -` only the table is written.
    """

    def __init__(self, args: Any, reader: Reader, table: TextIO | None) -> None:
        self._args, self._reader, self._table = args, reader, table
        entropy = ["entropy"] if args.entropy else []
        self._fields = TOKEN + entropy
        self._columns = LINE_COLUMNS if args.lines else TOKEN_COLUMNS + entropy
        if table:
            print(*(IN_TABLE.get(name, name) for name in self._columns), sep="\t", file=table)

    def line(self, tokens: Sequence[Token], summary: Summary) -> None:
        """Write what the flags ask for of a line and its tokens."""
        rows = [{name: getattr(token, name) for name in self._fields} for token in tokens]
        whole = {"line": tokens[0].line, **summary.numbers()}
        if self._table:
            for row in [whole] if self._args.lines else rows:
                cells = (_cell(row[name]) for name in self._columns)
                print(*cells, sep="\t", file=self._table)
        if self._args.tsv == "-":
            return
        label = f"| {f'line {tokens[0].line}':>10s} |"
        if self._args.tokens:
            for token, row in zip(tokens, rows, strict=True):
                if self._args.json:
                    _print_object("token", row)
                else:
                    unk = f" (as {self._reader.dictionary.unk})" if token.unknown else ""
                    print(label, _surprisal(token), "|", f"{token.word}{unk}")
        if self._args.lines and self._args.json:
            _print_object("line", whole)
        elif self._args.lines:
            print(label, self._numbers(whole, 5))

    def total(
        self, numbers: Mapping[str, Any], others: Mapping[str, Any], remarks: dict[str, str]
    ) -> None:
        """Write the total: `Summary.numbers`, `Summary.conventions` and `notes`."""
        if self._args.json:
            named = {subject.replace(" ", "_"): text for subject, text in remarks.items()}
            kind = {"tokens_are": self._reader.spelling.kind or None}
            _print_object("total", {**numbers, **others, **kind, "notes": named})
            return
        if self._args.tsv == "-":
            return
        for subject, text in remarks.items():
            print(f"| {subject}: {text}")
        for name, what in PERPLEXITIES.items():
            if name in others:
                count = others[name.replace("ppl", "tokens", 1)]
                print(f"| {what}: ppl {shown(others[name], 4)} over {count}")
        print("=" * 89)
        print("| End of scoring |", self._numbers(numbers))
        print("=" * 89)

    def _numbers(self, values: Mapping[str, Any], width: int = 1) -> str:
        unit = self._reader.spelling.unit
        return (
            f"{values['tokens']:{width}d} tokens | log p {shown(values['logprob'], 2):>9s} | "
            f"loss {shown(values['loss'], 4):>6s} | ppl {shown(values['ppl'], 4):>9s} | "
            f"bits/token {shown(values['bits_per_token'], 3):>6s} | "
            f"bits/{unit} {shown(values[f'bits_per_{unit}'], 4):>6s}"
        )


def _cell(value: Any) -> str:
    """A number in a table; one that is missing is NA, as R writes it."""
    if isinstance(value, float):
        return f"{value:.8g}"
    return "NA" if value is None else str(int(value) if isinstance(value, bool) else value)


def _print_object(kind: str, values: Mapping[str, Any]) -> None:
    finite = {k: None if v in (math.inf, -math.inf) else v for k, v in values.items()}
    # An output that is not UTF-8 would get Python's escapes, which are not valid JSON.
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf8")
    print(json.dumps({"kind": kind, **finite}, ensure_ascii=not utf8, allow_nan=False))


def _surprisal(token: Token) -> str:
    if token.logprob is None:
        return f"{'not scored':^36s}"
    p = math.exp(token.logprob)
    return f"log p {token.logprob:8.3f} | bits {token.bits:6.2f} | p {p:8.6f}"
