"""Decisions from the benchmarks' tables: which way is faster, and which goals are reached."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

Row = tuple[str, str, str, int]  # a file, the start of two cells of a row, the figure's column


@dataclass
class Question:
    """Is the figure at `row` at most `limit`, or at most that at `other` times `limit`?"""

    asks: str
    row: Row
    limit: float
    other: Row | None = None


def step(name: str, way: str) -> Row:
    """A row of bench/train_step.py, in milliseconds."""
    return f"train_step-{name.lower().replace(' ', '-')}", f"{name},", way, 2


LAYER = "qrnn_layer"
FULL = step("PTB QRNN", "graphs tf32")
QUESTIONS = [
    Question("CUDA graphs pay", step("PTB QRNN", "graphs tf32"), 1, step("PTB QRNN", "eager tf32")),
    Question(
        "a QRNN step is at most half an LSTM step", step("PTB QRNN", "graphs tf32"), 0.5,
        step("PTB LSTM", "graphs tf32"),
    ),
    Question("a PTB QRNN step takes at most 1.5 ms", step("PTB QRNN", "graphs tf32"), 1.5),
    *(
        Question(f"{name} pays in a PTB QRNN step", FULL, 1,
                 step("PTB QRNN", f"graphs tf32 without {name}"))
        for name in ("aligned", "cross_entropy", "update")
    ),
    Question("rows of 1552 pay", ("alignment", "QRNN 1550 | tf32", "1552", 3), 0.97,
             ("alignment", "QRNN 1550 | tf32", "1550", 3)),
    Question("ForgetMult, PTB: 35 us", ("forget_mult", "(70, 20, 1550)", "ours", 2), 35),
    Question("ForgetMult, WT103: 290 us", ("forget_mult", "(140, 60, 2500)", "ours", 2), 290),
    Question("the layer, PTB: 45 us", (LAYER, "(70, 20, 1550)", "fused", 2), 45),
    Question("the layer, WT103: 420 us", (LAYER, "(140, 60, 2500)", "fused", 2), 420),
    Question("window 2: side by side pays", (LAYER, "(70, 20, 400, 1550)", "side by side, tf32", 2),
             1, (LAYER, "(70, 20, 400, 1550)", "two products, tf32", 2)),
]  # fmt: skip


def figure(files: Mapping[str, str], row: Row) -> float | None:
    """The number in a row of a file's tables, None where there is none."""
    file, first, second, column = row
    for line in files.get(file, "").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = re.match(r"[\d.]+", cells[column]) if len(cells) > column else None
        if found and line.startswith(f"| {first}") and f"| {second} |" in line:
            return float(found[0])
    return None


def decisions(files: Mapping[str, str]) -> str:
    """A table of the answers; `files` are the benchmarks' outputs by name."""
    lines = ["| question | measured | limit | answer |", "|---|---|---|---|"]
    for question in QUESTIONS:
        value, limit = figure(files, question.row), question.limit
        if question.other is not None:
            other = figure(files, question.other)
            limit = other and other * limit
        if value is None or limit is None:
            lines.append(f"| {question.asks} | not measured | | |")
        else:
            answer = "yes" if value <= limit else "no"
            lines.append(f"| {question.asks} | {value:g} | {limit:.4g} | {answer} |")
    return "\n".join(lines)
