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
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

import checkpoint
import fast
import training
from checkpoint import Checkpoint, CheckpointError, resume
from checkpoint.model_file import tensors_of
from cli.parser import Given, Parser, Recorded
from data import SPLITS, Corpus
from files.writing import check_writable, previous, sole_writer
from loss import TrainingLoss
from nt_asgd import NonMonotonicTrigger
from run import ranks
from run.device import make_deterministic, select_device, set_precision
from run.estimate import TIMED, WARM_UP, in_words, times
from run.log_lines import DOUBLE_RULE, RULE, batch_line, end_line, epoch_line, partial
from run.metrics import MetricsWriter
from run.progress import Bar
from run.ranks import Ranks
from run.save_clock import SaveClock
from run.signals import Stopped, StopRequests
from utils import (
    ToolkitError,
    check_length,
    check_state,
    map_state,
    perplexity,
    predicted,
    seed_everything,
)

EVAL_BATCH_SIZE = 10
TEST_BATCH_SIZE = 1
# Rows of text compared at resumption, to detect a different order of the text.
_ROWS_TO_COMPARE = 16
# Seconds of training on a CPU above which a smaller model is worth naming.
_LONG = 12 * 3600


def resumed_file(path: str, stage: str) -> tuple[Checkpoint, Recorded]:
    """The model file of --resume for the script `stage`, and what it says about flags.

    Raises CheckpointError if it has no training state of that script.
    """
    source = checkpoint.load(path)
    resume.check(source, path, stage)
    state, fixed = source.training, {}
    with resume.restoring(path):
        if state["position"] is not None:
            fixed["batch_size"] = f"it is in the middle of epoch {state['epoch'] + 1}"
        return source, Recorded(path, "resume", source.config, state["args"], fixed)


@contextlib.contextmanager
def sole_run(parser: Parser, given: Given) -> Iterator[Ranks]:
    """This run's processes, connected. Within the context no other run writes its --save.

    So a model file that is read within the context is the newest. Raises ToolkitError if another
    run writes the file, or if it cannot be written.
    """
    path = given.get("save", given.get("resume") or parser.flags["save"].default)
    check_writable(path, "--save")
    joined = ranks.join(select_device(given.get("cuda", parser.flags["cuda"].default)))
    with joined.together(), sole_writer(path) if joined.first else contextlib.nullcontext():
        joined.largest(0)  # the other ranks wait here for the first
        yield joined


@contextlib.contextmanager
def open_session(parser: Parser, args: argparse.Namespace, joined: Ranks) -> Iterator[Session]:
    """A session of the parser's script, with its signals and metrics.

    Raises ToolkitError for problems the user can fix.
    """
    if args.deterministic:
        make_deterministic()
    device = select_device(args.cuda)
    set_precision(args.precision, device)
    copies = [f"{args.save}.e{epoch}" for epoch in getattr(args, "when", []) if epoch > 0]
    for path in (previous(args.save), *copies):
        check_writable(path, "--save")
    ranks.check_columns(joined, args.batch_size)
    with (
        StopRequests(joined.largest) as stop,
        MetricsWriter(
            args.logdir if joined.first else "",
            command=sys.argv,
            flags=vars(args),
            device=str(device),
        ) as writer,
    ):
        yield Session(parser, args, device, joined, stop, writer)


class Session:
    """A run: its network, its progress, the best model so far, and its files.

    `epoch` is the current epoch, `finished` the last one that has ended. `best` is the model file's
    content at the lowest validation loss `best_loss` (nats a token), None before the first one.
    `last_good` is the file that the run has written or started from, empty for a new run. `done`
    says that finetuning is over. `stateful` has, by name, further objects to save for --resume
    through their `state_dict` and `load_state_dict`, such as a scheduler of PyTorch; put them in
    before `resume`. `prepare` sets `network`, `optimizer`, `trigger` and `step`.
    """

    network: TrainingLoss
    optimizer: torch.optim.Optimizer
    step: training.TrainingStep

    def __init__(
        self,
        parser: Parser,
        args: argparse.Namespace,
        device: torch.device,
        ranks: Ranks,
        stop: StopRequests,
        writer: MetricsWriter,
    ) -> None:
        self.parser = parser
        self.stage = f"{parser.stage}.py"
        self.args = args
        self.device = device
        self.ranks = ranks
        self.stop = stop
        self.metrics = writer
        self.rng = seed_everything(args.seed)
        self.best: Checkpoint | None = None
        self.best_loss = math.inf
        self.last_good = ""
        self.epoch = self.finished = 0
        self.done = False
        self.stateful: dict[str, Any] = {}
        # Where a resumed run goes on, until its first epoch begins.
        self._position: Mapping[str, Any] | None = None
        self._bar = Bar(None, "", wanted=False)
        # The batches of this epoch in this process; None once the estimate is printed.
        self._taken: int | None = 0
        # The training text in the corpus's order, with every rank's columns, once it is reordered.
        self._text: Tensor | None = None

    # The start

    def prepare(
        self,
        corpus: Corpus,
        config: Mapping[str, Any],
        network: TrainingLoss,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Set up the network, the data in columns, and the training step.

        `config` are the arguments of `make_network`. Raises ToolkitError if one contradicts a flag
        of its name, if a weight is a slice, if a model file of the network could not be read, if
        its state cannot be carried, if a text is too short, or if the ranks have different texts.
        """
        args, ranks = self.args, self.ranks
        self.config, self.network, self.optimizer = dict(config), network, optimizer
        self.flags, self._settings = dict(vars(args)), resume.settings_of(optimizer)
        for name, value in config.items():
            if self.flags.get(name, value) != value:
                raise ToolkitError(
                    f"--{name} {self.flags[name]} has no effect on a network that was made with "
                    f'{value}: add the flag with config="{name}"'
                )
        for name, p in network.named_parameters():
            # PyTorch's fused optimisers, and fast/nt_asgd.py, would update the numbers in between.
            if p.requires_grad and torch.empty_like(p, device="meta").stride() != p.stride():
                raise ToolkitError(
                    f"the weight {name} is a slice of a larger tensor: make it one of its own, "
                    "with .clone()"
                )
        self.vocabulary = checkpoint.vocabulary_of(corpus.dictionary)
        checkpoint.check_readable(self.snapshot(0, math.inf))
        self.fingerprint = resume.fingerprint(corpus, *SPLITS)
        if len(set(ranks.gathered(self.fingerprint))) > 1:
            raise ToolkitError(
                f"the ranks have different texts in {args.data}: bring the same corpus to each"
            )
        self.trigger = NonMonotonicTrigger(args.nonmono)
        self.clock = SaveClock(args.save_every)
        text = self._in_columns(corpus, "train", args.batch_size)
        self.valid_data = self._in_columns(corpus, "valid", EVAL_BATCH_SIZE)
        self.test_data = self._in_columns(corpus, "test", TEST_BATCH_SIZE)
        self.step = training.TrainingStep(
            ranks.data_parallel(network, fraction=text.size(1) / args.batch_size),
            optimizer,
            text,
            bptt=args.bptt,
            clip=args.clip,
        )
        check_state(self.step.hidden, text.size(1))
        if not ranks.first:
            torch.manual_seed(args.seed + ranks.rank)  # so that its dropout masks are its own
        for line in fast.choose(network, optimizer, self.step, plain=args.plain, bf16=network.bf16):
            print(line)
        if args.cuda_graphs and not args.plain and self.device.type == "cuda":
            print(fast.record_steps(self.step) or "Steps are replayed from CUDA graphs")
        print("Args:", self.parser.by_group(args) if sys.stdout.isatty() else self.flags)
        print("Model total parameters:", sum(p.numel() for p in self.step.params))

    def _in_columns(self, corpus: Corpus, part: str, count: int) -> Tensor:
        """This rank's columns of train, valid or test, on the device."""
        own = corpus.columns(part, count, *self.ranks.span(count))
        cure = "lower --batch_size or bring a longer text"
        check_length(own, f"{part}.txt", cure if part == "train" else "bring a longer text", count)
        return own.to(self.device)

    def resume(self, source: Checkpoint) -> None:
        """Continue the run that wrote the file of --resume.

        Settings of the optimiser that differ from the old run's take effect. Weight drop may be on
        in one of the two runs and off in the other. Raises CheckpointError for another text, and
        for a state that the network or the optimiser does not accept.
        """
        args, state = self.args, source.training
        if state["data"] != self.fingerprint:
            raise CheckpointError(
                f"{args.resume} goes on with another text than that in {args.data}: bring back the "
                "corpus it was trained on, or start a new run on this one with main.py --init, or "
                "with finetune.py without --resume"
            )
        with resume.restoring(args.resume):
            checkpoint.load_state(self.network.model, state["model"])
            checkpoint.load_state(self.network.criterion, state["criterion"])
            checkpoint.load_further(self.network, state["loss"])
            now = resume.parameter_names(self.network, self.step.params)
            resume.load_optimizer(self.optimizer, state, names=now, settings=self._settings)
            self.rng.set_state(state["rng"])
            if not any(state["rng"][1][1:]):
                raise ValueError("its generator has no bits")  # drawing from it would not end
            resume.load_parts(self.stateful, state["stateful"])
            scheduled = any(isinstance(part, LRScheduler) for part in self.stateful.values())
            if scheduled and args.lr != state["args"]["lr"]:
                raise CheckpointError(
                    f"--lr {args.lr:g} has no effect: a schedule continues from the rate "
                    f"{state['args']['lr']:g} of {args.resume}: leave the flag out"
                )
            # With another number of processes no saved states fit: the ranks keep fresh seeds.
            if len(state["random_states"]) == self.ranks.world:
                resume.set_random_states(state["random_states"][self.ranks.rank])
            self.finished = self.epoch = state["epoch"]
            self.trigger.losses = list(state["valid_losses"])
            self.best_loss, self.done = state["best_loss"], state["done"]
        self._position = state["position"]
        self.epoch += self._position is not None
        self.last_good = args.resume
        batch = 0 if self._position is None else self._position["batches"]
        best = f"best {source.valid_loss:.2f} after epoch {source.epoch}"
        print(
            f"Resuming {args.resume}: epoch {self.finished + 1}, batch {batch} of about "
            f"{self._batches()}, {best if source.epoch else 'no epoch has ended yet'}"
        )
        if source.epoch and self.best is None:
            source = dataclasses.replace(source, args=self.flags, vocabulary=self.vocabulary)
            self.best = checkpoint.in_memory(source)

    @property
    def rate(self) -> float:
        """The learning rate of the first group of weights."""
        return self.optimizer.param_groups[0]["lr"]

    # An epoch

    def epochs(self, last: int) -> Iterator[int]:
        """The numbers of the remaining epochs, up to `last`.

        Raises CheckpointError if the run's state could not be saved and read again.
        """
        # What cannot be saved is refused before the first batch, not at the first save.
        state = {"config": self.config, "hidden": self.step.hidden, **self._progress()}
        checkpoint.check_content(state)
        if self.finished >= last and not self.done:
            print(f"Epoch {last} was the last: a larger --epochs continues the run")
        if self.args.resume and self.finished >= last and not self._continues_its_file:
            self.save()
        yield from range(self.finished + 1, last + 1)

    def begin_epoch(
        self,
        epoch: int,
        reorder: Callable[[Tensor, np.random.RandomState], object] | None = None,
    ) -> None:
        """Bring the step to the start of the epoch, or to where the resumed run stopped within it.

        Before, `reorder(text, rng)` may change the text (rows, batch), always given in the corpus's
        order, in place. `rng` depends only on the seed and the epoch, so that a run resumed within
        the epoch has the same text. Raises CheckpointError if the text differs from the recorded.
        """
        step, args = self.step, self.args
        if reorder is not None:
            if self._text is None:
                # Not from the corpus, whose cache may change while the run goes on.
                self._text = torch.cat(self.ranks.gathered(step.source.cpu()), dim=1)
            text = self._text.clone()
            reorder(text, np.random.RandomState([args.seed, epoch]))
            step.source.copy_(self.ranks.own(text))
        position, self._position = self._position, None
        step.begin(None if position is None else self._own_position(position))
        if position is not None and not torch.equal(
            self.ranks.own(position["text"]), self._next_text()
        ):
            raise CheckpointError(
                "the text does not go on as it did where the run stopped: resume it with the flags "
                "that it had"
            )
        # The time before the stop is not saved: equal runs have equal files.
        self.epoch, self._began, self._resumed_at = epoch, time.time(), step.batches
        self._reported = time.perf_counter(), step.batches, step.row
        self._taken = None if self._taken is None else 0
        what = f"epoch {epoch} of {args.epochs}"
        if math.isfinite(self.best_loss):
            what += f", best {perplexity(self.best_loss):.1f}"
        self._bar = Bar(self._tokens(step.source), what, wanted=self.ranks.first)

    def _tokens(self, source: Tensor) -> int:
        """The tokens of `source` that an epoch or an evaluation predicts."""
        return predicted(source, self.args.bptt, self.args.max_batches) * source.size(1)

    def after_batch(self) -> None:
        """Report, obey a signal, and save, where each is due."""
        if self.step.batches % self.args.log_interval == 0:
            self._report_batch()
        if self._taken is not None:
            self._time_batch()
        self._bar.to(self.step.row * self.step.source.size(1))
        self.stop.check()
        if self.ranks.decided(self.clock.due()):
            self.save()

    def _time_batch(self) -> None:
        """Time the first batches, then print once how long the run takes at their pace."""
        self._taken += 1
        if self._taken not in (WARM_UP, TIMED):
            return
        step, row = self.step, self.step.row
        loss = self.ranks.total(float(step.total)) / row  # waits for a GPU
        if self._taken == WARM_UP:
            self._timed_from = time.perf_counter(), row
            return
        start, first_row = self._timed_from
        columns = step.source.size(1)
        epoch, left = times(
            (time.perf_counter() - start) / (row - first_row) / columns,
            train=self._tokens(step.source),
            valid=self._tokens(self.valid_data),
            done=row * columns,
            epochs=self.args.epochs - self.epoch + 1,
        )
        line = f"| about {in_words(epoch)} an epoch, {in_words(left)} until epoch "
        line += f"{self.args.epochs} | loss of the first batches {loss:.2f}"
        if left > _LONG and self.device.type == "cpu" and self.stage == "main.py":
            line += " | a smaller model: --preset small"
        self._bar.line(line)
        self._taken = None

    def _batches(self) -> int:
        """About how many batches an epoch has."""
        most = max(1, (len(self.step.source) - 1) // self.step.bptt)
        return most if self.args.max_batches is None else self.args.max_batches

    def _report_batch(self) -> None:
        """Print and write the numbers since the last report."""
        step, args = self.step, self.args
        # Divided by the batches counted: a resumed run may have had another interval.
        loss = self.ranks.total(step.interval.item()) / step.since
        self._check_finite(loss)
        now = time.perf_counter(), step.batches, step.row
        seconds, taken, rows = (b - a for a, b in zip(self._reported, now, strict=True))
        self._reported = now
        ms = seconds * 1000 / taken
        self._bar.line(batch_line(self.epoch, step.batches, self._batches(), self.rate, ms, loss))
        self._bar.update(0, ppl=f"{perplexity(loss):.1f}")
        self.write(
            "batch",
            row=step.row,
            batch=step.batches,
            lr=self.rate,
            loss=loss,
            tokens_per_second=rows * args.batch_size / seconds,
            grad_norm=float(step.norm),
        )
        step.interval.zero_()
        step.since = 0

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
        """Within this context the network has the averaged weights, if the optimiser averages."""
        return getattr(self.optimizer, "averaged", contextlib.nullcontext)()

    def evaluate(self, what: str, network: TrainingLoss) -> float:
        """The loss of `network` on valid.txt or test.txt, in nats a token."""
        source = self.valid_data if what == "valid.txt" else self.test_data
        with Bar(self._tokens(source), what, wanted=self.ranks.first) as bar:

            def after_chunk(tokens: int) -> None:
                bar.update(tokens)
                self.stop.check()

            loss = training.evaluate(
                network, source, self.args.bptt, self.args.max_batches, after_chunk
            )
        return self.ranks.mean(loss, weight=source.size(1))

    def validate(self) -> float:
        """Print and return an epoch's validation loss; raises ToolkitError if it is not finite."""
        self._bar.close()
        self.check_loss()
        loss = self.evaluate("valid.txt", self.network)
        if not math.isfinite(loss):
            raise self.diverged(f"the validation loss became {loss} in epoch {self.epoch}")
        seconds, since = time.time() - self._began, self._resumed_at
        print(RULE)
        print(epoch_line(self.epoch, seconds, loss) + partial(self.args, self.valid_data))
        print(RULE)
        if since:
            print(f"| epoch {self.epoch} was resumed at batch {since}: its time is that since then")
        resumed = {"resumed_at": since} if since else {}
        self.write("epoch", time=seconds, **resumed, valid_loss=loss)
        return loss

    def keep_if_best(self, loss: float, last: bool, what: str = "model") -> None:
        """Keep the current weights if `loss` is the lowest so far, to save them at the epoch's end.

        A save takes time, so not every short epoch is saved; the `last` one is.
        """
        self._saving = last or self.ranks.decided(self.clock.due_at_epoch_end())
        if loss < self.best_loss:
            self.best, self.best_loss = self.snapshot(self.epoch, loss), loss
            held = f"Holding {what} in memory until the next save"
            print(f"{f'Saving {what}' if self._saving else held} (new best validation)")

    def end_epoch(self) -> None:
        """Count the epoch, and save if a save is due."""
        self.finished = self.epoch
        if self._saving:
            self.save()

    # The files

    def write(self, kind: str, row: int | None = None, **numbers: Any) -> None:
        """Write a line of metrics, `row` rows of the text into the epoch, by default at its end."""
        rows = self.step.source.size(0)
        done = (self.epoch - 1) * rows + (rows if row is None else row)
        self.metrics.write(kind, step=done, epoch=self.epoch, **numbers)

    def snapshot(self, epoch: int, loss: float) -> Checkpoint:
        """A copy of the current weights, as a model file; `loss` is the validation loss."""
        return Checkpoint(
            config=self.config,
            model=checkpoint.snapshot(self.network.model),
            criterion=checkpoint.snapshot(self.network.criterion),
            loss=checkpoint.further(self.network),
            vocabulary=self.vocabulary,
            args=self.flags,
            stage=self.stage,
            epoch=epoch,
            valid_loss=loss,
        )

    def save(self) -> None:
        """Write best weights and training state in one file, so that the two always match."""
        with self.clock.writing():
            state = self._training_state()
            if self.ranks.first:
                best = self.snapshot(0, math.inf) if self.best is None else self.best
                path, keep = self.args.save, not self._continues_its_file
                if keep and os.path.isfile(path):
                    print(f"Keeping the old model file {path} as {previous(path)}")
                checkpoint.save(path, dataclasses.replace(best, training=state), keep)
                if keep:
                    print(f"Wrote {path}, the model and the state for --resume")
            self.last_good = self.args.save

    @property
    def _continues_its_file(self) -> bool:
        """Whether the run has written the file --save or started from it."""
        return os.path.realpath(self.args.save) == os.path.realpath(self.last_good)

    def save_copy(self, path: str, loss: float) -> None:
        """Write the current weights to a separate file; the run goes on if that fails."""
        if self.ranks.first:
            try:
                checkpoint.save(path, self.snapshot(self.epoch, loss))
                print(f"Wrote {path}")
            except ToolkitError as error:
                print(f"Going on without a copy: {error}")

    def _training_state(self) -> dict[str, Any]:
        """Everything that `resume` needs: copies of the weights, and `_progress`."""
        return {
            "model": checkpoint.snapshot(self.network.model),
            "criterion": checkpoint.snapshot(self.network.criterion),
            "loss": checkpoint.further(self.network),
            **self._progress(),
        }

    def _progress(self) -> dict[str, Any]:
        """What `resume` needs beside the weights: plain values and tensors.

        The optimiser's tensors are not copied: write them before the next step. Every rank must
        call this at once. Raises ToolkitError if a weight or the loss is not finite, so that such a
        state never replaces a good one.
        """
        position = self._position
        if position is None and self.epoch > self.finished:
            position = self._all_position()
            self.check_loss()
        optimizer = self.optimizer.state_dict()
        for tensor in (*self.step.params, *tensors_of(optimizer["state"])):
            if not tensor.isfinite().all():
                raise self.diverged(f"weights are no longer finite after epoch {self.finished}")
        return {
            "stage": self.stage,
            "args": self.flags,
            "data": self.fingerprint,
            "epoch": self.finished,
            "position": position,
            "optimizer": optimizer,
            "parameters": resume.parameter_names(self.network, self.step.params),
            "settings": self._settings,
            "valid_losses": list(self.trigger.losses),
            "best_loss": self.best_loss,
            "done": self.done,
            "rng": resume.rng_state(self.rng),
            "random_states": self.ranks.gathered(resume.random_states()),
            "stateful": {name: part.state_dict() for name, part in self.stateful.items()},
        }

    def _all_position(self) -> dict[str, Any]:
        """The position in the epoch with all ranks' columns."""
        step = self.step
        mine = {"hidden": map_state(_on_cpu, step.hidden), "text": self._next_text()}
        parts = self.ranks.gathered(mine)
        total, interval = (self.ranks.total(float(t)) for t in (step.total, step.interval))
        return {
            "row": step.row,
            "batches": step.batches,
            "since": step.since,
            "total": total,
            "interval": interval,
            **map_state(lambda *columns: torch.cat(columns, dim=1), *parts),
        }

    def _own_position(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's columns of a saved position, and its part of the sums."""

        def own(part: Tensor) -> Tensor:
            return self.ranks.own(part).clone().to(self.device)

        sums = {} if self.ranks.first else {"total": 0.0, "interval": 0.0}
        return {**position, "hidden": map_state(own, position["hidden"]), **sums}

    def _next_text(self) -> Tensor:
        """The rows of text that come next, by which a resumed run recognises its place."""
        return self.step.source[self.step.row : self.step.row + _ROWS_TO_COMPARE].cpu()

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
            self._bar.close()
            self.save()
            if stopped.signum != signal.SIGINT or self.best is None:
                sentence = f"{stopped}; --resume {self.args.save} continues from here"
                raise Stopped(stopped.signum, sentence) from None
            print(RULE)
            print(f"Exiting from {what} early")
            print(f"--resume {self.args.save} continues it")

    def test(self) -> None:
        """Score the best model on the test set."""
        network = checkpoint.scoring_network(self.best, self.device)
        fast.choose(network, plain=self.args.plain)
        loss = self.evaluate("test.txt", network)
        print(DOUBLE_RULE)
        print(end_line(loss) + partial(self.args, self.test_data))
        self.metrics.write("test", step=self.finished * self.step.source.size(0), test_loss=loss)
        print(DOUBLE_RULE)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
