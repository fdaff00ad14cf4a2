"""Train a language model on a corpus with NT-ASGD or Adam, and score it on the test set."""

import argparse
import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Sequence

import torch

from checkpoint import model_file as checkpoint
from checkpoint.model_file import Checkpoint
from cli import flags as options
from cli import metrics
from cli.progress import Bar
from cli.signals import SaveClock, Stopped, StopRequests
from model import RNNModel
from nt_asgd import NTASGD, NonMonotonicTrigger
from splitcross import SplitCrossEntropyLoss, default_splits
from training import engine, parallel
from training.step import TrainingLoss, make_step
from utils import (
    ToolkitError,
    check_valid_loss,
    end_line,
    epoch_line,
    make_deterministic,
    out_of_memory,
    perplexity,
    seed_everything,
    select_device,
    set_precision,
)

# The default rate of 30 is SGD's; Adam diverges at it in the first batches.
ADAM_LR = 1e-3


def build_parser() -> options.Parser:
    """The command line of main.py."""
    parser = options.Parser(options.CLASSIC["main"], __doc__)
    options.add_data(parser, "data/penn/")
    options.add_split(parser)
    options.add_vocabulary(parser)
    options.add_model(parser)
    options.add_save(parser, "model file to write")
    options.add_sizes(parser)
    options.add_training(parser)
    parser.add_argument("--optimizer", default="sgd", choices=["sgd", "adam"], help="optimiser")
    parser.add_argument(
        "--when",
        type=int,
        nargs="+",
        default=[-1],
        metavar="E",
        help="after these epochs save a copy as SAVE.eE and divide the learning rate by 10",
    )
    options.add_safety(parser)
    options.add_logdir(parser)
    parser.group("files").add_argument(
        "--init",
        default="",
        metavar="FILE",
        help="model file to start a new run from: its weights, architecture and vocabulary",
    )
    options.add_regularisers(parser)
    options.add_seed(parser)
    options.add_device(parser)
    options.add_speed(parser)
    options.add_max_batches(parser, "batches of every epoch and evaluation")
    return parser


@out_of_memory("--batch_size, --bptt or --max-seq-len")
def main(argv: Sequence[str] | None = None) -> None:
    """Train; raises ToolkitError for what the user can mend."""
    args = options.parse(build_parser, argv)
    resumed = initial = None
    if args.init or args.resume:
        for flag in ("vocab_size", "min_count"):
            if flag in args.given:
                raise ToolkitError(
                    f"--{flag.replace('_', '-')} makes a vocabulary, and --resume and --init take "
                    "the model's: leave it out"
                )
    if args.init:
        if args.resume:
            raise ToolkitError(
                "--init starts a new run and --resume goes on with an old one: give one of the two"
            )
        initial = checkpoint.load(args.init)
        options.check_architecture(args, initial.config, args.init)
        options.take_architecture(args, initial.config)
    if args.resume:
        resumed = checkpoint.load_to_resume(args.resume, "main.py")
        options.check_architecture(args, resumed.config, args.resume)
        options.check_resumable(args, resumed.training, args.resume)
        options.continue_from(args, resumed.training["args"], build_parser(), args.resume)
        if "save" not in args.given:
            args.save = args.resume
    if args.optimizer == "adam" and "lr" not in args.given and resumed is None:
        args.lr = ADAM_LR
        print(f"Adam without --lr: the learning rate is {ADAM_LR}, not the 30 meant for SGD")
    if args.deterministic:
        make_deterministic()
    device = select_device(args.cuda)
    precision = set_precision(args.precision, device)
    checkpoint.check_writable(args.save)
    ranks = parallel.join(device)
    with (
        ranks.together(),
        StopRequests(ranks.largest) as stop,
        metrics.writer(
            args.logdir, flags=options.plain(args), device=str(device), first=ranks.first
        ) as log,
    ):
        if log.no_events:
            print(log.no_events)
        train(args, resumed, initial, device, precision, ranks, stop, log)


def train(
    args: argparse.Namespace,
    resumed: Checkpoint | None,
    initial: Checkpoint | None,
    device: torch.device,
    precision: str,
    ranks: parallel.Ranks,
    stop: StopRequests,
    log: metrics.MetricsWriter | metrics.NoMetrics,
) -> None:
    """Everything after the command line: what is trained, the epochs, the test score."""
    rng = seed_everything(args.seed)
    parallel.check_columns(ranks, args.batch_size)
    if initial is not None:
        corpus = options.read_corpus(args, print, initial.dictionary, initial.args, ranks.first)
        model, criterion = checkpoint.rebuild(initial, device, **options.dropouts(args))
    elif resumed is None:
        corpus = options.read_corpus(args, print, first=ranks.first)
        splits = default_splits(len(corpus.dictionary))
        if splits:
            corpus = corpus.sorted_by_frequency()
        model = RNNModel(
            args.model,
            len(corpus.dictionary),
            args.emsize,
            args.nhid,
            args.nlayers,
            args.dropout,
            args.dropouth,
            args.dropouti,
            args.dropoute,
            args.wdrop,
            tie_weights=True,
        ).to(device)
        criterion = SplitCrossEntropyLoss(model.decoder.in_features, splits).to(device)
    else:
        recorded = resumed.training["args"]
        corpus = options.read_corpus(args, print, resumed.dictionary, recorded, ranks.first)
        checkpoint.check_same_text(corpus.train, resumed.training, args.data, args.resume)
        model, criterion = checkpoint.rebuild(resumed, device, **options.dropouts(args))
    train_data, valid_data, test_data = engine.in_columns(corpus, args.batch_size, device, ranks)

    params = [*model.parameters(), *criterion.parameters()]
    if args.optimizer == "sgd":
        optimizer = NTASGD(params, args.lr, args.wdecay)
    else:
        optimizer = torch.optim.Adam(params, args.lr, weight_decay=args.wdecay, fused=True)
    trigger = NonMonotonicTrigger(args.nonmono)
    network = ranks.share(TrainingLoss(model, criterion, bf16=precision == "bf16"))
    training_step = make_step(
        network, optimizer, train_data,
        bptt=args.bptt, clip=args.clip, alpha=args.alpha, beta=args.beta,
        ranks=ranks, share=train_data.size(1) / args.batch_size, graphs=args.cuda_graphs,
    )  # fmt: skip
    ranks.seed_masks(args.seed)
    run = checkpoint.Run(
        "main.py", options.plain(args), checkpoint.fingerprint(corpus.train),
        model, criterion, optimizer, trigger, rng, ranks,
    )  # fmt: skip
    best = position = None
    finished = 0
    if resumed is not None:
        finished, position = checkpoint.resume(run, resumed.training)
        if "lr" in args.given:
            for group in optimizer.param_groups:
                group["lr"] = args.lr
        if resumed.epoch:
            best = checkpoint.in_memory(dataclasses.replace(resumed, args=options.plain(args)))
    evaluate = functools.partial(
        engine.evaluate,
        bptt=args.bptt,
        max_batches=args.max_batches,
        after_chunk=stop.check,
        ranks=ranks,
    )

    print("Args:", options.plain(args))
    print("Model total parameters:", sum(p.numel() for p in params))

    vocabulary = checkpoint.vocabulary_of(corpus.dictionary)

    clock = SaveClock(args.save_every)

    def save() -> None:
        """Best weights and training state in one file: neither can be lost without the other."""
        with clock.writing():
            state = checkpoint.training_state(run, finished, position)
            if ranks.first:
                kept = checkpoint.file_of(run, vocabulary, 0, math.inf) if best is None else best
                checkpoint.save(args.save, dataclasses.replace(kept, training=state))

    def step(epoch: int, row: int) -> int:
        """How far the run has come, in rows of the corpus."""
        return (epoch - 1) * train_data.size(0) + row

    def report(epoch: int, bar: Bar, row: int, **numbers: float) -> None:
        log.write("batch", step=step(epoch, row), epoch=epoch, **numbers)
        ppl = perplexity(numbers["loss"])
        bar.update(0, loss=f"{numbers['loss']:.2f}", ppl=f"{ppl:.2f}")

    def after_batch(bar: Bar, at: engine.Position) -> None:
        bar.to(at.row * train_data.size(1))
        stop.check()
        if ranks.decided(clock.due()):
            save()

    stop.check()
    if finished >= args.epochs and not checkpoint.same_file(args.save, args.resume):
        save()
    try:
        for epoch in range(finished + 1, args.epochs + 1):
            start = time.time()
            position = engine.Position() if position is None else position
            with Bar(train_data.numel(), f"epoch {epoch}", wanted=ranks.first) as bar:
                engine.train_epoch(
                    training_step,
                    epoch=epoch,
                    rng=rng,
                    max_seq_len=args.max_seq_len,
                    fixed_length=args.fixed_length,
                    max_batches=args.max_batches,
                    log_interval=args.log_interval,
                    log=bar.line,
                    report=functools.partial(report, epoch, bar),
                    position=position,
                    after_batch=functools.partial(after_batch, bar),
                )
            averaging = args.optimizer == "sgd" and optimizer.averaging
            # The averaged weights, once there are, are scored and kept; training stays on the raw.
            with optimizer.averaged() if averaging else contextlib.nullcontext():
                valid_loss = evaluate(model, criterion, valid_data, what="valid.txt")
                check_valid_loss(valid_loss, epoch, optimizer.param_groups[0]["lr"])
                print("-" * 89)
                seconds = time.time() - start
                print(epoch_line(epoch, seconds, valid_loss))
                print("-" * 89)
                log.write(
                    "epoch",
                    step=step(epoch + 1, 0),
                    epoch=epoch,
                    time=seconds,
                    valid_loss=valid_loss,
                )
                # Short epochs are not all worth the time of a write; the last one is.
                saving = epoch == args.epochs or ranks.decided(clock.due_at_epoch_end())
                if best is None or valid_loss < best.valid_loss:
                    best = checkpoint.file_of(run, vocabulary, epoch, valid_loss)
                    print("Saving model" if saving else "Model to be saved", end="")
                    print(" (new best validation)")
                if epoch in args.when:
                    print("Saving model before learning rate decreased")
                    if ranks.first:
                        copy = checkpoint.file_of(run, vocabulary, epoch, valid_loss)
                        checkpoint.save(f"{args.save}.e{epoch}", copy)
            if epoch in args.when:
                print("Dividing learning rate by 10")
                for group in optimizer.param_groups:
                    group["lr"] /= 10
            if args.optimizer == "sgd" and not averaging and trigger.update(valid_loss):
                print("Switching to averaged SGD")
                log.write("switch", step=step(epoch + 1, 0), epoch=epoch)
                optimizer.start_averaging()
            finished, position = epoch, None
            if saving:
                save()
    except Stopped as stopped:
        save()
        if stopped.signum != signal.SIGINT or best is None:
            raise checkpoint.saved(stopped, args.save) from None
        print("-" * 89)
        print("Exiting from training early")

    model, criterion = checkpoint.rebuild(best, device)
    test_loss = evaluate(model, criterion, test_data, what="test.txt")
    print("=" * 89)
    print(end_line(test_loss))
    log.write("test", step=step(finished + 1, 0), test_loss=test_loss)
    print("=" * 89)


if __name__ == "__main__":
    options.run(main)
