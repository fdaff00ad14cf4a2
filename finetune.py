"""Finetune a trained model: averaged SGD from the first step on, until it stops helping."""

import argparse
import dataclasses
import functools
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint import model_file as checkpoint
from checkpoint.model_file import Checkpoint
from cli import flags as options
from cli import metrics
from cli.progress import Bar
from cli.signals import SaveClock, Stopped, StopRequests
from nt_asgd import NTASGD, NonMonotonicTrigger
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


def build_parser() -> options.Parser:
    """The command line of finetune.py."""
    parser = options.Parser(options.CLASSIC["finetune"], __doc__)
    options.add_data(parser, "data/penn/")
    options.add_split(parser)
    options.add_model(parser)
    options.add_save(parser, "model file to start from, replaced when a better model is found")
    options.add_sizes(parser)
    parser.add_argument(
        "--tied", action="store_true", help="accepted as in the original: weights are always tied"
    )
    options.add_training(parser)
    options.add_safety(parser)
    options.add_logdir(parser)
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the file finetuning starts from, as SAVE.before-finetune",
    )
    options.add_regularisers(parser)
    options.add_seed(parser)
    options.add_device(parser)
    options.add_speed(parser)
    options.add_max_batches(parser, "batches of every epoch and evaluation")
    return parser


@out_of_memory("--batch_size, --bptt or --max-seq-len")
def main(argv: Sequence[str] | None = None) -> None:
    """Finetune; raises ToolkitError for what the user can mend."""
    args = options.parse(build_parser, argv)
    path = args.resume or args.save
    if args.resume:
        start_from = checkpoint.load_to_resume(path, "finetune.py")
    else:
        start_from = checkpoint.load(path)
    options.check_architecture(args, start_from.config, path)
    if args.resume:
        options.check_resumable(args, start_from.training, path)
        options.continue_from(args, start_from.training["args"], build_parser(), path)
        if "save" not in args.given:
            args.save = path
        if args.keep and not Path(f"{args.save}.before-finetune").exists():
            raise ToolkitError(
                f"--keep comes too late: finetuning has replaced the model in {path} already, so "
                "leave it out"
            )
    else:
        options.take_architecture(args, start_from.config)
        options.take_dropouts(args, start_from.config)
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
        train(args, start_from, device, precision, ranks, stop, log)


def train(
    args: argparse.Namespace,
    start_from: Checkpoint,
    device: torch.device,
    precision: str,
    ranks: parallel.Ranks,
    stop: StopRequests,
    log: metrics.MetricsWriter | metrics.NoMetrics,
) -> None:
    """Everything after the command line: what is trained, the epochs, the test score."""
    parallel.check_columns(ranks, args.batch_size)
    recorded = start_from.training["args"] if args.resume else start_from.args
    corpus = options.read_corpus(args, print, start_from.dictionary, recorded, ranks.first)
    if args.resume:
        checkpoint.check_same_text(corpus.train, start_from.training, args.data, args.resume)
    train_data, valid_data, test_data = engine.in_columns(corpus, args.batch_size, device, ranks)
    model, criterion = checkpoint.rebuild(start_from, device, **options.dropouts(args))
    rng = seed_everything(args.seed)
    ranks.seed_masks(args.seed)

    params = [*model.parameters(), *criterion.parameters()]
    optimizer = NTASGD(params, args.lr, args.wdecay)
    optimizer.start_averaging()
    trigger = NonMonotonicTrigger(args.nonmono)
    network = ranks.share(TrainingLoss(model, criterion, bf16=precision == "bf16"))
    training_step = make_step(
        network, optimizer, train_data,
        bptt=args.bptt, clip=args.clip, alpha=args.alpha, beta=args.beta,
        ranks=ranks, share=train_data.size(1) / args.batch_size, graphs=args.cuda_graphs,
    )  # fmt: skip
    run = checkpoint.Run(
        "finetune.py", options.plain(args), checkpoint.fingerprint(corpus.train),
        model, criterion, optimizer, trigger, rng, ranks,
    )  # fmt: skip

    evaluate = functools.partial(
        engine.evaluate,
        bptt=args.bptt,
        max_batches=args.max_batches,
        after_chunk=stop.check,
        ranks=ranks,
    )

    print("Args:", options.plain(args))
    print("Model total parameters:", sum(p.numel() for p in params))
    best = checkpoint.in_memory(start_from)
    position = None
    finished, done = 0, False
    if args.resume:
        finished, position = checkpoint.resume(run, start_from.training)
        best_loss = start_from.training["best_loss"]
        done = start_from.training["done"] and "nonmono" not in args.given
        if done:
            print("Done before: the validation loss no longer fell; a larger --nonmono goes on")
        if "lr" in args.given:
            for group in optimizer.param_groups:
                group["lr"] = args.lr
    else:
        # Scored here and not taken from the file: that may have been another corpus or a trial.
        best_loss = evaluate(model, criterion, valid_data, what="valid.txt")
        print(f"| start of finetuning | valid loss {best_loss:5.2f}")
    # The original's cap: a drawn length is at most ten steps longer than the base.
    max_seq_len = args.bptt + 10 if args.max_seq_len is None else args.max_seq_len
    clock = SaveClock(args.save_every)
    to_keep = args.keep and not args.resume
    if to_keep and (start_from.training or {}).get("stage") == "finetune.py":
        # What was kept before that finetuning holds more: the training state of main.py.
        to_keep = not Path(f"{args.save}.before-finetune").exists()

    def save() -> None:
        """The best weights, the first model's until there are better, and the training state."""
        nonlocal to_keep
        with clock.writing():
            state = checkpoint.training_state(
                run, finished, position, best_loss=best_loss, done=done
            )
            if ranks.first:
                if to_keep:
                    checkpoint.copy(args.save, f"{args.save}.before-finetune")
                    to_keep = False
                checkpoint.save(args.save, dataclasses.replace(best, training=state))

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

    try:
        # A resumed run may have been done already.
        last = finished if done else args.epochs
        if finished >= last and args.resume and not checkpoint.same_file(args.save, args.resume):
            save()
        for epoch in range(finished + 1, last + 1):
            start = time.time()
            position = engine.Position() if position is None else position
            with Bar(train_data.numel(), f"epoch {epoch}", wanted=ranks.first) as bar:
                engine.train_epoch(
                    training_step,
                    epoch=epoch,
                    rng=rng,
                    max_seq_len=max_seq_len,
                    fixed_length=args.fixed_length,
                    max_batches=args.max_batches,
                    log_interval=args.log_interval,
                    log=bar.line,
                    report=functools.partial(report, epoch, bar),
                    position=position,
                    after_batch=functools.partial(after_batch, bar),
                )
            # The averaged weights are scored and kept; training goes on from the raw ones.
            with optimizer.averaged():
                valid_loss = evaluate(model, criterion, valid_data, what="valid.txt")
                check_valid_loss(valid_loss, epoch, args.lr)
                print("-" * 89)
                seconds = time.time() - start
                log.write(
                    "epoch",
                    step=step(epoch + 1, 0),
                    epoch=epoch,
                    time=seconds,
                    valid_loss=valid_loss,
                )
                print(epoch_line(epoch, seconds, valid_loss))
                print("-" * 89)
                done = trigger.update(valid_loss)
                # Short epochs are not all worth the time of a write; the last one is.
                saving = done or epoch == args.epochs or ranks.decided(clock.due_at_epoch_end())
                if valid_loss < best_loss:
                    best_loss = valid_loss
                    best = checkpoint.file_of(run, start_from.vocabulary, epoch, valid_loss)
                    print(
                        "Saving averaged model" if saving else "Averaged model to be saved", end=""
                    )
                    print(" (new best validation)")
            finished, position = epoch, None
            if saving:
                save()
            if done:
                print("Done: the validation loss no longer falls")
                break
    except Stopped as stopped:
        save()
        if stopped.signum != signal.SIGINT:
            raise checkpoint.saved(stopped, args.save) from None
        print("-" * 89)
        print("Exiting from finetuning early")

    model, criterion = checkpoint.rebuild(best, device)
    test_loss = evaluate(model, criterion, test_data, what="test.txt")
    print("=" * 89)
    print(end_line(test_loss))
    log.write("test", step=step(finished + 1, 0), test_loss=test_loss)
    print("=" * 89)


if __name__ == "__main__":
    options.run(main)
