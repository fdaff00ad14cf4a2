"""A page with a text whose tokens are coloured by their surprisal, for a browser."""

import html
import math
from collections.abc import Mapping, Sequence

from data import EOS
from scoring.spelling import Spelling
from scoring.tokens import Token, by_line

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
    """The surprisal, in bits, with the strongest colour: that of a uniform guess of the word."""
    return max(1, math.ceil(math.log2(ntoken)))


def level_of(surprisal: float, full: float) -> int:
    """The index, from 0 for the palest, of the colour of a surprisal; both arguments are bits."""
    if not math.isfinite(surprisal):
        return _LEVELS - 1
    return min(_LEVELS - 1, max(0, int(surprisal / full * _LEVELS)))


def _colour(level: int) -> str:
    """From white through yellow to red, getting darker, so that a print without colours works."""
    x = level / (_LEVELS - 1)
    stops = [(255, 255, 255), (255, 224, 130), (250, 130, 70), (200, 30, 45)]
    at = min(x * (len(stops) - 1), len(stops) - 1 - 1e-9)
    low, high, fraction = stops[int(at)], stops[int(at) + 1], at - int(at)
    red, green, blue = (round(a + (b - a) * fraction) for a, b in zip(low, high, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


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
    full = full_bits(ntoken)
    ink = ["#111" if level < 0.8 * _LEVELS else "#fff" for level in range(_LEVELS)]
    colours = "\n".join(
        f".s{level} {{ background: {_colour(level)}; color: {ink[level]}; }}"
        for level in range(_LEVELS)
    )
    labels = [f"{level * full / _LEVELS:.1f}" for level in range(_LEVELS)]
    labels[-1] += "+"
    legend = "".join(f'<i class="s{level}">{label}</i>' for level, label in enumerate(labels))
    units = [
        ("tokens", "tokens", "d"),
        ("log p, nats", "logprob", ".2f"),
        ("perplexity", "ppl", ".2f"),
        ("bits per token", "bits_per_token", ".3f"),
        (f"bits per {spelling.unit}", f"bits_per_{spelling.unit}", ".3f"),
    ]
    cells = "".join(
        f"<td>{name}<br><strong>{'-' if values[key] is None else format(values[key], form)}"
        "</strong></td>"
        for name, key, form in units
    )
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
<table><tr>{cells}</tr></table>
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
