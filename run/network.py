"""The network of a model file, ready to score text."""

import argparse
import sys

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
    for line in fast.choose(network, plain=args.plain)[1:]:
        sys.stderr.write(f"{line}\n")
    return network
