"""Write the README's tables of measured figures from results/ alone, or check that they agree.

Between the markers `<!-- NAME: written by tools/results_table.py -->` and `<!-- end of NAME -->`:
`published` is the published table with ours beside it, from results/ROW.metrics.jsonl, which
bench/reproduce.py writes; `study` the small-scale study's tables, from results/study.jsonl, which
bench/study.py writes. `--check` changes nothing and ends with exit status 1 if they differ.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import study
from bench.published import BITS, ROWS, Row

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("main", "finetune", "pointer")


def published_cell(row: Row, stage: str) -> str:
    """The published figures of a stage; empty where there is none."""
    valid, test = row.figures.get(stage, (None, None))
    if test is None:
        return ""
    if row.unit == BITS:
        return f"test {test:.3f} bpc"
    return f"{valid:.1f} / {test:.1f}"


def our_cell(row: Row, known: dict[str, Any] | None) -> str:
    """Ours, and how far it came where it is not finished; empty where nothing has been run."""
    if not known or known.get("valid") is None:
        return ""
    digits = 3 if row.unit == BITS else 2
    valid = f"{known['valid']:.{digits}f}"
    if known["done"] and known.get("test") is not None:
        return f"{valid} / {known['test']:.{digits}f}"
    if not known.get("epochs"):
        return ""
    return f"valid {valid} after {known['epochs']} of {known['of']} epochs"


def published_table(results: Path) -> str:
    """The published table with ours from the files in `results`."""
    lines = [
        "| corpus, cell | published: main | finetune | pointer | ours: main | finetune | pointer |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        path = results / f"{name}.metrics.jsonl"
        stages = {}
        if path.exists():
            with open(path, encoding="utf-8") as file:
                head = json.loads(file.readline() or "{}")
            if head and not head["reduced"]:
                stages = head["stages"]
        cells = [published_cell(row, stage) for stage in STAGES]
        cells += [our_cell(row, stages.get(stage)) for stage in STAGES]
        title = f"[{row.title}](results/{name}.md)" if stages else row.title
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(lines)


def replaced(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of `name`; raises ValueError without markers."""
    start = f"<!-- {name}: written by tools/results_table.py -->"
    end = f"<!-- end of {name} -->"
    pattern = re.compile(f"(?<={re.escape(start)}\n).*?(?={re.escape(end)})", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"there must be one pair of markers {start} and {end}")
    return pattern.sub(lambda _: f"\n{content}\n\n", text)


def filled(text: str, results: Path) -> str:
    """The README's `text` with both parts from `results`."""
    text = replaced(text, "published", published_table(results))
    return replaced(text, "study", study.tables(study.read(results)))


def main(argv: list[str] | None = None) -> int:
    """Write or check README.md; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    args = parser.parse_args(argv)
    text = args.readme.read_text(encoding="utf-8")
    new = filled(text, args.results)
    if args.check:
        if new != text:
            print("README.md differs from results/: run python tools/results_table.py")
            return 1
        return 0
    if new != text:
        args.readme.write_text(new, encoding="utf-8")
        print(f"Wrote {args.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
