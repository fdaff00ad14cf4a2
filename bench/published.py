"""The published figures, for bench/reproduce.py, bench/study.py and the README's table."""

from dataclasses import dataclass

PERPLEXITY, BITS = "perplexity", "bits per character"


@dataclass
class Row:
    """A row of the published table: each stage's validation and test figures, None if unknown.

    The figures are from arXiv 1708.02182 and 1803.08240 and the original's documentation.
    """

    title: str
    unit: str
    figures: dict[str, tuple[float | None, float | None]]


def shown(value: float | None, unit: str) -> str:
    """A measured figure in a table; empty if there is none."""
    return "" if value is None else f"{value:.{3 if unit == BITS else 2}f}"


ROWS = {
    "ptb-lstm": Row(
        "PTB LSTM",
        PERPLEXITY,
        {"main": (61.2, 58.8), "finetune": (58.8, 56.5), "pointer": (53.2, 52.5)},
    ),
    "ptb-qrnn": Row(
        "PTB QRNN",
        PERPLEXITY,
        {"main": (60.6, 58.3), "finetune": (59.1, 56.7), "pointer": (53.4, 52.6)},
    ),
    "wt2-lstm": Row(
        "WikiText-2 LSTM",
        PERPLEXITY,
        {"main": (68.7, 65.6), "finetune": (67.4, 64.7), "pointer": (52.2, 50.6)},
    ),
    "wt2-qrnn": Row(
        "WikiText-2 QRNN",
        PERPLEXITY,
        {"main": (69.3, 66.8), "finetune": (68.5, 65.9), "pointer": (53.6, 52.1)},
    ),
    "ptbc": Row("PTB characters LSTM", BITS, {"main": (None, 1.175)}),
    "enwik8": Row("enwik8 LSTM", BITS, {"main": (None, 1.232)}),
    "wt103": Row("WikiText-103 QRNN", PERPLEXITY, {"main": (32.0, 33.0)}),
}

# The full-size LSTM on PTB, finetuned, from arXiv 1708.02182: validation, test perplexity.
ABLATIONS = {
    "": (60.0, 57.3),
    "no weight drop": (71.1, 68.9),
    "no embedding dropout": (65.1, 62.7),
    "no AR and TAR": (62.7, 60.3),
    "fixed sequence length": (61.3, 58.9),
    "no averaging": (None, None),
}
