"""README.md and docs/: published commands, links, Python blocks, and the table of modules."""

import importlib
import re
from pathlib import Path

import pytest
from conftest import CORPORA, ROOT

import checkpoint
from cli.presets import COMMANDS

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    return re.findall(
        r"^```\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def is_python(block):
    return block.startswith(("import ", "from "))


def commands():
    lines = [
        ln for page in PAGES for b in blocks(page) if not is_python(b) for ln in b.splitlines()
    ]
    return [line.split("#")[0].strip() for line in lines]


def test_the_pages_commands_for_ptb_are_published_commands():
    stages = [f"python {s}.py {flags}" for row in COMMANDS.values() for s, flags in row.items()]
    ours = [
        c for c in commands() if re.match(r"python (main|finetune|pointer|dynamiceval).*PTB", c)
    ]
    assert set(stages) <= {*commands()}
    assert [c for c in ours if c not in stages and not re.search("search|preset|grid", c)] == []


def anchors(page):
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def test_the_python_in_the_pages_runs(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = checkpoint.load(trained["LSTM"])
    model.vocabulary["words"][-1] = "<unk>"
    checkpoint.save("PTB.pt", model)
    found = [block for page in PAGES for block in blocks(page) if is_python(block)]
    assert len(found) >= 5
    for block in found:
        exec(block, {})


def test_the_readme_is_short_and_its_layout_names_what_is_there():
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= 12_000
    # A file that the layout does not name is no fault: it may be the reader's experiment.
    layout = text[text.index("## Layout") :]
    named = re.findall(r"`([\w/]+(?:\.py|/))`", layout)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text] == []


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands():
        if command.startswith("make "):
            assert f"\n{command.split()[1]}:" in makefile


def stand_in(corpus, folder):
    """A small corpus with the vocabulary of a corpus whose training text is not available."""
    if corpus == "enwik8":
        text = (CORPORA / "enwik8-head" / "first-1MiB.bin").read_bytes()
        tokens = [("\n" if byte == 10 else str(byte)) for byte in text]
        parts = {"train": tokens[:-200_000], "valid": tokens[-200_000:-100_000]}
        parts["test"] = tokens[-100_000:]
        texts = {name: " ".join(part) for name, part in parts.items()}
    else:
        heldout = CORPORA / "wikitext-103-heldout"
        texts = {name: (heldout / f"{name}.txt").read_text("utf-8") for name in ("valid", "test")}
        words = {word for text in texts.values() for word in text.split()}
        # With <eos>, 267,735 words.
        made_up = " ".join(f"made-up-{n}" for n in range(267_734 - len(words)))
        texts["train"] = f"{texts['valid']}\n{made_up}\n"
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, "utf-8")
    return folder


@pytest.mark.published
@pytest.mark.corpora
@pytest.mark.parametrize("row", COMMANDS)
def test_published_commands_run_at_their_real_size(row, script, tmp_path, monkeypatch):
    """One batch of every published command, each stage on the file of the stage before."""
    if not CORPORA.is_dir():
        pytest.skip(f"the full corpora are not in {CORPORA}")
    monkeypatch.chdir(tmp_path)
    for name, published in COMMANDS[row].items():
        argv = published.split()
        corpus = Path(importlib.import_module(name).build_parser().parse_args(argv).data).name
        folder = CORPORA / corpus
        if not (folder / "train.txt").is_file():
            folder = stand_in(corpus, tmp_path)
        short = ["--data", folder, "--max-batches", 1]
        if name in ("main", "finetune"):
            short += ["--epochs", 1]
        status, out, err = script(name, *argv, *short)
        assert (status, err) == (0, "")
        assert "| End of" in out
