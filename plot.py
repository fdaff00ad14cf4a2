"""Draw the validation perplexity of runs over epochs and over time.

A RUN is the log of main.py or finetune.py (their output in a file), a metrics.jsonl, or the folder
that holds one. The switch to averaged SGD is marked. A RUN of finetune.py alone continues the curve
of the RUN before it.
"""

import run.interpreter  # noqa: F401

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cli.parser import Parser
from cli.types import positive
from files.reading import opened
from run import metrics, program
from scoring import plotting
from utils import ToolkitError, perplexity

_EPOCH = re.compile(
    r"\| end of epoch +(\d+) \| time: +(\d+\.\d+)s \| valid loss +\S+ \| "
    r"valid ppl +(\d+\.\d+|inf|nan)"
)
_SWITCH = "Switching to averaged SGD"
_FINETUNING = "| start of finetuning"
# Line and marker of the first ten runs, of the next ten, and so on.
_STYLES = (("-", "."), ("--", "x"), (":", "+"), ("-.", "1"))


@dataclass
class Curve:
    """A run: perplexity and seconds of each epoch, and the epoch after which averaging starts.

    The epochs of finetuning are counted after the `before` epochs of training. `finetuning` says
    that the run begins with it.
    """

    name: str
    ppl: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    switch: int | None = None
    before: int = 0
    finetuning: bool = False

    def add(self, epoch: int, seconds: float, ppl: float) -> None:
        """Add an epoch; if it ran twice, before and after resuming, the last run counts."""
        self.ppl[self.before + epoch] = math.inf if math.isnan(ppl) else ppl
        self.seconds[self.before + epoch] = seconds

    def begin_finetuning(self, resumed: bool = False) -> None:
        """Count the epochs that follow after those before, unless finetuning is `resumed`."""
        self.finetuning = self.finetuning or not self.ppl
        self.before = self.before if resumed else max(self.ppl, default=0)

    def extend(self, other: "Curve") -> None:
        """Continue with the epochs of a run of finetuning."""
        self.begin_finetuning()
        for epoch, ppl in other.ppl.items():
            self.add(epoch, other.seconds[epoch], ppl)

    def hours(self) -> list[float]:
        """Hours of training and evaluation up to the end of each epoch, in order."""
        seconds = (self.seconds[epoch] for epoch in sorted(self.ppl))
        return [total / 3600 for total in itertools.accumulate(seconds)]


def build_parser() -> Parser:
    """The command line of plot.py."""
    parser = Parser("plot", __doc__)
    parser.flag("", "runs", nargs="+", metavar="RUN", help="log file, metrics.jsonl or folder")
    parser.flag("", "--out", "curves.png", "picture to write: .png, .pdf or .svg", metavar="FILE")
    parser.flag(
        "", "--names", nargs="+", metavar="NAME", help="names of the runs, instead of file names"
    )
    parser.flag(
        "",
        "--max-ppl",
        type=positive,
        metavar="PPL",
        help="top of the picture; by default the first epochs of a long run are cut off",
    )
    return parser


def from_log(text: str, name: str) -> Curve:
    """The curve in a log with the classic lines; empty if the log has none."""
    curve = Curve(name)
    epoch = None
    for line in text.splitlines():
        match = _EPOCH.search(line)
        if match:
            epoch = int(match[1])
            curve.add(epoch, float(match[2]), float(match[3]))
        elif line.startswith(_FINETUNING):
            curve.begin_finetuning()
        elif line.startswith(_SWITCH) and epoch is not None:
            curve.switch = epoch
    return curve


def from_metrics(path: Path, name: str) -> Curve:
    """The curve in a metrics.jsonl; raises ToolkitError if a line lacks its numbers."""
    curve = Curve(name)
    for number, line in enumerate(metrics.read(path), start=1):
        try:
            if line.get("kind") == "epoch":
                loss = line["valid_loss"]
                ppl = math.inf if loss is None else perplexity(loss)
                curve.add(int(line["epoch"]), float(line["time"]), ppl)
            elif line.get("kind") == "switch":
                curve.switch = int(line["epoch"])
            elif line.get("command", [""])[0].endswith("finetune.py"):
                curve.begin_finetuning(resumed=bool(line["flags"]["resume"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ToolkitError(
                f"line {number} of {path} lacks the numbers for its kind: name a run's --logdir"
            ) from None
    return curve


def read_run(run: str) -> Curve:
    """The curve of a RUN; raises ToolkitError if it has no finished epoch, and OSError."""
    path = Path(run)
    if path.is_dir():
        path = path / metrics.NAME
    if path.suffix == ".jsonl":
        curve = from_metrics(path, path.parent.name or run)
    else:
        with opened(path, "r", encoding="utf-8", errors="replace") as file:
            curve = from_log(file.read(), path.stem)
    if not curve.ppl:
        raise ToolkitError(
            f"{run} has no line of a finished epoch: name the log of main.py or finetune.py, or a "
            "run's --logdir"
        )
    return curve


def default_top(curves: Sequence[Curve]) -> float:
    """A top of the picture that cuts off the high perplexities at the start of long runs."""
    best = max(min(curve.ppl.values()) for curve in curves)
    worst = max(max(curve.ppl.values()) for curve in curves)
    return min(worst * 1.03, best * 2) if max(len(c.ppl) for c in curves) > 10 else worst * 1.03


def draw(curves: Sequence[Curve], out: str, max_ppl: float | None) -> None:
    """Write the picture; raises ToolkitError if it cannot be drawn."""
    figure = plotting.figure_class()(figsize=(10, 4.6 + 0.08 * len(curves)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    longest = max(curve.hours()[-1] for curve in curves)
    unit, scale = ("hours", 1) if longest >= 2 else ("minutes", 60)
    for number, curve in enumerate(curves):
        epochs = sorted(curve.ppl)
        ppl = [curve.ppl[epoch] for epoch in epochs]
        times = [hours * scale for hours in curve.hours()]
        best = min(ppl)
        # matplotlib omits a label that starts with _, and reads a dollar as the start of a formula.
        label = f"{curve.name} (best {best:.2f})".replace("$", r"\$").replace("_", "\u200b_", 1)
        style, marker = _STYLES[number // 10 % len(_STYLES)]
        few = marker if len(epochs) <= 60 else None
        for ax, x in ((left, epochs), (right, times)):
            (line,) = ax.plot(
                x, ppl, marker=few, label=label, color=f"C{number % 10}", lw=1.5, ls=style
            )
            if curve.switch in epochs:
                at = epochs.index(curve.switch)
                ax.plot(x[at], ppl[at], "D", color=line.get_color(), ms=8, mec="black", zorder=3)
                ax.axvline(x[at], color=line.get_color(), ls=":", lw=1)
    if any(curve.switch in curve.ppl for curve in curves):
        left.plot([], [], "D", color="white", mec="black", ms=8, label="averaging starts")
    figure.suptitle("Validation perplexity over epochs and over time")
    left.set_xlabel("epochs")
    left.xaxis.get_major_locator().set_params(integer=True)
    right.set_xlabel(f"{unit} of training and evaluation")
    top = max_ppl or default_top(curves)
    bottom = min(min(curve.ppl.values()) for curve in curves)
    if math.isfinite(top) and top > bottom:
        left.set_ylim(bottom - 0.05 * (top - bottom), top)
    cut = any(max(curve.ppl.values()) > top for curve in curves)
    left.set_ylabel(f"validation perplexity{f', cut off at {top:.4g}' if cut else ''}")
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
    curves: list[Curve] = []
    for curve in map(read_run, args.runs):
        if curve.finetuning and curves:
            curves[-1].extend(curve)
        else:
            curves.append(curve)
    if names and len(names) != len(curves):
        parser.error(f"--names has {len(names)} names for {len(curves)} runs")
    for curve, name in zip(curves, names, strict=False):
        curve.name = name
    draw(curves, args.out, args.max_ppl)
    for curve in curves:
        best = min(curve.ppl, key=lambda epoch, curve=curve: curve.ppl[epoch])
        switch = "" if curve.switch is None else f" | averaging after epoch {curve.switch}"
        print(
            f"| {curve.name}: {len(curve.ppl)} epochs, {60 * curve.hours()[-1]:.1f} minutes | "
            f"best valid ppl {curve.ppl[best]:.2f} after epoch {best}{switch}"
        )
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    program.run(main)
