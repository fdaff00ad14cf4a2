"""The network of a model file, ready to score text."""

import argparse
import functools
import sys
from typing import Any

import checkpoint
import fast
from checkpoint import Checkpoint
from loss import TrainingLoss
from run.device import score_as_trained, select_device


def network_of(loaded: Checkpoint, args: argparse.Namespace) -> TrainingLoss:
    """The network of a model file, in evaluation, on the device and with the forms of `args`.

    A form that does not agree with its definition is reported on standard error.
    """
    device = select_device(args.cuda)
    score_as_trained(loaded.args, device)
    network = checkpoint.scoring_network(loaded, device)
    choose_forms(network, plain=args.plain)
    return network


def choose_forms(network: TrainingLoss, *others: Any, plain: bool) -> None:
    """`fast.choose`; a form that does not agree with its definition is reported once."""
    for line in fast.choose(network, *others, plain=plain)[1:]:
        _report(line)


@functools.cache
def _report(line: str) -> None:
    sys.stderr.write(f"{line}\n")
