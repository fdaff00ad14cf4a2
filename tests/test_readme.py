"""README.md: its commands parse, the published ones are complete, its links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import CORPORA, ROOT

from cli.presets import COMMANDS

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    blocks = re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]


STAGES = [f"{stage}.py {f}" for row in COMMANDS.values() for stage, f in row.items()]


def script_calls():
    """The calls of the scripts at the root."""
    return [c.removeprefix("python ") for c in commands() if re.match(r"python \w+\.py", c)]


def test_the_readme_has_every_published_command():
    assert [c for c in STAGES if c not in script_calls()] == []


@pytest.mark.parametrize("command", sorted({*script_calls(), *STAGES}))
def test_commands_parse(command):
    script, *argv = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    args = module.build_parser().parse_args(argv)
    if "--preset" not in argv:  # which gives flags of its own
        positional = getattr(args, "file", None) is not None or hasattr(args, "runs")
        assert len(args.given) == sum(arg.startswith("--") for arg in argv) + positional


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert len(targets) > 5
    headings = re.findall(r"^#+ (.*)", README, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    for target in targets:
        if target.startswith("#"):
            assert target in anchors
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands():
        if command.startswith("make "):
            assert f"\n{command.split()[1]}:" in makefile


def stand_in(corpus, folder):
    """A small corpus with the vocabulary of one whose training text is not at hand."""
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
    """A batch of every published command, each stage on the file of the one before."""
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
        if name != "pointer":
            short += ["--epochs", 1]
        status, out, err = script(name, *argv, *short)
        assert (status, err) == (0, "")
        assert "| End of" in out
