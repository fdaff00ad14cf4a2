"""The flags that a script takes from a model file, and those it may not change."""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from cli.flags import PENALTIES
from cli.parser import ARCHITECTURE, Parser
from model import DROPOUTS
from utils import ToolkitError

# The flags that a resumed run does not take from the run it resumes.
_OF_THIS_CALL = {"resume", "save", "cuda", "max_batches", "keep", "split"}
# The flags that finetuning takes from the model's training.
_SHAPES_TRAINING = """
    batch_size bptt clip fixed_length max_seq_len nonmono partial_shuffle precision wdecay
""".split()


def check_architecture(args: argparse.Namespace, config: Mapping[str, Any], path: str) -> None:
    """Take cell and sizes from the model in the file `path`, whose configuration is `config`.

    Raises ToolkitError if a flag that was given contradicts it.
    """
    for flag, key in ARCHITECTURE.items():
        if flag in args.given and getattr(args, flag) != config[key]:
            raise ToolkitError(
                f"--{flag} {getattr(args, flag)} contradicts {path}, whose model has {flag} "
                f"{config[key]}: leave the flag out or name another model file"
            )
        if hasattr(args, flag):
            setattr(args, flag, config[key])


def resume_flags(
    args: argparse.Namespace, parser: Parser, training: Mapping[str, Any], path: str
) -> None:
    """Take every flag that is not given from the run recorded in the file `path`.

    A flag given with its recorded value counts as not given, so that the run's own command resumes
    it: a learning rate that was divided since stays divided. Raises ToolkitError if a flag would
    make it a different run, or if a recorded value is not valid for its flag.
    """
    fixed = {
        "optimizer": "its state belongs to that optimiser",
        "seed": "its random states belong to that seed",
    }
    if training["position"] is not None:
        fixed["batch_size"] = f"it is in the middle of epoch {training['epoch'] + 1}"
    recorded = training["args"]
    for name, reason in fixed.items():
        if name in args.given and getattr(args, name) != recorded.get(name):
            raise ToolkitError(
                f"--{name} {getattr(args, name)} contradicts {path}, which was trained with "
                f"{recorded.get(name)}, and {reason}: leave the flag out, or train from the start "
                "without --resume"
            )
    repeated = {name for name in args.given if getattr(args, name) == recorded.get(name)}
    args.given -= repeated - _OF_THIS_CALL
    _take(args, parser, recorded, recorded.keys() - _OF_THIS_CALL, path)


def finetune_flags(
    args: argparse.Namespace,
    parser: Parser,
    config: Mapping[str, Any],
    recorded: Mapping[str, Any],
    path: str,
) -> None:
    """Take every flag that shapes training and is not given from the file `path`, and print them.

    `config` is the model's, `recorded` the flags of its training; the learning rate is taken only
    if training used SGD.
    """
    rate = ["lr"] if recorded.get("optimizer", "sgd") == "sgd" else []
    values = {**recorded, **{name: config[name] for name in DROPOUTS if name in config}}
    names = [*_SHAPES_TRAINING, *PENALTIES, *DROPOUTS, *rate]
    print(f"From {path}: {parser.spelled(_take(args, parser, values, names, path))}")


def _take(
    args: argparse.Namespace,
    parser: Parser,
    recorded: Mapping[str, Any],
    names: Iterable[str],
    path: str,
) -> dict[str, Any]:
    """Set flags to their recorded values and return those; a given flag excludes alternatives."""
    excluded = {parser.flags[name].either for name in args.given & parser.flags.keys()} - {""}
    wanted = {
        name: recorded[name]
        for name in names
        if name in recorded and name in parser.flags and name not in args.given
        if parser.flags[name].either not in excluded
    }
    try:
        taken = parser.checked(wanted)
    except ValueError as error:
        raise ToolkitError(
            f"{path} is damaged (its {error}): give the flag, or train again with main.py"
        ) from error
    vars(args).update(taken)
    return taken
