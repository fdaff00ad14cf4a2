"""Draw the validation perplexity of runs over epochs and over time.

A RUN is the log of main.py or finetune.py (their output in a file), a metrics.jsonl, or the folder
that holds one. The switch to averaged SGD is marked. A RUN that begins with finetuning, or where a
run was resumed, continues the curve of the RUN before it.
"""

import run.interpreter  # noqa: F401

import itertools
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cli.parser import Parser
from cli.types import positive
from files.reading import opened
from run import metrics, program
from scoring import plotting
from utils import ToolkitError

# What a line of a log says; the groups have the names of metrics.jsonl.
_PATTERNS = {
    "epoch": re.compile(
        r"\| end of epoch +(?P<epoch>\d+) \| time: +(?P<time>\d+\.\d+)s \| valid loss +\S+ \| "
        r"valid ppl +(?P<valid_ppl>\d+\.\d+|inf|nan)"
    ),
    "partial": re.compile(r"\| end of epoch .*\| partial"),
    "resumed": re.compile(r"\| epoch \d+ was resumed at batch \d"),
    "batch": re.compile(
        r"\| epoch +(?P<epoch>\d+) \| +(?P<batch>\d+)/.* \| ppl +(?P<ppl>\d+\.\d+) \|"
    ),
    "switch": re.compile("Switching to averaged SGD"),
    "finetuning": re.compile(r"\| start of finetuning"),
    "resuming": re.compile(r"Resuming .+: epoch \d"),
}
_NUMBERS = {"epoch": ("epoch", "time", "valid_ppl"), "batch": ("epoch", "batch", "ppl")}
# The lines of the first ten runs, of the next ten, and so on.
_STYLES = ("-", "--", ":", "-.")

# A line of a run: its kind, which is a key of _PATTERNS, and its _NUMBERS.
Line = tuple[str, list[float]]


class Curve:
    """A run, from its lines; if an epoch ran twice, before and after resuming, the last counts.

    `ppl` and `seconds` are by epoch, `batches` are training's perplexities by epoch and batch; the
    epochs of finetuning are counted after those of training. The seconds of the epochs in `resumed`
    are those since the run was resumed. `switch` is the epoch after which averaging starts;
    `partial` says that the validation was cut short.
    """

    def __init__(self, name: str, lines: Iterable[Line]) -> None:
        self.name = name
        self.ppl: dict[int, float] = {}
        self.seconds: dict[int, float] = {}
        self.batches: dict[int, dict[float, float]] = {}
        self.resumed: set[int] = set()
        self.switch: int | None = None
        self.partial = False
        before = epoch = 0
        for kind, numbers in lines:
            if kind == "epoch":
                number, seconds, ppl = numbers
                epoch = before + int(number)
                self.ppl[epoch] = math.inf if math.isnan(ppl) else ppl
                self.seconds[epoch] = seconds
                self.resumed.discard(epoch)
            elif kind == "batch":
                number, batch, ppl = numbers
                self.batches.setdefault(before + int(number), {})[batch] = ppl
            elif kind == "resumed":
                self.resumed.add(epoch)
            elif kind == "switch":
                self.switch = epoch
            elif kind == "finetuning":
                before = max(self.ppl, default=0)
            elif kind == "partial":
                self.partial = True

    def hours(self) -> list[float]:
        """Hours of training and evaluation up to the end of each epoch, in order.

        A resumed epoch has at least the median time of the others: that before the stop is unknown.
        """
        complete = [self.seconds[epoch] for epoch in self.ppl if epoch not in self.resumed]
        typical = statistics.median(complete or [0.0])
        seconds = [
            max(self.seconds[epoch], typical) if epoch in self.resumed else self.seconds[epoch]
            for epoch in sorted(self.ppl)
        ]
        return [total / 3600 for total in itertools.accumulate(seconds)]

    def training(self) -> list[float]:
        """Training's perplexity in each epoch, in order; nan where no line has it.

        Raises ToolkitError if no epoch has one.
        """
        if not self.batches:
            raise ToolkitError(
                f"{self.name} has no log line within an epoch for --train: train with a smaller "
                "--log-interval, or leave --train out"
            )
        means = {n: statistics.geometric_mean(ppl.values()) for n, ppl in self.batches.items()}
        return [means.get(epoch, math.nan) for epoch in sorted(self.ppl)]


def build_parser() -> Parser:
    """The command line of plot.py."""
    parser = Parser("plot", __doc__)
    add = parser.group("")
    add("runs", nargs="+", metavar="RUN", help="log file, metrics.jsonl or folder")
    add("--out", "curves.png", "picture: .png, .pdf or .svg", metavar="FILE")
    add("--names", nargs="+", metavar="NAME", help="names of the runs, instead of file names")
    add("--train", False, "draw the perplexity in training too, as thin lines")
    add("--max-ppl", type=positive, metavar="PPL", help="top; by default early epochs may be cut")
    return parser


def from_log(text: str) -> Iterator[Line]:
    """The lines of a log that say something."""
    for line in text.splitlines():
        for kind, pattern in _PATTERNS.items():
            if match := pattern.search(line):
                yield kind, [float(match[name]) for name in _NUMBERS.get(kind, ())]


def from_metrics(path: Path) -> Iterator[Line]:
    """The lines of a metrics.jsonl; raises ToolkitError if a line lacks its numbers."""
    stage = "main"
    for number, line in enumerate(metrics.read(path), start=1):
        try:
            kind = line.get("kind")
            if "command" in line:
                flags = line["flags"]
                starts = line["command"][0].endswith("finetune.py")
                kind = "resuming" if flags.get("resume") else "finetuning" if starts else "new"
                yield kind, []
                kind = "partial" if flags.get("max_batches") else ""
            elif kind not in (*_NUMBERS, "switch"):
                continue  # a line of another kind
            # bench/reproduce.py puts the stages into one file.
            elif line.get("stage", stage) != stage:
                stage = line["stage"]
                yield "finetuning", []
            # A number that is not finite is null.
            values = [line[name] for name in _NUMBERS.get(kind, ())]
            yield kind, [math.inf if value is None else float(value) for value in values]
            if line.get("resumed_at"):
                yield "resumed", []
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
            raise ToolkitError(
                f"line {number} of {path} lacks the numbers for its kind: name a run's --logdir"
            ) from None


def read_run(run: str) -> tuple[str, list[Line]]:
    """The name and the lines of a RUN; raises ToolkitError if no epoch has ended, and OSError."""
    path = Path(run)
    if path.is_dir():
        path = path / metrics.NAME
    if path.suffix == ".jsonl":
        name, lines = path.parent.name or run, list(from_metrics(path))
        # Of several runs in one folder the last with an epoch is drawn.
        ended = max((at for at, (kind, _) in enumerate(lines) if kind == "epoch"), default=0)
        new = [at for at, (kind, _) in enumerate(lines[:ended]) if kind == "new"]
        lines = lines[max(new, default=0) :]
    else:
        with opened(path, "r", encoding="utf-8", errors="replace") as file:
            name, lines = path.stem, list(from_log(file.read()))
    if not any(kind == "epoch" for kind, _ in lines):
        raise ToolkitError(
            f"{run} has no line of a finished epoch: name the log of main.py or finetune.py, or a "
            "run's --logdir"
        )
    return name, lines


def read_curves(runs: Sequence[str]) -> list[Curve]:
    """The curves of the RUNs, each joined with those that continue it; errors as `read_run`."""
    joined: list[tuple[str, list[Line]]] = []
    for name, lines in map(read_run, runs):
        first = next(kind for kind, _ in lines if kind in ("epoch", "finetuning", "resuming"))
        if joined and first != "epoch":
            joined[-1][1].extend(lines)
        else:
            joined.append((name, lines))
    return [Curve(name, lines) for name, lines in joined]


def draw(curves: Sequence[Curve], out: str, max_ppl: float | None, train: bool) -> None:
    """Write the picture, with `train` of training too; raises ToolkitError."""
    figure = plotting.figure_class()(figsize=(10, 4.6 + 0.08 * len(curves)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    longest = max(curve.hours()[-1] for curve in curves)
    unit, scale = ("hours", 1) if longest >= 2 else ("minutes", 60)
    drawn = []
    for number, curve in enumerate(curves):
        epochs = sorted(curve.ppl)
        ppl, training = [curve.ppl[epoch] for epoch in epochs], curve.training() if train else []
        drawn += [value for value in ppl + training if not math.isnan(value)]
        times = [hours * scale for hours in curve.hours()]
        best = f"best {min(ppl):.2f}{', partial' if curve.partial else ''}"
        # matplotlib omits a label that starts with _, and reads a dollar as the start of a formula.
        label = f"{curve.name} ({best})".replace("$", r"\$").replace("_", "\u200b_", 1)
        look = {"color": f"C{number % 10}", "ls": _STYLES[number // 10 % len(_STYLES)]}
        for ax, x in ((left, epochs), (right, times)):
            ax.plot(x, ppl, marker=".", ms=4, label=label, lw=1.5, **look)
            if train:
                ax.plot(x, training, lw=0.9, **look)
            if curve.switch in epochs:
                at = epochs.index(curve.switch)
                ax.plot(x[at], ppl[at], "D", color=look["color"], ms=8, mec="black", zorder=3)
    if any(curve.switch in curve.ppl for curve in curves):
        left.plot([], [], "D", color="white", mec="black", ms=8, label="averaging starts")
    if train:
        left.plot([], [], color="grey", lw=0.9, label="training, mean of an epoch")
    figure.suptitle(f"Validation {'and training ' * train}perplexity over epochs and over time")
    left.set_xlabel("epochs")
    left.xaxis.get_major_locator().set_params(integer=True)
    resumed = " (resumed epochs estimated)" if any(curve.resumed for curve in curves) else ""
    right.set_xlabel(f"{unit} of training and evaluation{resumed}")
    top, bottom = max_ppl or max(drawn) * 1.03, min(drawn)
    if not max_ppl and max(len(curve.ppl) for curve in curves) > 10:
        # Without the high perplexities at the start of long runs.
        top = min(top, 2 * max(min(curve.ppl.values()) for curve in curves))
    if math.isfinite(top) and top > bottom:
        left.set_ylim(bottom - 0.05 * (top - bottom), top)
    cut = f", cut off at {top:.4g}" if max(drawn) > top else ""
    left.set_ylabel(f"perplexity{cut}")
    # Below the axes, where it hides no curve.
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    plotting.save(figure, out, "--out")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the runs; raises ToolkitError for problems the user can fix."""
    parser = build_parser()
    args = parser.parse_args(argv)
    # An argument that is not UTF-8 holds lone surrogates, which no font has.
    names = [name.encode("utf-8", "replace").decode() for name in args.names or ()]
    plotting.check(args.out, "--out")
    curves = read_curves(args.runs)
    if names and len(names) != len(curves):
        parser.error(f"--names has {len(names)} names for {len(curves)} runs")
    for curve, name in zip(curves, names, strict=False):
        curve.name = name
    draw(curves, args.out, args.max_ppl, args.train)
    for curve in curves:
        best = min(curve.ppl, key=curve.ppl.get)
        notes = [] if curve.switch is None else [f"averaging after epoch {curve.switch}"]
        notes += ["partial validation"] if curve.partial else []
        if curve.resumed:
            epochs = ", ".join(map(str, sorted(curve.resumed)))
            notes.append(f"resumed in epoch {epochs}: its time is an estimate")
        print(
            f"| {curve.name}: {len(curve.ppl)} epochs, {60 * curve.hours()[-1]:.1f} minutes | "
            f"best valid ppl {curve.ppl[best]:.2f} after epoch {best}",
            *notes,
            sep=" | ",
        )


if __name__ == "__main__":
    program.run(main)
