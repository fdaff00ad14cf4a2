"""Train a language model on a corpus with NT-ASGD or Adam, and score it on the test set."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # python -I and -P omit this folder

import argparse
import functools
from collections.abc import Sequence

import torch

import checkpoint
from checkpoint import Checkpoint
from cli import flags, program, resuming
from cli.corpus import read_corpus
from cli.device import check_fits
from cli.parser import Parser
from data import partial_shuffle
from model import find_cell, make_network
from nt_asgd import NTASGD
from splitcross import default_splits
from training import resume
from training.session import Session, open_session
from utils import ToolkitError

# The default rate of 30 is for SGD; at 30 Adam diverges in the first batches.
ADAM_RATE = 1e-3


def build_parser() -> Parser:
    """The command line of main.py."""
    parser = Parser("main", __doc__)
    flags.add_trainer(parser, save="model file to write")
    flags.add_vocabulary(parser)
    parser.flag("training", "--optimizer", default="sgd", choices=["sgd", "adam"], help="optimiser")
    parser.flag(
        "training",
        "--when",
        type=int,
        nargs="+",
        default=[-1],
        metavar="E",
        help="after each of these epochs save a copy as SAVE.eE and divide the learning rate by 10",
    )
    parser.flag(
        "files",
        "--init",
        default="",
        metavar="FILE",
        help="model file to start a new run from: its weights, architecture and vocabulary",
    )
    return parser


@program.out_of_memory("--batch_size, --bptt or --max-seq-len")
def main(argv: Sequence[str] | None = None) -> None:
    """Train; raises ToolkitError for problems the user can fix."""
    parser = build_parser()
    args = parser.parse_args(argv)
    source = starting_file(args, parser)
    if "lr" not in args.given and not args.resume:
        set_default_rate(args)
    with open_session("main.py", args) as session:
        begin(args, session, source)
        train(args, session)


def starting_file(args: argparse.Namespace, parser: Parser) -> Checkpoint | None:
    """The model file of --resume or --init, if there is one."""
    if not (args.init or args.resume):
        return None
    if args.init and args.resume:
        raise ToolkitError(
            "--init starts a new run and --resume continues an old one: give one of the two"
        )
    for flag in ("vocab_size", "min_count"):
        if flag in args.given:
            raise ToolkitError(
                f"--{flag.replace('_', '-')} makes a vocabulary, but --resume and --init use the "
                "model's: leave the flag out"
            )
    if args.resume:
        return resume.read(args, parser, "main.py")
    source = checkpoint.load(args.init)
    resuming.check_architecture(args, source.config, args.init)
    return source


def set_default_rate(args: argparse.Namespace) -> None:
    """Replace the default of --lr by a rate for this optimiser and cell, and print it."""
    rate, kind = getattr(find_cell(args.model)[0], "sgd_rate", args.lr), args.model
    if args.optimizer == "adam":
        rate, kind = ADAM_RATE, "Adam"
    if rate != args.lr:
        print(f"{kind} without --lr: the learning rate is {rate:g} instead of {args.lr:g}")
        args.lr = rate


def begin(args: argparse.Namespace, session: Session, source: Checkpoint | None) -> None:
    """Start with a new model or a file's: load the corpus and prepare the session."""
    if source is not None:
        corpus, model, criterion = session.load(source)
    else:
        corpus = read_corpus(args, first=session.ranks.first)
        splits = default_splits(len(corpus.dictionary))
        if splits:
            corpus = corpus.sorted_by_frequency()
        sizes = (len(corpus.dictionary), args.emsize, args.nhid)
        options = {**flags.dropouts(args), "tie_weights": True}
        made = functools.partial(make_network, splits, args.model, *sizes, **options)
        check_fits(made, sizes, args.nlayers, session.device)
        model, criterion = made(args.nlayers)
        model, criterion = model.to(session.device), criterion.to(session.device)
    params = [*model.parameters(), *criterion.parameters()]
    if args.optimizer == "sgd":
        optimizer = NTASGD(params, args.lr, args.wdecay)
    else:
        optimizer = torch.optim.Adam(params, args.lr, weight_decay=args.wdecay, fused=True)
    session.prepare(corpus, model, criterion, optimizer)
    if args.resume:
        session.resume(source)


def train(args: argparse.Namespace, session: Session) -> None:
    """Train, validate and apply the policy in each epoch, then score the test set."""
    optimizer = session.optimizer
    reorder = partial_shuffle if args.partial_shuffle else None
    with session.until_stopped("training"):
        for epoch in session.epochs(args.epochs):
            session.train_epoch(epoch, args.max_seq_len, reorder)
            averaging = args.optimizer == "sgd" and optimizer.averaging
            # Averaged weights, if any, are validated and saved; training continues on the raw.
            with session.averaged():
                valid_loss = session.validate(epoch)
                session.keep_if_best(epoch, valid_loss, last=epoch == args.epochs)
                if epoch in args.when:
                    print("Saving model before learning rate decreased")
                    session.save_copy(f"{args.save}.e{epoch}", epoch, valid_loss)
            if epoch in args.when:
                print("Dividing learning rate by 10")
                for group in optimizer.param_groups:
                    group["lr"] /= 10
            if args.optimizer == "sgd" and not averaging and session.trigger.update(valid_loss):
                print("Switching to averaged SGD")
                session.write("switch", epoch)
                optimizer.start_averaging()
            session.end_epoch(epoch)
    session.test()


if __name__ == "__main__":
    program.run(main)
