"""A small-scale study on PTB: LSTM, GRU and QRNN side by side, and ablations of the LSTM.

`python bench/study.py DATA WORK` runs the missing runs, two at a time. `WORK` keeps the models and
numbers, so that an interrupted study continues where it stopped. Each run is six epochs of main.py
and two of finetune.py, which averages from its first step. A "raw" run has two more epochs of
main.py, without averaging, besides. At the end the numbers go to results/study.jsonl and
docs/curves.png; tools/results_table.py makes the tables from them.
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
ALL_EPOCHS = MAIN_EPOCHS + FINETUNE_EPOCHS

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


def ended(folder: Path, epochs: int) -> bool:
    """Whether the stage in `folder` has trained for `epochs` and then scored the test set.

    After Ctrl-C a script scores the test set too, but after fewer epochs.
    """
    lines, found = read_stage(folder)
    return max(found, default=0) >= epochs and lines[-1].get("kind") == "test"


def stage(folder: Path, script: str, flags: list[str], epochs: int) -> None:
    """Run a stage to its end unless it has ended; numbers and output go to `folder`."""
    if ended(folder, epochs):
        return
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*flags, "--epochs", str(epochs), "--logdir", str(folder)]
    print("$ python", script, *flags, flush=True)
    with open(folder / "output.log", "a", encoding="utf-8") as log:
        command = [sys.executable, str(ROOT / script), *flags]
        # Two runs with one thread each are faster than one run with two threads.
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=alone)
    if not ended(folder, epochs):
        raise ToolkitError(
            f"the stage in {folder} has not ended: output.log there says why, and the same command "
            "continues it"
        )


def train(run: Run, data: Path, work: Path) -> None:
    """Run the stages that have not ended; an interrupted main.py is resumed."""
    folder = work / run.name
    model, raw, finetuned = (folder / f"{name}.pt" for name in ("main", "raw", "finetune"))
    where = ["--data", str(data)]
    start = ["--resume", str(model)] if model.exists() else [*run.flags(), "--save", str(model)]
    stage(folder / "main", "main.py", [*start, *where], MAIN_EPOCHS)
    if run.raw:
        start = ["--resume", str(raw if raw.exists() else model), "--save", str(raw)]
        stage(folder / "raw", "main.py", [*start, *where], ALL_EPOCHS)
    if not ended(folder / "finetune", FINETUNE_EPOCHS):
        # Two short epochs, which start again after an interruption.
        shutil.rmtree(folder / "finetune", ignore_errors=True)
        shutil.copyfile(model, finetuned)
        start = [*run.flags(), "--save", str(finetuned)]
        stage(folder / "finetune", "finetune.py", [*start, *where], FINETUNE_EPOCHS)


def record(run: Run, second: str, folder: Path) -> dict[str, Any]:
    """A run whose stages are "main" and `second`, as plain values."""
    epochs, tests, heads = [], {}, []
    for name in ("main", second):
        lines, found = read_stage(folder / name)
        before = MAIN_EPOCHS if name == "finetune" else 0
        for epoch, line in found.items():
            loss = math.inf if line["valid_loss"] is None else line["valid_loss"]
            epochs.append({"epoch": before + epoch, "loss": loss, "stage": name})
        heads += [line for line in lines if "versions" in line]
        tests[name] = lines[-1]["test_loss"]
    log = (folder / "main" / "output.log").read_text(encoding="utf-8")
    size = re.search(r"^Model total parameters: (\d+)$", log, re.MULTILINE)
    commits = [head["commit"] for head in heads if head["commit"]]
    return {
        "name": run.name,
        "cell": run.cell,
        "seed": run.seed,
        "without": "no averaging" if second == "raw" else run.without,
        "epochs": epochs,
        "tests": tests,
        "parameters": int(size[1]),
        # A trailing + marks uncommitted changes.
        "commits": list(dict.fromkeys(c[:7] + "+" * c.endswith("+") for c in commits)),
        "versions": heads[0]["versions"],
        "device": heads[0]["device"],
        "flags": " ".join(run.flags()),
    }


def collected(work: Path) -> list[dict[str, Any]]:
    """The records of all runs, which have ended, in `work`."""
    stages = [(run, second) for run in RUNS for second in ["finetune"] + ["raw"] * run.raw]
    return [record(run, second, work / run.name) for run, second in stages]


def after(run: dict[str, Any], epoch: int) -> float:
    """Validation perplexity after an epoch."""
    return next(perplexity(e["loss"]) for e in run["epochs"] if e["epoch"] == epoch)


def tested(run: dict[str, Any]) -> float:
    """Test perplexity of the last stage's best model."""
    *_, loss = run["tests"].values()
    return perplexity(loss)


def tables(runs: list[dict[str, Any]]) -> str:
    """Both tables: the cells side by side, and the ablations beside the paper's."""
    found = {(run["cell"], run["seed"], run["without"]): run for run in runs}
    columns = ["cell", "parameters", "seed", f"valid after {MAIN_EPOCHS} epochs"]
    lines = table_head(*columns, f"after {ALL_EPOCHS}, averaged", "test")
    for cell, seed in itertools.product(("LSTM", "GRU", "QRNN"), (1, 2)):
        run = found[cell, seed, ""]
        values = [after(run, MAIN_EPOCHS), after(run, ALL_EPOCHS), tested(run)]
        figures = [f"{value:.2f}" for value in values]
        lines.append(table_row(cell, f"{run['parameters']:,}", seed, *figures))
    columns = ["LSTM, seed 1", f"valid after {ALL_EPOCHS} epochs", "test", "change"]
    lines += ["", *table_head(*columns, "published, full size: valid / test", "change")]
    base = after(found["LSTM", 1, ""], ALL_EPOCHS)
    published_base, _ = PUBLISHED_ABLATIONS[""]
    for without, (published, published_test) in PUBLISHED_ABLATIONS.items():
        run = found["LSTM", 1, without]
        valid = after(run, ALL_EPOCHS)
        cells = [without or "everything", f"{valid:.2f}", f"{tested(run):.2f}"]
        cells.append(f"{valid - base:+.1f}" if without else "")
        if published is None:
            cells += ["", ""]
        else:
            cells.append(f"{published:.1f} / {published_test:.1f}")
            cells.append(f"{published - published_base:+.1f}" if without else "")
        lines.append(table_row(*cells))
    return "\n".join(lines)


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


def main() -> None:
    """Run the missing stages, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder of the PTB corpus")
    parser.add_argument("work", type=Path, help="where models and numbers are kept")
    args = parser.parse_args()
    if wrong_files(SPECS["penn"], args.data):
        raise ToolkitError(f"{args.data} is not PTB: fetch it with ./getdata.sh penn")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: train(run, args.data, args.work), RUNS))
    runs = collected(args.work)
    with replacing(ROOT / "results" / "study.jsonl") as file:
        file.write("".join(json.dumps(run) + "\n" for run in runs).encode())
    draw(runs, ROOT / "docs" / "curves.png")
    print(
        "Wrote results/study.jsonl and docs/curves.png: `python tools/results_table.py` makes the "
        "tables"
    )


if __name__ == "__main__":
    try:
        main()
    except ToolkitError as error:
        sys.exit(f"study.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("study.py: interrupted: the same command continues it")
