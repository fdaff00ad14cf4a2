"""Train a language model on a corpus with NT-ASGD or Adam, and score it on the test set."""

import run.interpreter  # noqa: F401

import argparse
import sys
from collections.abc import Sequence

import torch

import checkpoint
from checkpoint import Checkpoint
from cli import flags
from cli.parser import Given, Parser, Recorded
from data import partial_shuffle
from loss import make_loss
from model import make_network
from nt_asgd import NTASGD
from run import program
from run.corpus import read_corpus
from run.rehearsal import rehearse
from run.session import Session, open_session, resumed_file, sole_run
from splitcross import default_splits
from training import train_epoch
from utils import ToolkitError


def build_parser() -> Parser:
    """The command line of main.py."""
    parser = Parser("main", __doc__)
    flags.add_trainer(parser, save="model file to write")
    flags.add_vocabulary(parser)
    flags.add_tokens_are(parser)
    parser.flag(
        "training",
        "--optimizer",
        "sgd",
        "optimiser",
        belongs="run",
        fixed="its state belongs to that optimiser",
        choices=["sgd", "adam"],
    )
    parser.flag(
        "training",
        "--when",
        [-1],
        "after each of these epochs save a copy as SAVE.eE and divide the learning rate by 10",
        belongs="run",
        type=int,
        nargs="+",
        metavar="E",
    )
    parser.flag(
        "files",
        "--init",
        "",
        "model file to start a new run from: its weights, architecture and vocabulary",
        belongs="call",
        either="start",
        metavar="FILE",
    )
    parser.flag(
        "running",
        "--rehearse",
        False,
        "train a few batches in a temporary folder and check that every stage works",
        belongs="call",
    )
    return parser


@program.out_of_memory("--batch_size, --bptt or --max-seq-len")
def main(argv: Sequence[str] | None = None) -> None:
    """Train; raises ToolkitError for problems the user can fix."""
    parser = build_parser()
    given = parser.given(argv)
    if given.get("rehearse"):
        if given.get("resume"):
            raise ToolkitError("--rehearse checks a new run: leave --resume out")
        rehearse(parser, sys.argv[1:] if argv is None else argv)
        return
    with sole_run(parser, given) as ranks:
        source, recorded = starting_file(given)
        args = parser.settle(given, recorded)
        with open_session(parser, args, ranks) as session:
            begin(args, session, source)
            train(args, session)


def starting_file(given: Given) -> tuple[Checkpoint | None, Recorded | None]:
    """The model file of --resume or --init, if there is one, and what it says about flags."""
    init, path = given.get("init"), given.get("resume")
    for flag in ("vocab_size", "min_count", "unk"):
        if given.get(flag) and (init or path):
            raise ToolkitError(
                f"--{flag.replace('_', '-')} makes a vocabulary, but --resume and --init use the "
                "model's: leave the flag out"
            )
    if path:
        return resumed_file(path, "main.py")
    if init:
        source = checkpoint.load(init)
        return source, Recorded(init, "start", source.config, source.args)
    return None, None


def begin(args: argparse.Namespace, session: Session, source: Checkpoint | None) -> None:
    """Start with a new model or a file's: load the corpus and prepare the session."""
    if source is not None:
        corpus = read_corpus(args, source.dictionary, first=session.ranks.first)
        config = {**source.config, **flags.dropouts(args)}
        model, criterion = checkpoint.rebuild(source, session.device, **flags.dropouts(args))
    else:
        corpus = read_corpus(args, first=session.ranks.first)
        splits = default_splits(len(corpus.dictionary))
        if splits:
            corpus = corpus.sorted_by_frequency()
        config = {
            "splits": splits,
            "rnn_type": args.model,
            "ntoken": len(corpus.dictionary),
            "ninp": args.emsize,
            "nhid": args.nhid,
            "nlayers": args.nlayers,
            "tie_weights": True,
            **flags.dropouts(args),
        }
        if args.nlayers == 1:
            print("| one layer has the size --emsize: --nhid and --dropouth have no effect")
        model, criterion = make_network(**config)
    corpus.dictionary.tokens_are = args.tokens_are or corpus.dictionary.tokens_are
    network = make_loss(args, model, criterion).to(session.device)
    if source is not None:
        checkpoint.load_further(network, source.loss)
    trained = [p for p in network.parameters() if p.requires_grad]
    if args.optimizer == "sgd":
        optimizer = NTASGD(trained, args.lr, args.wdecay)
    else:
        optimizer = torch.optim.Adam(trained, args.lr, weight_decay=args.wdecay, fused=True)
    session.prepare(corpus, config, network, optimizer)
    if args.resume:
        session.resume(source)


def train(args: argparse.Namespace, session: Session) -> None:
    """Train, validate and apply the policy in each epoch, then score the test set."""
    optimizer, step = session.optimizer, session.step
    reorder = partial_shuffle if args.partial_shuffle else None
    with session.until_stopped("training"):
        for epoch in session.epochs(args.epochs):
            session.begin_epoch(epoch, reorder)
            for _ in train_epoch(
                step,
                session.rng,
                max_seq_len=args.max_seq_len,
                fixed_length=args.fixed_length,
                max_batches=args.max_batches,
            ):
                session.after_batch()
            averaging = args.optimizer == "sgd" and optimizer.averaging
            # Averaged weights, if any, are validated and saved; training continues on the raw.
            with session.averaged():
                valid_loss = session.validate()
                session.keep_if_best(valid_loss, last=epoch == args.epochs)
                if epoch in args.when:
                    print("Saving model before learning rate decreased")
                    session.save_copy(f"{args.save}.e{epoch}", valid_loss)
            if epoch in args.when:
                print("Dividing learning rate by 10")
                for group in optimizer.param_groups:
                    group["lr"] /= 10
            if args.optimizer == "sgd" and not averaging and session.trigger.update(valid_loss):
                print("Switching to averaged SGD")
                session.write("switch")
                optimizer.start_averaging()
            session.end_epoch()
    session.test()


if __name__ == "__main__":
    program.run(main)
