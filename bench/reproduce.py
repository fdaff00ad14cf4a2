"""Run a row of the published table through its stages, in pieces that can be stopped and resumed.

    python bench/reproduce.py ptb-qrnn --minutes 9

runs main.py, finetune.py and pointer.py with the published flags, stops cleanly after 9 minutes,
and continues exactly there when it is called again. Every call ends by writing the figures so far
to `results/ROW.md` and, for programs and curves, `results/ROW.metrics.jsonl`. Flags after `--` go
to main.py and finetune.py, for a run of reduced size; its files are named ROW-reduced. Models and
logs stay in the work folder: copy that folder to continue on another machine.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run.interpreter

import torch

import checkpoint
from bench.common import cpu_name, read_stage, table_head, table_row
from bench.published import BITS, ROWS, shown
from cli import presets
from cli.types import positive
from files.writing import replacing
from main import build_parser as training_parser
from run import metrics
from tools.getdata import SPECS, wrong_files
from utils import ToolkitError, bits, perplexity

ROOT = Path(__file__).resolve().parent.parent


class Work:
    """The work folder of a row: `main.pt` and so on, each stage's numbers and output, `state.json`.

    `state.json` holds each stage's seconds, commits, devices, commands and figures.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "state.json"
        self.state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def stage(self, name: str) -> dict[str, Any]:
        """A stage's entry in `state.json`; an empty one if there is none."""
        empty = {"seconds": 0.0, "commits": [], "devices": [], "commands": [], "done": False}
        return self.state.setdefault(name, empty)

    def save(self) -> None:
        """Write `state.json`."""
        with replacing(self.folder / "state.json") as file:
            file.write(json.dumps(self.state, indent=1).encode())


class Stop:
    """Ends the running stage after so many minutes, or when this process gets a signal.

    `signum` is the first signal, SIGALRM if the time was up first, and 0 before.
    """

    def __init__(self, minutes: float | None) -> None:
        self.signum = 0
        self.process: subprocess.Popen | None = None
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(signum, self._note)
        if minutes is not None:
            signal.setitimer(signal.ITIMER_REAL, 60 * minutes)

    def _note(self, signum: int, frame: object) -> None:
        self.signum = self.signum or signum
        if self.process is not None:
            self.process.terminate()

    def watch(self, process: subprocess.Popen) -> None:
        """From now on a signal makes `process` save and end; at once after an earlier signal."""
        self.process = process
        if self.signum:
            process.terminate()


def device_name(no_cuda: bool) -> str:
    """The GPU, or the processor and its threads."""
    if torch.cuda.is_available() and not no_cuda:
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def run(work: Work, name: str, flags: list[str], data: Path, stop: Stop, no_cuda: bool) -> bool:
    """Run a stage; return whether it finished. Raises ToolkitError if it failed."""
    known = work.stage(name)
    flags = [*flags, *(["--no-cuda"] if no_cuda else [])]
    words = ["python", f"{name}.py", *flags]
    print("$", *words, flush=True)
    for key, value in (
        ("commands", _portable(words, work, data)),
        ("commits", metrics.commit()),
        ("devices", device_name(no_cuda)),
    ):
        if value not in known[key]:
            known[key].append(value)
    work.save()
    before, start, last = known["seconds"], time.monotonic(), "no output"
    with (
        open(work.folder / f"{name}.log", "a", encoding="utf-8", buffering=1) as log,
        # A session of its own: after Ctrl-C main.py would end early and look finished.
        subprocess.Popen(
            [sys.executable, str(ROOT / f"{name}.py"), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        ) as process,
    ):
        # pointer.py saves no state and takes minutes, so it runs to its end.
        if name != "pointer":
            stop.watch(process)
        for line in process.stdout:
            last = line.strip()
            log.write(line)
            print(line, end="", flush=True)
            if line.startswith("Model total parameters:"):
                known["parameters"] = int(line.split()[-1])
            if line.startswith("| end of epoch"):
                known["seconds"] = before + time.monotonic() - start
                work.save()
            if line.startswith("| End of pointer"):
                kind = "valid" if "val loss" in line else "test"
                known[f"{kind}_ppl"] = float(line.split(" ppl ")[1].split("|")[0])
    known["seconds"] = before + time.monotonic() - start
    known["done"] = process.returncode == 0
    work.save()
    # A negative status: the signal came before the script had set its handlers.
    if process.returncode not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
        raise ToolkitError(
            f"{name}.py ended with exit status {process.returncode} ({last}): see "
            f"{work.folder / name}.log"
        )
    return known["done"]


def stage_flags(work: Work, row: str, name: str, data: Path, extra: list[str]) -> list[str]:
    """The flags that start a stage or resume it."""
    published = presets.COMMANDS[row][name].split()
    # pointer.py scores the model of finetune.py.
    model = work.folder / ("finetune.pt" if name == "pointer" else f"{name}.pt")
    where = ["--data", str(data), "--save", str(model)]
    if name == "pointer":
        return [*published, *where, *cut_short(extra)]
    where += ["--logdir", str(work.folder / name)]
    training = checkpoint.load(model).training if model.exists() else None
    if training is not None and training["stage"] == f"{name}.py":
        # Only flags that a resumed run does not take from the file.
        return ["--resume", str(model), *where, *cut_short(extra)]
    if name == "finetune":
        # finetune.py gets a copy, so that main.py's result stays.
        checkpoint.save(model, checkpoint.load(work.folder / "main.pt"))
    return [*published, *extra, *where]


def cut_short(extra: list[str]) -> list[str]:
    """`--max-batches N` among the flags, if given: every call of a stage needs it again."""
    batches = training_parser().given(extra).get("max_batches")
    return [] if batches is None else ["--max-batches", str(batches)]


def figures(work: Work, row: str) -> dict[str, dict[str, Any]]:
    """Of each stage: epochs done and total, valid and test in the row's unit, whether finished."""
    convert = bits if ROWS[row].unit == BITS else perplexity
    result = {}
    for name in ROWS[row].figures:
        if name not in work.state:
            continue
        known = work.state[name]
        found = {"done": known["done"], "seconds": round(known["seconds"], 1)}
        if name == "pointer":
            found |= {"valid": known.get("valid_ppl"), "test": known.get("test_ppl")}
        else:
            lines, epochs = read_stage(work.folder / name)
            tests = [line["test_loss"] for line in lines if line.get("kind") == "test"]
            flags = next((line["flags"] for line in reversed(lines) if "flags" in line), {})
            model = work.folder / f"{name}.pt"
            losses = [line["valid_loss"] or math.inf for line in epochs.values()]
            if model.exists():
                losses = [checkpoint.load(model).valid_loss]  # of the model that was tested
            best = min(losses, default=math.inf)
            found |= {
                "epochs": max(epochs, default=0),
                "of": flags.get("epochs"),
                "seed": flags.get("seed"),
                "parameters": known.get("parameters"),
                "valid": convert(best) if math.isfinite(best) else None,
                "test": convert(tests[-1]) if known["done"] and tests else None,
            }
        result[name] = found
    return result


def write_results(work: Work, row: str, folder: Path, reduced: list[str]) -> Path:
    """Write ROW.md and ROW.metrics.jsonl; return the path of ROW.md."""
    stem = f"{row}-reduced" if reduced else row
    found = figures(work, row)
    head = {
        "row": row,
        "reduced": reduced,
        "another_text": work.state["another_text"],
        "unit": ROWS[row].unit,
        "versions": metrics.versions(),
        "stages": found,
        "commands": {name: work.state[name]["commands"] for name in found},
        "commits": sorted({str(c) for name in found for c in work.state[name]["commits"]}),
        "devices": sorted({d for name in found for d in work.state[name]["devices"]}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{stem}.metrics.jsonl") as file:
        file.write(json.dumps(head).encode() + b"\n")
        for name in found:
            # Log lines within an epoch are left out: they would be megabytes.
            for line in read_stage(work.folder / name)[0]:
                if line.get("kind") in ("epoch", "switch", "test"):
                    file.write(json.dumps({"stage": name, **line}).encode() + b"\n")
    path = folder / f"{stem}.md"
    with replacing(path) as file:
        file.write(page(head).encode())
    return path


def page(head: dict[str, Any]) -> str:
    """The text of ROW.md: commands, progress, and our figures beside the published ones."""
    published = ROWS[head["row"]]
    lines = [f"# {published.title}, {head['unit']}", ""]
    if head["another_text"]:
        lines += ["**Another text than the row's.**", ""]
    if head["reduced"]:
        lines += [
            f"**A run of reduced size (`{' '.join(head['reduced'])}`): it shows that the stages "
            "work; its figures do not compare with the published ones.**",
            "",
        ]
    first = next(iter(head["stages"].values()), {})
    lines += [
        f"- commit {', '.join(head['commits'])}",
        f"- {', '.join(f'{name} {version}' for name, version in head['versions'].items())}",
        f"- {', '.join(head['devices'])}",
        f"- parameters: {first.get('parameters') or 0:,}",
        "",
    ]
    columns = ["stage", "epochs", "time", "seed", "valid", "published", "test", "published"]
    lines += table_head(*columns)
    for name, known in head["stages"].items():
        cells = []
        for kind, value in zip(("valid", "test"), published.figures[name], strict=True):
            cells.append(shown(known[kind], published.unit))
            cells.append("" if value is None else f"{value:g}")
        stage = f"{name}.py{'' if known['done'] else ' (not finished)'}"
        epochs = f"{known['epochs']} of {known['of']}" if "epochs" in known else ""
        minutes = f"{known['seconds'] / 60:.1f} min"
        lines.append(table_row(stage, epochs, minutes, known.get("seed", ""), *cells))
    lines += ["", "```", *(c for words in head["commands"].values() for c in words), "```", ""]
    return "\n".join(lines)


def _portable(words: list[str], work: Work, data: Path) -> str:
    """A command without the names of this machine's folders."""
    paths = {word: Path(word) for word in words}
    names = {w: f"WORK/{path.name}" for w, path in paths.items() if path.parent == work.folder}
    names |= {w: "DATA" for w, path in paths.items() if path == data}
    return " ".join(names.get(word, word) for word in words)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", choices=ROWS, help="row of the published table")
    parser.add_argument(
        "--minutes",
        type=positive,
        metavar="M",
        help="stop cleanly after so long; pointer.py, once begun, runs to its end",
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the corpus, if elsewhere")
    parser.add_argument("--work", type=Path, metavar="DIR", help="default: reproduce/ROW")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR")
    parser.add_argument("--no-cuda", action="store_true", help="stay on the CPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run until the time is up; return the exit status. Raises ToolkitError for user errors."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    args, extra = build_parser().parse_args(argv[:cut]), argv[cut + 1 :]
    published = presets.COMMANDS[args.row]["main"].split()
    corpus = Path(training_parser().parse_args(published).data)
    data = args.data or ROOT / corpus
    stop = Stop(args.minutes)
    work = Work(args.work or ROOT / "reproduce" / args.row)
    begun = work.state.setdefault("flags", extra)
    if begun != extra:
        raise ToolkitError(
            f"{work.folder} was begun with the flags {' '.join(begun) or '(none)'} after --: give "
            "the same, or another --work"
        )
    # Checked at every call, as a new stage, unlike --resume, would accept a changed text.
    wrong = wrong_files(SPECS[corpus.name], data)
    if wrong and not extra:
        raise ToolkitError(
            f"{data} is not the row's corpus ({'; '.join(wrong)}): fetch it with ./getdata.sh, or "
            "give flags after -- for a run that is not the row's"
        )
    work.state["another_text"] = bool(wrong)
    try:
        for name in ROWS[args.row].figures:
            if work.stage(name)["done"]:
                continue
            if stop.signum:
                break
            flags = stage_flags(work, args.row, name, data, extra)
            if not run(work, name, flags, data, stop, args.no_cuda):
                break
    finally:
        path = write_results(work, args.row, args.results, extra)
    left = [name for name in ROWS[args.row].figures if not work.stage(name)["done"]]
    if left:
        print(f"Stopped before the end of {left[0]}.py: the same command continues. Wrote {path}")
    else:
        print(f"All stages are done. Wrote {path}")
    return 0 if stop.signum in (0, signal.SIGALRM) else 128 + stop.signum


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ToolkitError, OSError) as error:
        sys.stderr.write(f"reproduce.py: error: {error}\n")
        sys.exit(1)
