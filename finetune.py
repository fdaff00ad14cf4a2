"""Finetune a trained model: averaged SGD from the first step on, until it stops helping."""

import time
from collections.abc import Sequence

import checkpoint
import engine
import options
from checkpoint import Checkpoint
from data import Corpus
from nt_asgd import NTASGD, NonMonotonicTrigger
from utils import (
    batchify,
    check_length,
    end_line,
    epoch_line,
    seed_everything,
    select_device,
)

EVAL_BATCH_SIZE = 10
TEST_BATCH_SIZE = 1


def build_parser() -> options.Parser:
    """The command line of finetune.py."""
    parser = options.Parser(options.CLASSIC["finetune"], __doc__)
    options.add_data(parser, "data/penn/")
    options.add_model(parser)
    options.add_save(parser, "model file to start from, replaced when a better model is found")
    options.add_sizes(parser)
    parser.add_argument(
        "--tied", action="store_true", help="accepted as in the original: weights are always tied"
    )
    options.add_training(parser)
    options.add_regularisers(parser)
    options.add_seed(parser)
    options.add_device(parser)
    options.add_max_batches(parser, "batches of every epoch and evaluation")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Finetune; raises ToolkitError for what the user can mend."""
    args = options.parse(build_parser, argv)
    start_from = checkpoint.load(args.save)
    options.check_architecture(args, start_from.config, args.save)
    device = select_device(args.cuda)
    checkpoint.check_writable(args.save)
    corpus = Corpus(args.data, start_from.dictionary)
    train_data = batchify(corpus.train, args.batch_size).to(device)
    valid_data = batchify(corpus.valid, EVAL_BATCH_SIZE).to(device)
    test_data = batchify(corpus.test, TEST_BATCH_SIZE).to(device)
    check_length(train_data, "train.txt", "lower --batch_size or bring a longer text")
    check_length(valid_data, "valid.txt", "bring a longer text")
    check_length(test_data, "test.txt", "bring a longer text")
    model, criterion = checkpoint.rebuild(start_from, device, **options.given_dropouts(args))
    rng = seed_everything(args.seed)

    params = [*model.parameters(), *criterion.parameters()]
    optimizer = NTASGD(params, args.lr, args.wdecay)
    optimizer.start_averaging()
    trigger = NonMonotonicTrigger(args.nonmono)
    print("Args:", options.plain(args))
    print("Model total parameters:", sum(p.numel() for p in params))
    # Scored here and not taken from the file: that may have been another corpus or a trial.
    best_loss = engine.evaluate(model, criterion, valid_data, args.bptt, args.max_batches)
    print(f"| start of finetuning | valid loss {best_loss:5.2f}")
    # The original's cap: a drawn length is at most ten steps longer than the base.
    max_seq_len = args.bptt + 10 if args.max_seq_len is None else args.max_seq_len

    try:
        for epoch in range(1, args.epochs + 1):
            start = time.time()
            engine.train_epoch(
                model,
                criterion,
                optimizer,
                train_data,
                epoch=epoch,
                bptt=args.bptt,
                clip=args.clip,
                alpha=args.alpha,
                beta=args.beta,
                rng=rng,
                max_seq_len=max_seq_len,
                max_batches=args.max_batches,
                log_interval=args.log_interval,
                log=print,
            )
            # The averaged weights are scored and kept; training goes on from the raw ones.
            with optimizer.averaged():
                valid_loss = engine.evaluate(
                    model, criterion, valid_data, args.bptt, args.max_batches
                )
                print("-" * 89)
                print(epoch_line(epoch, time.time() - start, valid_loss))
                print("-" * 89)
                if valid_loss < best_loss:
                    best_loss = valid_loss
                    checkpoint.save(
                        args.save,
                        Checkpoint(
                            config=checkpoint.config_of(model, criterion),
                            model=checkpoint.snapshot(model),
                            criterion=checkpoint.snapshot(criterion),
                            vocabulary=start_from.vocabulary,
                            args=options.plain(args),
                            stage="finetune.py",
                            epoch=epoch,
                            valid_loss=valid_loss,
                        ),
                    )
                    print("Saving averaged model (new best validation)")
            if trigger.update(valid_loss):
                print("Done: the validation loss no longer falls")
                break
    except KeyboardInterrupt:
        print("-" * 89)
        print("Exiting from finetuning early")

    model, criterion = checkpoint.rebuild(checkpoint.load(args.save), device)
    test_loss = engine.evaluate(model, criterion, test_data, args.bptt, args.max_batches)
    print("=" * 89)
    print(end_line("training", "test", test_loss))
    print("=" * 89)


if __name__ == "__main__":
    options.run(main)
