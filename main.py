"""Train a language model on a corpus with NT-ASGD or Adam, and score it on the test set."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence

import torch

import checkpoint
import engine
import options
from checkpoint import Checkpoint
from data import Corpus
from model import RNNModel
from nt_asgd import NTASGD, NonMonotonicTrigger
from splitcross import SplitCrossEntropyLoss, default_splits
from utils import (
    ToolkitError,
    batchify,
    check_length,
    end_line,
    epoch_line,
    rng_state,
    seed_everything,
    select_device,
    set_rng_state,
)

EVAL_BATCH_SIZE = 10
TEST_BATCH_SIZE = 1

# The default rate of 30 is SGD's; Adam diverges at it in the first batches.
ADAM_LR = 1e-3


def build_parser() -> options.Parser:
    """The command line of main.py."""
    parser = options.Parser(options.CLASSIC["main"], __doc__)
    options.add_data(parser, "data/penn/")
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
    parser.add_argument(
        "--resume",
        default="",
        metavar="FILE",
        help="model file of an earlier run to go on from, with its flags where none are given",
    )
    options.add_regularisers(parser)
    options.add_seed(parser)
    options.add_device(parser)
    options.add_max_batches(parser, "batches of every epoch and evaluation")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train; raises ToolkitError for what the user can mend."""
    args = options.parse(build_parser, argv)
    resumed = None
    if args.resume:
        resumed = checkpoint.load(args.resume)
        if resumed.stage != "main.py" or resumed.training is None:
            raise ToolkitError(
                f"{args.resume} holds no training state of main.py (it was written by "
                f"{resumed.stage}): resume from the file that main.py wrote"
            )
        options.check_architecture(args, resumed.config, args.resume)
        options.continue_from(args, resumed.args)
        if "save" not in args.given:
            args.save = args.resume
    if args.optimizer == "adam" and "lr" not in args.given and resumed is None:
        args.lr = ADAM_LR
        print(f"Adam without --lr: the learning rate is {ADAM_LR}, not the 30 meant for SGD")
    device = select_device(args.cuda)
    checkpoint.check_writable(args.save)
    rng = seed_everything(args.seed)

    if resumed is None:
        corpus = Corpus(args.data)
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
        corpus = Corpus(args.data, resumed.dictionary)
        model, criterion = checkpoint.rebuild(resumed, device, **options.given_dropouts(args))
    train_data = batchify(corpus.train, args.batch_size).to(device)
    valid_data = batchify(corpus.valid, EVAL_BATCH_SIZE).to(device)
    test_data = batchify(corpus.test, TEST_BATCH_SIZE).to(device)
    check_length(train_data, "train.txt", "lower --batch_size or bring a longer text")
    check_length(valid_data, "valid.txt", "bring a longer text")
    check_length(test_data, "test.txt", "bring a longer text")

    params = [*model.parameters(), *criterion.parameters()]
    if args.optimizer == "sgd":
        optimizer = NTASGD(params, args.lr, args.wdecay)
    else:
        optimizer = torch.optim.Adam(params, args.lr, weight_decay=args.wdecay)
    trigger = NonMonotonicTrigger(args.nonmono)
    best = None
    first_epoch = 1
    if resumed is not None:
        state = resumed.training
        checkpoint.load_state(model, state["model"])
        checkpoint.load_state(criterion, state["criterion"])
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:
            group["weight_decay"] = args.wdecay
            if "lr" in args.given:
                group["lr"] = args.lr
        trigger.losses = list(state["valid_losses"])
        first_epoch = state["epoch"] + 1
        best = dataclasses.replace(resumed, args=options.plain(args))
        set_rng_state(rng, state["rng"])
        checkpoint.set_random_states(state["random_states"])
    print("Args:", options.plain(args))
    print("Model total parameters:", sum(p.numel() for p in params))

    def file_of(epoch: int, valid_loss: float) -> Checkpoint:
        """The weights in use as a model file."""
        return Checkpoint(
            config=checkpoint.config_of(model, criterion),
            model=checkpoint.snapshot(model),
            criterion=checkpoint.snapshot(criterion),
            vocabulary=vocabulary,
            args=options.plain(args),
            stage="main.py",
            epoch=epoch,
            valid_loss=valid_loss,
        )

    def training_state(epoch: int) -> dict:
        """What a later run needs to go on after `epoch` as if nothing had happened."""
        return {
            "epoch": epoch,
            "model": checkpoint.snapshot(model),
            "criterion": checkpoint.snapshot(criterion),
            "optimizer": optimizer.state_dict(),
            "valid_losses": trigger.losses,
            "rng": rng_state(rng),
            "random_states": checkpoint.random_states(),
        }

    vocabulary = checkpoint.vocabulary_of(corpus.dictionary)
    try:
        for epoch in range(first_epoch, args.epochs + 1):
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
                max_seq_len=args.max_seq_len,
                max_batches=args.max_batches,
                log_interval=args.log_interval,
                log=print,
            )
            averaging = args.optimizer == "sgd" and optimizer.averaging
            # The averaged weights, once there are, are scored and kept; training stays on the raw.
            with optimizer.averaged() if averaging else contextlib.nullcontext():
                valid_loss = engine.evaluate(
                    model, criterion, valid_data, args.bptt, args.max_batches
                )
                print("-" * 89)
                print(epoch_line(epoch, time.time() - start, valid_loss))
                print("-" * 89)
                if best is None or valid_loss < best.valid_loss:
                    best = file_of(epoch, valid_loss)
                    print("Saving model (new best validation)")
                if epoch in args.when:
                    print("Saving model before learning rate decreased")
                    checkpoint.save(f"{args.save}.e{epoch}", file_of(epoch, valid_loss))
            if epoch in args.when:
                print("Dividing learning rate by 10")
                for group in optimizer.param_groups:
                    group["lr"] /= 10
            if args.optimizer == "sgd" and not averaging and trigger.update(valid_loss):
                print("Switching to averaged SGD")
                optimizer.start_averaging()
            # Best weights and training state in one file: neither can be lost without the other.
            best.training = training_state(epoch)
            checkpoint.save(args.save, best)
    except KeyboardInterrupt:
        print("-" * 89)
        print("Exiting from training early")
    if best is None:
        raise ToolkitError("stopped before the first epoch ended: there is no model to test")

    model, criterion = checkpoint.rebuild(checkpoint.load(args.save), device)
    test_loss = engine.evaluate(model, criterion, test_data, args.bptt, args.max_batches)
    print("=" * 89)
    print(end_line("training", "test", test_loss))
    print("=" * 89)


if __name__ == "__main__":
    options.run(main)
