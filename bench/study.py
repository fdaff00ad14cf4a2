"""A small-scale study on PTB: LSTM, GRU and QRNN side by side, and the LSTM's parts taken away.

`python bench/study.py DATA WORK` runs what is missing of it, two runs at a time. `WORK` keeps the
models and numbers; a study that was interrupted goes on where it was. Each run is six epochs of
main.py and two of finetune.py, which averages from its first step; "raw" is two more epochs of
main.py instead, that is, no averaging.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SIZES = "--batch_size 20 --emsize 100 --nhid 200 --nlayers 2".split()
RATES = "--dropout 0.2 --dropouth 0.1 --dropouti 0.1 --dropoute 0.05 --wdrop 0.2".split()
MAIN_EPOCHS, FINETUNE_EPOCHS = 6, 2

ABLATIONS = {
    "no weight drop": "--wdrop 0",
    "no embedding dropout": "--dropoute 0",
    "no AR and TAR": "--alpha 0 --beta 0",
    "fixed sequence length": "--fixed-length",
}


@dataclass
class Run:
    """One model: name, cell, seed, what it leaves out; `raw` to go on without averaging."""

    name: str
    cell: str
    seed: int
    without: str = ""
    raw: bool = False

    def flags(self) -> list[str]:
        """The flags of main.py and finetune.py, but for the files and the number of epochs."""
        changed = ABLATIONS[self.without].split() if self.without else []
        return [*SIZES, *RATES, *changed, "--model", self.cell, "--seed", str(self.seed)]


RUNS = [
    *(Run(f"{cell.lower()}-1", cell, 1) for cell in ("LSTM", "GRU", "QRNN")),
    *(Run(f"lstm-1 {name}".replace(" ", "-"), "LSTM", 1, name) for name in ABLATIONS),
    *(Run(f"{cell.lower()}-2", cell, 2) for cell in ("LSTM", "GRU", "QRNN")),
    Run("lstm-1", "LSTM", 1, raw=True),
    Run("lstm-2", "LSTM", 2, raw=True),
]


def stage(folder: Path, name: str, script: str, flags: list[str]) -> None:
    """Run a stage to its end unless it has been: numbers and output go to FOLDER/NAME."""
    done = folder / name / "done"
    if done.exists():
        return
    (folder / name).mkdir(parents=True, exist_ok=True)
    flags = [*flags, "--logdir", str(folder / name)]
    print("$ python", script, *flags, flush=True)
    with open(folder / name / "output.log", "a", encoding="utf-8") as log:
        command = [sys.executable, str(ROOT / script), *flags]
        # Two runs of a thread each get further than one of two threads.
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True, env=alone)
    done.touch()


def train(run: Run, data: Path, work: Path) -> None:
    """All stages of a run; those done before are skipped, a cut one of main.py is resumed."""
    folder = work / run.name
    where = ["--data", str(data)]
    model = folder / "main.pt"
    epochs = ["--epochs", str(MAIN_EPOCHS)]
    if model.exists():
        start = ["--resume", str(model), *where]
    else:
        start = [*run.flags(), "--save", str(model), *where]
    stage(folder, "main", "main.py", [*start, *epochs])
    if run.raw:
        raw = folder / "raw.pt"
        if not raw.exists():
            shutil.copy(model, raw)
        epochs = ["--epochs", str(MAIN_EPOCHS + FINETUNE_EPOCHS)]
        stage(folder, "raw", "main.py", ["--resume", str(raw), *where, *epochs])
    elif not (folder / "finetune" / "done").exists():
        # Two short epochs: begun anew after an interruption.
        shutil.rmtree(folder / "finetune", ignore_errors=True)
        finetuned = folder / "finetune.pt"
        shutil.copy(model, finetuned)
        epochs = ["--epochs", str(FINETUNE_EPOCHS)]
        flags = [*run.flags(), "--save", str(finetuned), *where, *epochs]
        stage(folder, "finetune", "finetune.py", flags)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder of the PTB corpus")
    parser.add_argument("work", type=Path, help="where models and numbers are kept")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(lambda run: train(run, args.data, args.work), RUNS):
            pass


if __name__ == "__main__":
    main()
