"""Make a model.pt from a model that was trained with the original toolkit, or word_language_model.

Both pickle whole objects. Export plain tensors from the file (docs/coming-from.md), then:

    python tools/import_original.py exported.pt --data data/penn --save model.pt

The architecture follows from the tensors' names and shapes. The vocabulary is that of the corpus,
in order of first appearance, as in both, or that of --vocab.
"""

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run.interpreter  # noqa: F401

import torch
from torch import Tensor

import checkpoint
from checkpoint.model_file import in_short
from cli import flags
from cli.parser import Parser
from data import Corpus, Dictionary
from files.writing import check_writable, previous, sole_writer
from model import make_network
from run import program
from splitcross import default_splits
from utils import ToolkitError

GATES = {4: "LSTM", 3: "GRU"}


def build_parser() -> Parser:
    """The command line of import_original.py."""
    parser = Parser("", __doc__)
    parser.flag("", "exported", help="file of tensors exported from the original")
    flags.add_data(parser, "data/penn/", either="words")
    parser.flag(
        "", "--vocab", either="words", metavar="FILE", help="words by id, one a line, for --data"
    )
    flags.add_save(parser, "model file to write")
    return parser


def read(path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dicts of model and criterion in an exported file, as float32; no code in it runs.

    Raises any error if the file holds anything but named tensors.
    """
    content = checkpoint.read(path)
    both = set(content) == {"model", "criterion"}
    states = [content["model"], content["criterion"]] if both else [content, {}]
    model, criterion = ({k: v.float().contiguous() for k, v in s.items()} for s in states)
    # word_language_model has all layers in one module.
    model = {re.sub(r"^rnn\.(\w+)_l(\d+)$", r"rnns.\2.\1_l0", k): t for k, t in model.items()}
    # Some versions of the original also store a weight's dropped copy: only the raw one counts.
    return {name: t for name, t in model.items() if f"{name}_raw" not in model}, criterion


def read_vocabulary(path: str) -> Dictionary:
    """The vocabulary of --vocab; raises ToolkitError."""
    try:
        words = Path(path).read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ToolkitError(
            f"cannot read {path} ({in_short(error)}): --vocab is a file of words, in UTF-8"
        ) from error
    if len(set(words)) < len(words):
        raise ToolkitError(f"{path} has a word twice: --vocab has each word once, by its id")
    return Dictionary.from_words(words)


def architecture(state: dict[str, Tensor]) -> dict[str, Any]:
    """RNNModel's arguments except dropouts, from names and shapes; raises KeyError if odd."""
    plain = {name.replace(".module.", ".").removesuffix("_raw"): t for name, t in state.items()}
    ntoken, ninp = plain["encoder.weight"].shape
    numbers = {int(m[1]) for name in plain if (m := re.match(r"rnns\.(\d+)\.", name))}
    if "rnns.0.linear.weight" in plain:
        rnn_type = "QRNN"
        nhid = plain["rnns.0.linear.weight"].size(0) // 3
    else:
        rows, nhid = plain["rnns.0.weight_hh_l0"].shape
        rnn_type = GATES[rows // nhid]
    return {
        "rnn_type": rnn_type,
        "ntoken": ntoken,
        "ninp": ninp,
        "nhid": nhid,
        "nlayers": len(numbers),
        "tie_weights": torch.equal(plain["encoder.weight"], plain["decoder.weight"]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Import; raises ToolkitError for problems the user can fix."""
    args = build_parser().parse_args(argv)
    check_writable(args.save, "--save")
    if args.vocab:
        dictionary = read_vocabulary(args.vocab)
    else:
        dictionary = Corpus(args.data, split=args.split).dictionary
    words = len(dictionary)
    try:
        state, criterion_state = read(args.exported)
        config = architecture(state)
        if config["ntoken"] != words:
            raise ToolkitError(
                f"{args.exported} has {config['ntoken']} words, {args.vocab or args.data} {words}: "
                "bring the corpus it was trained on, or its words with --vocab"
            )
        # The default dropouts of main.py; finetune.py can be given others.
        wdrop = 0.5 if any(name.endswith("_raw") for name in state) else 0.0
        config.update(dropout=0.4, dropouth=0.3, dropouti=0.65, wdrop=wdrop)
        config["splits"] = default_splits(words) if criterion_state else []
        model, criterion = make_network(**config)
        checkpoint.load_state(model, state)
        checkpoint.load_state(criterion, criterion_state)
    except ToolkitError:
        raise
    except Exception as error:
        # torch raises many kinds of error for what is no file of tensors.
        raise ToolkitError(
            f"{args.exported} does not hold the weights of a model of the original or of "
            f"word_language_model ({in_short(error)}): export the state dict as "
            "docs/coming-from.md says"
        ) from error
    if not criterion_state and default_splits(words):
        print("Without the criterion's state the softmax is not split", file=sys.stderr)
    made = checkpoint.Checkpoint(
        config=config,
        model=checkpoint.snapshot(model),
        criterion=checkpoint.snapshot(criterion),
        vocabulary=checkpoint.vocabulary_of(dictionary),
        args={"split": args.split},
        stage="import_original.py",
        epoch=0,
        valid_loss=math.inf,
    )
    # Before anything is replaced: the weights may not be finite.
    checkpoint.rebuild(made, torch.device("cpu"))
    with sole_writer(args.save):
        if Path(args.save).is_file():
            print(f"Keeping the old model file {args.save} as {previous(args.save)}")
        checkpoint.save(args.save, made, keep=True)
    print(
        f"{args.save}: {config['rnn_type']}, {config['nlayers']} layers, emsize {config['ninp']}, "
        f"nhid {config['nhid']}, {words} words, {'tied' if config['tie_weights'] else 'not tied'}"
    )


if __name__ == "__main__":
    program.run(main)
