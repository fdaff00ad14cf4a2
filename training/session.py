"""The session of a training run: the parts that main.py and finetune.py share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
from checkpoint import Checkpoint
from cli import flags
from cli.corpus import read_corpus
from cli.device import make_deterministic, select_device, set_precision
from cli.lines import DOUBLE_RULE, RULE, batch_line, end_line, epoch_line
from cli.metrics import MetricsWriter
from cli.parser import plain
from cli.progress import Bar
from cli.signals import Stopped, StopRequests
from data import Corpus
from files.writing import previous, sole_writer
from loss import TrainingLoss
from model import RNNModel
from nt_asgd import NonMonotonicTrigger
from splitcross import SplitCrossEntropyLoss
from training import engine, parallel, resume
from training.cuda_graphs import make_step
from training.save_clock import SaveClock
from utils import ToolkitError, perplexity, seed_everything


@contextlib.contextmanager
def open_session(stage: str, args: argparse.Namespace) -> Iterator[Session]:
    """A session of the script `stage`, such as "main.py", with its processes, signals and metrics.

    Raises ToolkitError for problems the user can fix.
    """
    if args.deterministic:
        make_deterministic()
    device = select_device(args.cuda)
    set_precision(args.precision, device)
    checkpoint.check_writable(args.save)
    ranks = parallel.join(device)
    parallel.check_columns(ranks, args.batch_size)
    with (
        ranks.together(),
        sole_writer(args.save) if ranks.first else contextlib.nullcontext(),
        StopRequests(ranks.largest) as stop,
        MetricsWriter(
            args.logdir if ranks.first else "",
            command=sys.argv,
            flags=plain(args),
            device=str(device),
        ) as writer,
    ):
        if writer.no_events:
            print(writer.no_events)
        yield Session(stage, args, device, ranks, stop, writer)


class Session:
    """A run: its model, its progress, the best model so far, and its files.

    `finished` is the last epoch that has ended; `underway` tells whether another has begun. `best`
    is the model file's content at the lowest validation loss `best_loss` (nats a token), None
    before the first one. `last_good` is the file that the run has written or started from, empty
    for a new run. `done` says that finetuning is over. `stateful` has, by name, further objects to
    save for --resume through their `state_dict` and `load_state_dict`, such as a scheduler of
    PyTorch; put them in before `resume`. `prepare` sets `model`, `criterion`, `optimizer`,
    `trigger` and `step`.
    """

    model: RNNModel
    criterion: SplitCrossEntropyLoss
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        stage: str,
        args: argparse.Namespace,
        device: torch.device,
        ranks: parallel.Ranks,
        stop: StopRequests,
        writer: MetricsWriter,
    ) -> None:
        self.stage = stage
        self.args = args
        self.device = device
        self.ranks = ranks
        self.stop = stop
        self.metrics = writer
        self.rng = seed_everything(args.seed)
        self.best: Checkpoint | None = None
        self.best_loss = math.inf
        self.last_good = ""
        self.finished = 0
        self.underway = self.done = False
        self.stateful: dict[str, Any] = {}
        self._position: Mapping[str, Any] | None = None

    # The start

    def load(self, source: Checkpoint) -> tuple[Corpus, RNNModel, SplitCrossEntropyLoss]:
        """The corpus in the vocabulary of a model file, and its model and criterion."""
        recorded = source.training["args"] if self.args.resume else source.args
        corpus = read_corpus(self.args, source.dictionary, recorded, self.ranks.first)
        dropouts = flags.dropouts(self.args)
        return corpus, *checkpoint.rebuild(source, self.device, **dropouts)

    def prepare(
        self,
        corpus: Corpus,
        model: RNNModel,
        criterion: SplitCrossEntropyLoss,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Set up the model, the data in columns, and the training step.

        Raises ToolkitError if a model file of the network could not be read.
        """
        checkpoint.check_readable(model, criterion)
        args, ranks = self.args, self.ranks
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.flags = plain(args)
        self.vocabulary = checkpoint.vocabulary_of(corpus.dictionary)
        self.fingerprint = resume.fingerprint(corpus) if ranks.first else ""
        self.trigger = NonMonotonicTrigger(args.nonmono)
        self.clock = SaveClock(args.save_every)
        self._corpus = corpus
        text, self.valid_data, self.test_data = engine.in_columns(
            corpus, args.batch_size, self.device, ranks
        )
        bf16 = args.precision == "bf16"
        network = TrainingLoss(model, criterion, **flags.penalties(args), bf16=bf16)
        self.step = make_step(
            ranks.data_parallel(network), optimizer, text, bptt=args.bptt, clip=args.clip,
            ranks=ranks, batch_fraction=text.size(1) / args.batch_size, graphs=args.cuda_graphs,
        )  # fmt: skip
        ranks.seed_masks(args.seed)
        print("Args:", self.flags)
        print("Model total parameters:", sum(p.numel() for p in self.step.params))

    def resume(self, source: Checkpoint) -> None:
        """Continue the run that wrote the file of --resume."""
        self._position = resume.restore(self, source, self.args.resume)
        self.last_good = self.args.resume
        self.underway = self._position is not None
        if source.epoch and self.best is None:
            self.best = checkpoint.in_memory(dataclasses.replace(source, args=self.flags))
        if "lr" in self.args.given:
            for group in self.optimizer.param_groups:
                group["lr"] = self.args.lr

    @property
    def rate(self) -> float:
        """The learning rate of the first group of weights."""
        return self.optimizer.param_groups[0]["lr"]

    # An epoch

    def epochs(self, last: int) -> Iterator[int]:
        """The numbers of the remaining epochs, up to `last`."""
        places = {os.path.realpath(path) for path in (self.args.resume, self.args.save)}
        if self.args.resume and self.finished >= last and len(places) == 2:
            self.save()
        yield from range(self.finished + 1, last + 1)

    def train_epoch(
        self,
        epoch: int,
        max_seq_len: int | None = None,
        reorder: Callable[[Tensor, np.random.RandomState], object] | None = None,
    ) -> None:
        """Train for one epoch, or for the rest of the epoch in which the resumed run stopped.

        Before the epoch, `reorder(text, rng)` may change the text (rows, batch), always given in
        the corpus's order, in place. `rng` depends only on the seed and the epoch, so that a run
        resumed within the epoch has the same text. Raises ToolkitError if the loss is not finite.
        """
        step, args = self.step, self.args
        if reorder is not None:
            text = self._corpus.columns("train", args.batch_size)
            reorder(text, np.random.RandomState([args.seed, epoch]))
            step.source.copy_(self.ranks.own(text))
        step.begin(self._position)
        self._position, self.underway = None, True
        self._began = time.time()
        timed = time.perf_counter(), step.batches, step.row
        rows, columns = step.source.shape
        batches = max(1, (rows - 1) // step.bptt) if args.max_batches is None else args.max_batches
        with Bar(rows * columns, f"epoch {epoch}", wanted=self.ranks.first) as bar:
            limits = {"max_seq_len": max_seq_len, "max_batches": args.max_batches}
            for _ in engine.train_epoch(step, self.rng, fixed_length=args.fixed_length, **limits):
                if step.batches % args.log_interval == 0:
                    timed = self._report_batch(epoch, batches, timed, bar)
                bar.to(step.row * columns)
                self.stop.check()
                if self.ranks.decided(self.clock.due()):
                    self.save()
        self.check_loss()

    def _report_batch(
        self, epoch: int, batches: int, timed: tuple[float, int, int], bar: Bar
    ) -> tuple[float, int, int]:
        """Print and write the numbers since the last report; return its own time, batch and row."""
        step = self.step
        # Divided by the batches counted: a resumed run may have had another interval.
        loss = self.ranks.total(step.interval.item()) / step.since
        self._check_finite(loss)
        now = time.perf_counter(), step.batches, step.row
        seconds, taken, rows = (b - a for a, b in zip(timed, now, strict=True))
        ms = seconds * 1000 / taken
        bar.line(batch_line(epoch, step.batches, batches, self.rate, ms, loss))
        bar.update(0, loss=f"{loss:.2f}", ppl=f"{perplexity(loss):.2f}")
        self.write(
            "batch",
            epoch,
            row=step.row,
            batch=step.batches,
            lr=self.rate,
            loss=loss,
            tokens_per_second=rows * self.args.batch_size / seconds,
            grad_norm=float(step.norm),
        )
        step.interval.zero_()
        step.since = 0
        return now

    def check_loss(self) -> None:
        """Raise ToolkitError if the loss of any batch of this epoch was not finite."""
        self._check_finite(self.ranks.total(float(self.step.total)))

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise self.diverged(
                f"the training loss became {loss} by batch {self.step.batches} (last gradient norm "
                f"{float(self.step.norm):g})"
            )

    def diverged(self, what: str) -> ToolkitError:
        """The error for numbers that are not finite; it names the last good model."""
        left = f"{self.last_good} holds the last good model"
        return ToolkitError(
            f"{what} at the rate {self.rate:g}: lower --lr or set --clip; "
            f"{left if self.last_good else 'no model has been saved yet'}"
        )

    # After an epoch

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the model has the averaged weights, if the optimiser averages."""
        lend = getattr(self.optimizer, "averaged", contextlib.nullcontext)
        return lend()

    def evaluate(self, what: str, *network: nn.Module) -> float:
        """The loss on valid.txt or test.txt, in nats a token.

        `network`, a model and its criterion, is by default the one in training.
        """
        return engine.evaluate(
            *(network or (self.model, self.criterion)),
            self.valid_data if what == "valid.txt" else self.test_data,
            self.args.bptt,
            self.args.max_batches,
            after_chunk=self.stop.check,
            ranks=self.ranks,
            what=what,
        )

    def validate(self, epoch: int) -> float:
        """Print and return an epoch's validation loss; raises ToolkitError if it is not finite."""
        loss = self.evaluate("valid.txt")
        if not math.isfinite(loss):
            raise self.diverged(f"the validation loss became {loss} in epoch {epoch}")
        seconds = time.time() - self._began
        print(RULE)
        print(epoch_line(epoch, seconds, loss))
        print(RULE)
        self.write("epoch", epoch, time=seconds, valid_loss=loss)
        return loss

    def keep_if_best(self, epoch: int, loss: float, last: bool, what: str = "Model") -> None:
        """Keep the current weights if `loss` is the lowest so far, to save them at the epoch's end.

        A save takes time, so not every short epoch is saved; the `last` one is.
        """
        self._saving = last or self.ranks.decided(self.clock.due_at_epoch_end())
        if loss < self.best_loss:
            self.best, self.best_loss = self.snapshot(epoch, loss), loss
            said = f"Saving {what[0].lower()}{what[1:]}" if self._saving else f"{what} to be saved"
            print(f"{said} (new best validation)")

    def end_epoch(self, epoch: int) -> None:
        """Count the epoch, and save if a save is due."""
        self.finished, self.underway = epoch, False
        if self._saving:
            self.save()

    # The files

    def write(self, kind: str, epoch: int, row: int | None = None, **numbers: Any) -> None:
        """Write a line of metrics, `row` rows of the text into `epoch`, by default at its end."""
        rows = self.step.source.size(0)
        done = (epoch - 1) * rows + (rows if row is None else row)
        self.metrics.write(kind, step=done, epoch=epoch, **numbers)

    def snapshot(self, epoch: int, loss: float) -> Checkpoint:
        """A copy of the current weights, as a model file; `loss` is the validation loss."""
        return Checkpoint(
            config=checkpoint.config_of(self.model, self.criterion),
            model=checkpoint.snapshot(self.model),
            criterion=checkpoint.snapshot(self.criterion),
            vocabulary=self.vocabulary,
            args=self.flags,
            stage=self.stage,
            epoch=epoch,
            valid_loss=loss,
        )

    def save(self) -> None:
        """Write best weights and training state in one file, so that the two always match."""
        with self.clock.writing():
            state = resume.training_state(self)
            if self.ranks.first:
                best = self.snapshot(0, math.inf) if self.best is None else self.best
                path, keep = self.args.save, not self.last_good
                if keep and os.path.isfile(path):
                    print(f"Keeping the old model file {path} as {previous(path)}")
                checkpoint.save(path, dataclasses.replace(best, training=state), keep)
            self.last_good = self.args.save

    def save_copy(self, path: str, epoch: int, loss: float) -> None:
        """Write the current weights to a separate file."""
        if self.ranks.first:
            checkpoint.save(path, self.snapshot(epoch, loss))

    # The end

    @contextlib.contextmanager
    def until_stopped(self, what: str) -> Iterator[None]:
        """Within this context a signal saves the state and ends the run.

        Ctrl-C ends `what` only, so that the best model so far can be tested.
        """
        self.stop.check()
        try:
            yield
        except Stopped as stopped:
            self.save()
            if stopped.signum != signal.SIGINT or self.best is None:
                told = f"{stopped}; --resume {self.args.save} continues from here"
                raise Stopped(stopped.signum, told) from None
            print(RULE)
            print(f"Exiting from {what} early")

    def test(self) -> None:
        """Score the best model on the test set."""
        loss = self.evaluate("test.txt", *checkpoint.rebuild(self.best, self.device))
        print(DOUBLE_RULE)
        print(end_line(loss))
        self.metrics.write("test", step=self.finished * self.step.source.size(0), test_loss=loss)
        print(DOUBLE_RULE)
