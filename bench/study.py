"""A small-scale study on PTB: LSTM, GRU and QRNN side by side, and ablations of the LSTM.

`python bench/study.py DATA WORK` runs the missing runs, two at a time. `WORK` keeps the models and
numbers, so that an interrupted study continues where it stopped. Each run is six epochs of main.py
and two of finetune.py, which averages from its first step. A "raw" run is two more epochs of
main.py instead, without averaging. At the end, or with `--report` at once, the numbers go to
results/study.jsonl and docs/curves.png; tools/results_table.py makes the tables from them.
"""

import argparse
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from bench.common import read_stage, table_head, table_row
from bench.published import ABLATIONS as PUBLISHED_ABLATIONS
from files.writing import replacing
from scoring import plotting
from tools.getdata import SPECS, wrong_files
from utils import ToolkitError, perplexity

ROOT = Path(__file__).resolve().parent.parent

SIZES = "--batch_size 20 --emsize 100 --nhid 200 --nlayers 2".split()
RATES = "--dropout 0.2 --dropouth 0.1 --dropouti 0.1 --dropoute 0.05 --wdrop 0.2".split()
MAIN_EPOCHS, FINETUNE_EPOCHS = 6, 2

# At the LSTM's rate of 30 a GRU diverges within the first hundred batches.
LEARNING_RATE = {"GRU": "--lr 5"}

ABLATIONS = {
    "no weight drop": "--wdrop 0",
    "no embedding dropout": "--dropoute 0",
    "no AR and TAR": "--alpha 0 --beta 0",
    "fixed sequence length": "--fixed-length",
}


@dataclass
class Run:
    """One model: name, cell, seed, ablation if any; `raw` adds epochs without averaging."""

    name: str
    cell: str
    seed: int
    without: str = ""
    raw: bool = False

    def flags(self) -> list[str]:
        """The flags of main.py and finetune.py, except files and the number of epochs."""
        changed = ABLATIONS[self.without].split() if self.without else []
        changed += LEARNING_RATE.get(self.cell, "").split()
        return [*SIZES, *RATES, *changed, "--model", self.cell, "--seed", str(self.seed)]


RUNS = [
    Run("lstm-1", "LSTM", 1, raw=True),
    *(Run(f"lstm-1 {name}".replace(" ", "-"), "LSTM", 1, name) for name in ABLATIONS),
    Run("qrnn-1", "QRNN", 1),
    Run("gru-1", "GRU", 1),
    Run("lstm-2", "LSTM", 2, raw=True),
    Run("qrnn-2", "QRNN", 2),
    Run("gru-2", "GRU", 2),
]


def stage(folder: Path, name: str, script: str, flags: list[str]) -> None:
    """Run a stage to its end unless it is done; numbers and output go to FOLDER/NAME."""
    done = folder / name / "done"
    if done.exists():
        return
    (folder / name).mkdir(parents=True, exist_ok=True)
    flags = [*flags, "--logdir", str(folder / name)]
    print("$ python", script, *flags, flush=True)
    with open(folder / name / "output.log", "a", encoding="utf-8") as log:
        command = [sys.executable, str(ROOT / script), *flags]
        # Two runs with one thread each are faster than one run with two threads.
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True, env=alone)
    # Ctrl-C reaches the stage too, which then ends early with exit status 0.
    epochs = read_stage(folder / name)[1]
    if max(epochs, default=0) < int(flags[flags.index("--epochs") + 1]):
        raise ToolkitError(f"{folder / name} was interrupted: the same command continues it")
    done.touch()


def train(run: Run, data: Path, work: Path) -> None:
    """Run all stages; finished stages are skipped, an interrupted main.py is resumed."""
    folder = work / run.name
    where = ["--data", str(data)]
    model = folder / "main.pt"
    start = ["--resume", str(model)] if model.exists() else [*run.flags(), "--save", str(model)]
    stage(folder, "main", "main.py", [*start, *where, "--epochs", str(MAIN_EPOCHS)])
    if run.raw:
        raw = folder / "raw.pt"
        if not raw.exists():
            checkpoint.copy(model, raw)
        start = ["--resume", str(raw)]
        epochs = ["--epochs", str(MAIN_EPOCHS + FINETUNE_EPOCHS)]
        stage(folder, "raw", "main.py", [*start, *where, *epochs])
    if not (folder / "finetune" / "done").exists():
        # Two short epochs, which start again after an interruption.
        shutil.rmtree(folder / "finetune", ignore_errors=True)
        finetuned = folder / "finetune.pt"
        checkpoint.copy(model, finetuned)
        start = [*run.flags(), "--save", str(finetuned)]
        epochs = ["--epochs", str(FINETUNE_EPOCHS)]
        stage(folder, "finetune", "finetune.py", [*start, *where, *epochs])


def record(run: Run, second: str, folder: Path) -> dict[str, Any] | None:
    """A run whose stages are "main" and `second`, as plain values; None without an epoch of it."""
    epochs, tests, heads = [], {}, []
    for name in ("main", second):
        lines, found = read_stage(folder / name)
        before = MAIN_EPOCHS if name == "finetune" else 0
        for epoch, line in found.items():
            loss = math.inf if line["valid_loss"] is None else line["valid_loss"]
            epochs.append({"epoch": before + epoch, "loss": loss, "stage": name})
        heads += [line for line in lines if "versions" in line]
        losses = [line["test_loss"] for line in lines if line.get("kind") == "test"]
        tests |= {name: losses[-1]} if losses else {}
    if not epochs or (second == "raw" and not found):
        return None
    log = folder / "main" / "output.log"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    size = re.search(r"^Model total parameters: (\d+)$", text, re.MULTILINE)
    commits = [head["commit"] for head in heads if head["commit"]]
    return {
        "name": run.name,
        "cell": run.cell,
        "seed": run.seed,
        "without": "no averaging" if second == "raw" else run.without,
        "epochs": epochs,
        "tests": tests,
        "parameters": int(size[1]) if size else None,
        # A trailing + marks uncommitted changes.
        "commits": list(dict.fromkeys(c[:7] + "+" * c.endswith("+") for c in commits)),
        "versions": heads[0]["versions"],
        "device": heads[0]["device"],
        "flags": " ".join(run.flags()),
    }


def collected(work: Path) -> list[dict[str, Any]]:
    """The record of every run with an epoch in `work`."""
    stages = [(run, second) for run in RUNS for second in ["finetune"] + ["raw"] * run.raw]
    records = [record(run, second, work / run.name) for run, second in stages]
    return [found for found in records if found]


def after(run: dict[str, Any] | None, epoch: int) -> float | None:
    """Validation perplexity after an epoch, None if it was not run."""
    epochs = [] if run is None else run["epochs"]
    return next((perplexity(e["loss"]) for e in epochs if e["epoch"] == epoch), None)


def tested(run: dict[str, Any] | None) -> float | None:
    """Test perplexity of the last stage's best model, None if that stage is not finished."""
    tests = {} if run is None else run["tests"]
    loss = tests.get("finetune", tests.get("raw"))
    return None if loss is None else perplexity(loss)


def tables(runs: list[dict[str, Any]]) -> str:
    """Both tables: the cells side by side, and the ablations beside the paper's."""
    if not runs:
        return "Not run yet."
    found = {(run["cell"], run["seed"], run["without"]): run for run in runs}
    last = MAIN_EPOCHS + FINETUNE_EPOCHS
    columns = ["cell", "parameters", "seed", f"valid after {MAIN_EPOCHS} epochs"]
    lines = table_head(*columns, f"after {last}, averaged", "test")
    for cell, seed in itertools.product(("LSTM", "GRU", "QRNN"), (1, 2)):
        run = found.get((cell, seed, ""))
        size = f"{run['parameters']:,}" if run and run["parameters"] else ""
        values = [after(run, MAIN_EPOCHS), after(run, last), tested(run)]
        lines.append(table_row(cell, size, seed, *map(_shown, values)))
    columns = ["LSTM, seed 1", f"valid after {last} epochs", "test", "change"]
    lines += ["", *table_head(*columns, "published, full size: valid / test", "change")]
    base, published_base = after(found.get(("LSTM", 1, "")), last), PUBLISHED_ABLATIONS[""][0]
    for without, (published, published_test) in PUBLISHED_ABLATIONS.items():
        run = found.get(("LSTM", 1, without))
        valid = after(run, last)
        lines.append(
            table_row(
                without or "everything",
                _shown(valid),
                _shown(tested(run)),
                _change(valid, base) if without else "",
                "" if published is None else f"{published:.1f} / {published_test:.1f}",
                _change(published, published_base) if without else "",
            )
        )
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "not run" if value is None else f"{value:.2f}"


def _change(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f"{value - base:+.1f}"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """The curves of the cells: validation perplexity over epochs, one colour a cell."""
    figure = plotting.figure_class()(figsize=(8, 4.6), layout="constrained")
    ax = figure.subplots()
    colours = {"LSTM": "C0", "GRU": "C1", "QRNN": "C2"}
    for run in runs:
        first = run["seed"] == 1
        if run["without"] == "no averaging":
            epochs = [e for e in run["epochs"] if e["epoch"] >= MAIN_EPOCHS]
            label = "LSTM without averaging" if first else None
            style, colour = ":", "grey"
        elif not run["without"]:
            epochs, label = run["epochs"], f"{run['cell']}, seed {run['seed']}"
            style, colour = "-" if first else "--", colours[run["cell"]]
        else:
            continue
        x, ppl = [e["epoch"] for e in epochs], [perplexity(e["loss"]) for e in epochs]
        ax.plot(x, ppl, style, color=colour, marker=".", label=label)
    ax.axvline(MAIN_EPOCHS, color="black", lw=0.8, ls=":")
    ax.text(MAIN_EPOCHS + 0.05, 0.94, "averaging starts", transform=ax.get_xaxis_transform())
    ax.set_yscale("log")
    ticks = [110, 120, 140, 160, 180, 200, 250, 300, 400]
    ax.set_yticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel("epochs on PTB")
    ax.set_ylabel("validation perplexity")
    ax.set_title("Embedding 100, two layers of 200, two cores", fontsize=10)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    # Below the axes, where it hides no curve.
    figure.legend(loc="outside lower center", frameon=False, ncols=4)
    plotting.save(figure, path, "the picture")


def write(work: Path) -> None:
    """Write results/study.jsonl from `work`, and docs/curves.png from it."""
    runs = collected(work)
    if not runs:
        raise ToolkitError(f"{work} holds no finished epoch: run the study first")
    with replacing(ROOT / "results" / "study.jsonl") as file:
        file.write("".join(json.dumps(run) + "\n" for run in runs).encode())
    draw(runs, ROOT / "docs" / "curves.png")
    print(
        f"Wrote results/study.jsonl and docs/curves.png from {len(runs)} runs: "
        "`python tools/results_table.py` makes the tables"
    )


def main() -> None:
    """Run the missing runs, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder of the PTB corpus")
    parser.add_argument("work", type=Path, help="where models and numbers are kept")
    parser.add_argument("--report", action="store_true", help="run nothing, only write the numbers")
    args = parser.parse_args()
    if not args.report:
        if wrong_files(SPECS["penn"], args.data):
            raise ToolkitError(f"{args.data} is not PTB: fetch it with ./getdata.sh penn")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda run: train(run, args.data, args.work), RUNS))
    write(args.work)


if __name__ == "__main__":
    try:
        main()
    except ToolkitError as error:
        sys.exit(f"study.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("study.py: interrupted: the same command continues it")
