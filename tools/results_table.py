"""Write the pages' tables from results/ and the presets alone, or check that they agree.

Tables stand between `<!-- NAME: written by tools/results_table.py -->` and `<!-- end of NAME -->`:

published  in README.md: published figures and ours, from bench/reproduce.py's ROW.metrics.jsonl
study      in docs/reproducing.md and results/study.md: from bench/study.py's study.jsonl
commands   in docs/commands.md: the published commands, from cli/presets.py

`--check` changes nothing and ends with exit status 1 if they differ. `--lease ARCHIVE` writes the
archive of bench/lease.sh as a page of results/ instead.
"""

import argparse
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import study
from bench.common import read_lines, table_head, table_row
from bench.published import BITS, ROWS, Row, shown
from cli.presets import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
NONE_OF_OURS = (
    "None of these rows has been run here yet. What has been run: the [demo](results/demo.md), the "
    "[small-scale study](docs/reproducing.md#a-small-scale-study), and a\n[small run beside the "
    "same run of the original](docs/reproducing.md#the-same-small-run-in-the-original)."
)


def published_cell(row: Row, stage: str) -> str:
    """The published figures of a stage; empty where there is none."""
    valid, test = row.figures.get(stage, (None, None))
    if test is None:
        return ""
    return f"test {test:.3f} bpc" if row.unit == BITS else f"{valid:.1f} / {test:.1f}"


def our_cell(row: Row, known: dict[str, Any]) -> str:
    """Our figures, or the progress of an unfinished run; empty if nothing has been run."""
    valid, test = (shown(known.get(kind), row.unit) for kind in ("valid", "test"))
    if valid and test:
        return f"{valid} / {test}"
    if not valid or not known.get("epochs"):
        return ""
    return f"valid {valid} after {known['epochs']} of {known['of']} epochs"


def published_table(results: Path) -> str:
    """The published table, with our figures if the files in `results` have any."""
    stages = ["main", "finetune", "pointer"]
    ours = {}
    for name in ROWS:
        head = next(iter(read_lines(results / f"{name}.metrics.jsonl")), {})
        ours[name] = head.get("stages", {})
    filled = stages if any(ours.values()) else []
    more = ["ours: main", *stages[1:]] if filled else []
    lines = table_head("corpus, cell", "published: main", *stages[1:], *more)
    for name, row in ROWS.items():
        cells = [published_cell(row, stage) for stage in stages]
        cells += [our_cell(row, ours[name].get(stage, {})) for stage in filled]
        title = f"[{row.title}](results/{name}.md)" if ours[name] else row.title
        lines.append(table_row(title, *cells))
    return "\n".join(lines if filled else [*lines, "", NONE_OF_OURS])


def replaced(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of `name`; raises ValueError without markers."""
    start = f"<!-- {name}: written by tools/results_table.py -->"
    end = f"<!-- end of {name} -->"
    pattern = re.compile(f"(?<={re.escape(start)}\n).*?(?={re.escape(end)})", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"there must be one pair of markers {start} and {end}")
    return pattern.sub(lambda _: f"\n{content}\n\n", text)


def commands() -> str:
    """Every published command, row by row."""
    parts = []
    for name, stages in COMMANDS.items():
        lines = [f"python {stage}.py {flags}" for stage, flags in stages.items()]
        parts.append("\n".join([f"{ROWS[name].title}, `{name}`:\n", "```", *lines, "```"]))
    return "\n\n".join(parts)


def pages(results: Path) -> dict[str, tuple[str, str]]:
    """The table of each page: its name and its content."""
    tables = study.tables(read_lines(results / "study.jsonl"))
    return {
        "README.md": ("published", published_table(results)),
        "docs/reproducing.md": ("study", tables),
        "results/study.md": ("study", tables),
        "docs/commands.md": ("commands", commands()),
    }


def lease_page(archive: Path) -> tuple[str, str]:
    """The name and the text of the page of an archive of bench/lease.sh."""
    texts = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".txt"):
                content = tar.extractfile(member).read().decode(errors="replace").strip()
                texts[Path(member.name).stem] = content
    parts = texts.pop("parts")
    commit, gpu = re.match(r"commit (\w{1,7})\w*, (.*?),", parts).groups()
    lines = [f"# {gpu}, commit {commit}", "Made by bench/lease.sh: docs/first-gpu-run.md.", parts]
    for name, text in texts.items():
        lines += [f"## {name}", text if "\n|---|" in text else f"```\n{text[-6000:]}\n```"]
    return f"gpu-{re.sub('[^a-z0-9]+', '-', gpu.lower())}-{commit}.md", "\n\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write or check the pages; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--lease", type=Path, metavar="ARCHIVE")
    args = parser.parse_args(argv)
    if args.lease:
        name, text = lease_page(args.lease)
        (ROOT / "results" / name).write_text(text, encoding="utf-8")
        print(f"Wrote results/{name}")
        return 0
    status = 0
    for page, (name, content) in pages(ROOT / "results").items():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        new = replaced(text, name, content)
        if new != text and args.check:
            print(f"{page} differs from its sources: run python tools/results_table.py")
            status = 1
        elif new != text:
            path.write_text(new, encoding="utf-8")
            print(f"Wrote {page}")
    return status


if __name__ == "__main__":
    sys.exit(main())
