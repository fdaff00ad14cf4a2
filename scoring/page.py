"""A page with a text whose tokens are coloured by their surprisal, for a browser."""

import html
import math
from collections.abc import Mapping, Sequence

from data import EOS
from scoring.spelling import Spelling
from scoring.tokens import Token, by_line, shown

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
# From white through yellow to red, getting darker, so that a print without colours works.
COLOURS = (
    "#ffffff #fff8e4 #fff2c9 #ffebaf #ffe494 #ffd97e #fec571 #fcb164 #fb9d57 #fa894a #f37442 "
    "#e85e3d #dd4938 #d33332 #c81e2d"
).split()


def level_of(surprisal: float, full: float) -> int:
    """The index in COLOURS of a surprisal's colour; both arguments are bits."""
    share = min(surprisal, full) / full
    return min(int(share * len(COLOURS)), len(COLOURS) - 1)


def to_html(
    tokens: Sequence[Token],
    title: str,
    remarks: dict[str, str],
    values: Mapping[str, float | None],
    ntoken: int,
    spelling: Spelling,
) -> str:
    """A page with the text, each token coloured by its surprisal; it needs no other file.

    `values` are those of `Summary.numbers`, `ntoken` is the size of the vocabulary.
    """
    # The surprisal with the strongest colour: that of a uniform guess of the word.
    full = max(1, math.ceil(math.log2(ntoken)))
    levels = range(len(COLOURS))
    colours = "\n".join(
        f".s{level} {{ background: {COLOURS[level]}; color: {'#111' if level < 12 else '#fff'}; }}"
        for level in levels
    )
    labels = [f"{level * full / len(COLOURS):.1f}" for level in levels]
    labels[-1] += "+"
    legend = "".join(f'<i class="s{level}">{label}</i>' for level, label in enumerate(labels))
    unit = spelling.unit
    cells = [
        ("tokens", str(values["tokens"])),
        ("log p, nats", shown(values["logprob"], 2)),
        ("perplexity", shown(values["ppl"], 2)),
        ("bits per token", shown(values["bits_per_token"], 3)),
        (f"bits per {unit}", shown(values[f"bits_per_{unit}"], 3)),
    ]
    row = "".join(f"<td>{name}<br><strong>{text}</strong></td>" for name, text in cells)
    footer = "<br>".join(html.escape(f"{subject}: {text}") for subject, text in remarks.items())
    gap = "" if spelling.kind in ("characters", "joined") else " "
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
<table><tr>{row}</tr></table>
<div>Surprisal of each token in bits, <code>-log2 p</code>; {full} bits is a blind guess among
{ntoken} words. Point at a token to see its surprisal; &crarr; is the end of a line.</div>
<div class="legend">{legend}</div>
</header>
<main>
{body}
</main>
<footer><p>{footer}</p></footer>
</body>
</html>
"""


def _token_html(token: Token, full: float) -> str:
    shown = "&crarr;" if token.word == EOS else html.escape(token.word)
    classes = ["e"] if token.word == EOS else []
    tip = token.word
    if token.unknown:
        classes.append("u")
        tip += ", outside the vocabulary"
    if token.logprob is None:
        classes.append("n")
        tip += ": not scored"
    else:
        classes.append(f"s{level_of(token.bits, full)}")
        tip += f": {token.bits:.2f} bits, p = {math.exp(token.logprob):.2g}"
    return f'<b class="{" ".join(classes)}" title="{html.escape(tip)}">{shown}</b>'
