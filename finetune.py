"""Finetune a trained model: averaged SGD from the first step, until it no longer improves."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # python -I and -P omit this folder

import argparse
from collections.abc import Sequence
from pathlib import Path

import checkpoint
from checkpoint import Checkpoint
from cli import flags, program, resuming
from cli.parser import Parser
from data import partial_shuffle
from nt_asgd import NTASGD
from training import resume
from training.session import Session, open_session
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
        action="store_true",
        help="no effect, kept from the original: weights are always tied",
    )
    parser.flag(
        "files",
        "--keep",
        action="store_true",
        help="keep a copy of the file before finetuning, as SAVE.before-finetune",
    )
    return parser


@program.out_of_memory("--batch_size, --bptt or --max-seq-len")
def main(argv: Sequence[str] | None = None) -> None:
    """Finetune; raises ToolkitError for problems the user can fix."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.resume:
        source = resume.read(args, parser, "finetune.py")
    else:
        source = checkpoint.load(args.save)
        resuming.check_architecture(args, source.config, args.save)
        resuming.finetune_flags(args, parser, source.config, source.args, args.save)
    kept = Path(f"{args.save}.before-finetune")
    if args.keep and args.resume and not kept.exists():
        raise ToolkitError(
            f"--keep comes too late: finetuning has already replaced the model in {args.resume}: "
            "leave the flag out"
        )
    with open_session("finetune.py", args) as session:
        begin(args, session, source)
        # The copy from before an earlier finetuning stays: it holds main.py's training state.
        begun = (source.training or {}).get("stage") == "finetune.py"
        if args.keep and session.ranks.first and not (begun and kept.exists()):
            checkpoint.copy(args.save, kept)
        finetune(args, session)


def begin(args: argparse.Namespace, session: Session, source: Checkpoint) -> None:
    """Load the file's model, start averaging, and prepare or resume the session."""
    corpus, model, criterion = session.load(source)
    params = [*model.parameters(), *criterion.parameters()]
    optimizer = NTASGD(params, args.lr, args.wdecay)
    optimizer.start_averaging()
    session.prepare(corpus, model, criterion, optimizer)
    session.best, session.last_good = checkpoint.in_memory(source), args.save
    if not args.resume:
        # Scored anew: the file's loss may be that of another corpus or of a trial run.
        session.best_loss = session.evaluate("valid.txt")
        print(f"| start of finetuning | valid loss {session.best_loss:5.2f}")
        return
    session.resume(source)
    if session.done and "nonmono" not in args.given:
        print("Already done: the validation loss no longer fell; a larger --nonmono continues")
    else:
        session.done = False


def finetune(args: argparse.Namespace, session: Session) -> None:
    """Train and validate in each epoch until finetuning is done, then score the test set."""
    # The original's cap: a random length exceeds the base by ten tokens at most.
    max_seq_len = args.bptt + 10 if args.max_seq_len is None else args.max_seq_len
    reorder = partial_shuffle if args.partial_shuffle else None
    with session.until_stopped("finetuning"):
        for epoch in session.epochs(session.finished if session.done else args.epochs):
            session.train_epoch(epoch, max_seq_len, reorder)
            with session.averaged():
                valid_loss = session.validate(epoch)
                session.done = session.trigger.update(valid_loss)
                last = session.done or epoch == args.epochs
                session.keep_if_best(epoch, valid_loss, last, "Averaged model")
            session.end_epoch(epoch)
            if session.done:
                print("Done: the validation loss no longer falls")
                break
    session.test()


if __name__ == "__main__":
    program.run(main)
