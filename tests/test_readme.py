"""README.md: its commands parse, the published ones are complete, its links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import CORPORA, ROOT

from cli import flags as options

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHARACTERS = "--alpha 0 --beta 0 --dropoute 0"
PUBLISHED = {
    "PTB LSTM": [
        "main.py --batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 "
        "--epoch 500 --save PTB.pt",
        "finetune.py --batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 "
        "--epoch 500 --save PTB.pt",
        "pointer.py --data data/penn --save PTB.pt --lambdasm 0.1 --theta 1.0 --window 500 "
        "--bptt 5000",
    ],
    "PTB QRNN": [
        "main.py --model QRNN --batch_size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 "
        "--emsize 400 --dropouth 0.3 --seed 9001 --dropouti 0.4 --epochs 550 --save PTB.pt",
        "finetune.py --model QRNN --batch_size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 "
        "--emsize 400 --dropouth 0.3 --seed 404 --dropouti 0.4 --epochs 300 --save PTB.pt",
        "pointer.py --model QRNN --lambdasm 0.1 --theta 1.0 --window 500 --bptt 5000 --save PTB.pt",
    ],
    "WikiText-2 LSTM": [
        "main.py --epochs 750 --data data/wikitext-2 --save WT2.pt --dropouth 0.2 --seed 1882",
        "finetune.py --epochs 750 --data data/wikitext-2 --save WT2.pt --dropouth 0.2 --seed 1882",
        "pointer.py --save WT2.pt --lambdasm 0.1279 --theta 0.662 --window 3785 --bptt 2000 "
        "--data data/wikitext-2",
    ],
    "WikiText-2 QRNN": [
        "main.py --epochs 500 --data data/wikitext-2 --clip 0.25 --dropouti 0.4 --dropouth 0.2 "
        "--nhid 1550 --nlayers 4 --seed 4002 --model QRNN --wdrop 0.1 --batch_size 40 "
        "--save WT2.pt",
        "finetune.py --epochs 500 --data data/wikitext-2 --clip 0.25 --dropouti 0.4 --dropouth 0.2 "
        "--nhid 1550 --nlayers 4 --seed 4002 --model QRNN --wdrop 0.1 --batch_size 40 "
        "--save WT2.pt",
        "pointer.py --save WT2.pt --model QRNN --lambdasm 0.1279 --theta 0.662 --window 3785 "
        "--bptt 2000 --data data/wikitext-2",
    ],
    "PTB characters LSTM": [
        f"main.py --epochs 500 --nlayers 3 --emsize 200 --nhid 1000 {CHARACTERS} --dropouth 0.25 "
        "--dropouti 0.1 --dropout 0.1 --wdrop 0.5 --wdecay 1.2e-6 --bptt 150 --batch_size 128 "
        "--optimizer adam --lr 2e-3 --data data/pennchar --save PTBC.pt --when 300 400",
    ],
    "enwik8 LSTM": [
        f"main.py --epochs 50 --nlayers 3 --emsize 400 --nhid 1840 {CHARACTERS} --dropouth 0.1 "
        "--dropouti 0.1 --dropout 0.4 --wdrop 0.2 --wdecay 1.2e-6 --bptt 200 --batch_size 128 "
        "--optimizer adam --lr 1e-3 --data data/enwik8 --save ENWIK8.pt --when 25 35",
    ],
    "WikiText-103 QRNN": [
        f"main.py --epochs 14 --nlayers 4 --emsize 400 --nhid 2500 {CHARACTERS} --dropouth 0.1 "
        "--dropouti 0.1 --dropout 0.1 --wdrop 0 --wdecay 0 --bptt 140 --batch_size 60 "
        "--optimizer adam --lr 1e-3 --data data/wikitext-103 --save WT103.12hr.QRNN.pt --when 12 "
        "--model QRNN",
    ],
}


def commands():
    blocks = re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]


STAGES = [stage for row in PUBLISHED.values() for stage in row]


def script_calls():
    """The calls of the scripts at the top, whose parsers all know `options.parse`."""
    return [c.removeprefix("python ") for c in commands() if re.match(r"python \w+\.py", c)]


def test_the_readme_has_every_published_command():
    assert [c for c in STAGES if c not in script_calls()] == []


@pytest.mark.parametrize("command", sorted({*script_calls(), *STAGES}))
def test_commands_parse(command):
    script, *argv = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    args = options.parse(module.build_parser, argv)
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
@pytest.mark.parametrize("row", PUBLISHED)
def test_published_commands_run_at_their_real_size(row, script, tmp_path, monkeypatch):
    """A batch of every published command, each stage on the file of the one before."""
    if not CORPORA.is_dir():
        pytest.skip(f"the full corpora are not in {CORPORA}")
    monkeypatch.chdir(tmp_path)
    for stage in PUBLISHED[row]:
        name, *argv = shlex.split(stage.replace(".py", "", 1))
        corpus = Path(options.parse(importlib.import_module(name).build_parser, argv).data).name
        folder = CORPORA / corpus
        if not (folder / "train.txt").is_file():
            folder = stand_in(corpus, tmp_path)
        short = ["--data", folder, "--max-batches", 1]
        if name != "pointer":
            short += ["--epochs", 1]
        status, out, err = script(name, *argv, *short)
        assert (status, err) == (0, "")
        assert "| End of" in out
