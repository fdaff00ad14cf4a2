"""Finetune a trained model: averaged SGD from the first step, until it no longer improves."""

import run.interpreter  # noqa: F401

import argparse
from collections.abc import Sequence
from pathlib import Path

import checkpoint
from checkpoint import Checkpoint
from cli import flags
from cli.parser import Parser, Recorded
from data import partial_shuffle
from loss import make_loss
from nt_asgd import NTASGD
from run import program
from run.corpus import read_corpus
from run.log_lines import partial
from run.session import Session, open_session, resumed_file, sole_run
from training import train_epoch
from utils import ToolkitError


def build_parser() -> Parser:
    """The command line of finetune.py."""
    parser = Parser("finetune", __doc__)
    flags.add_trainer(
        parser, save="model file to start from, replaced when a better model is found"
    )
    parser.flag(
        "network",
        "--tied",
        False,
        "no effect, kept from the original: the model file says whether weights are tied",
        belongs="call",
    )
    parser.flag(
        "files",
        "--keep",
        False,
        "keep a copy of the file before finetuning, as SAVE.before-finetune",
        belongs="call",
    )
    return parser


@program.out_of_memory("--batch_size, --bptt or --max-seq-len")
def main(argv: Sequence[str] | None = None) -> None:
    """Finetune; raises ToolkitError for problems the user can fix."""
    parser = build_parser()
    given = parser.given(argv)
    with sole_run(parser, given) as ranks:
        if given.get("resume"):
            source, recorded = resumed_file(given.get("resume"), "finetune.py")
        else:
            path = given.get("save", parser.flags["save"].default)
            source = checkpoint.load(path)
            recorded = Recorded(path, "finetune", source.config, source.args)
        args = parser.settle(given, recorded)
        kept = Path(f"{args.save}.before-finetune")
        if args.keep and args.resume and not kept.exists():
            raise ToolkitError(
                "--keep comes too late: finetuning has already replaced the model in "
                f"{args.resume}: leave the flag out"
            )
        with open_session(parser, args, ranks) as session:
            begin(args, session, source)
            # The copy from before an earlier finetuning stays: it holds main.py's training state.
            begun = (source.training or {}).get("stage") == "finetune.py"
            if args.keep and ranks.first and not (begun and kept.exists()):
                checkpoint.save(kept, source, own=True)
                print(f"Wrote {kept}")
            finetune(args, session)


def begin(args: argparse.Namespace, session: Session, source: Checkpoint) -> None:
    """Load the file's model, start averaging, and prepare or resume the session."""
    corpus = read_corpus(args, source.dictionary, first=session.ranks.first)
    model, criterion = checkpoint.rebuild(source, session.device, **flags.dropouts(args))
    network = make_loss(args, model, criterion).to(session.device)
    checkpoint.load_further(network, source.loss)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = NTASGD(trained, args.lr, args.wdecay)
    optimizer.start_averaging()
    session.prepare(corpus, {**source.config, **flags.dropouts(args)}, network, optimizer)
    session.best, session.last_good = checkpoint.in_memory(source), args.save
    if not args.resume:
        # Scored anew: the file's loss may be that of another corpus or of a trial run.
        session.best_loss = session.evaluate("valid.txt", network)
        part = partial(args, session.valid_data)
        print(f"| start of finetuning | valid loss {session.best_loss:5.2f}{part}")
        return
    session.resume(source)
    if session.done and args.nonmono == source.training["args"]["nonmono"]:
        print("Already done: the validation loss no longer fell; a larger --nonmono continues")
    else:
        session.done = False


def finetune(args: argparse.Namespace, session: Session) -> None:
    """Train and validate in each epoch until finetuning is done, then score the test set."""
    reorder = partial_shuffle if args.partial_shuffle else None
    with session.until_stopped("finetuning"):
        for epoch in session.epochs(session.finished if session.done else args.epochs):
            session.begin_epoch(epoch, reorder)
            for _ in train_epoch(
                session.step,
                session.rng,
                # The original's cap: a random length exceeds the base by ten tokens at most.
                max_seq_len=args.max_seq_len or args.bptt + 10,
                fixed_length=args.fixed_length,
                max_batches=args.max_batches,
            ):
                session.after_batch()
            with session.averaged():
                valid_loss = session.validate()
                session.done = session.trigger.update(valid_loss)
                last = session.done or epoch == args.epochs
                session.keep_if_best(valid_loss, last, "averaged model")
            session.end_epoch()
            if session.done:
                print("Done: the validation loss no longer falls")
                break
    session.test()


if __name__ == "__main__":
    program.run(main)
