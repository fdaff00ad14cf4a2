"""The rehearsal of a run (main.py --rehearse): a few batches of every stage, and what must hold.

Each script runs in a process of its own on files in a temporary folder.
"""

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

import checkpoint
from checkpoint import Checkpoint
from checkpoint.network import plain_name
from cli import flags
from cli.parser import Flag, Parser
from loss import TrainingLoss, is_frozen
from nt_asgd import NonMonotonicTrigger
from run.corpus import read_corpus
from run.network import network_of
from run.session import EVAL_BATCH_SIZE, Session
from run.signals import Stopped
from training import evaluate
from utils import ToolkitError, seed_everything

SMALL = ["--max-batches", "4"]  # an epoch's batches, and an evaluation's chunks
SEGMENTS = "20"  # of dynamic evaluation
TOLERANCE = 1e-4  # relative, of one loss computed in two ways
FAULT = 5e-3  # relative, of outputs and probabilities; TensorFloat-32 stays below
# A forked process starts at once; macOS cannot fork a process that has loaded PyTorch.
_PROCESSES = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "fork")


class Failed(Exception):
    """A check has failed; the text says how."""


def rehearse(parser: Parser, argv: Sequence[str]) -> None:
    """Rehearse the run of `main.py argv`, and print one line for each check.

    Raises ToolkitError if a check fails.
    """
    if "RANK" in os.environ:
        raise ToolkitError("--rehearse takes one process: leave torchrun out")
    # An abbreviation too; a shorter one could be another flag's.
    argv = [word for word in argv if len(word) < 5 or not "--rehearse".startswith(word)]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        rehearsal = Rehearsal(parser, argv, folder)
        for name, check in CHECKS.items():
            try:
                print(f"| ok     | {name}: {check(rehearsal)}")
            except Failed as failed:
                failures += 1
                print(f"| failed | {name}: {failed}")
                if name == "training":
                    break  # the other checks need its file
    if failures:
        raise ToolkitError(f"{failures} of the checks failed: mend what they name, then train")


class Rehearsal:
    """The checks of the run `main.py argv`, with files in `folder`.

    Each returns a sentence or raises Failed. `training` comes first: it sets `file`, the content of
    the model file, and `args`, the flags in it.
    """

    file: Checkpoint
    args: dict[str, Any]

    def __init__(self, parser: Parser, argv: Sequence[str], folder: str) -> None:
        self.parser, self.argv, self.folder = parser, argv, folder
        # OpenMP's threads do not survive a fork, so this process starts none.
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def training(self) -> str:
        """Every trainable weight is the optimiser's, and changes if it gets a gradient."""
        rest = self.train("main", "whole.pt", *self.argv, "--epochs", "2")
        without = f", except for those without gradient: {', '.join(rest)}" if rest else ""
        return f"every weight changes{without}"

    def model_file(self) -> str:
        """A new process computes the recorded validation loss from it, in every way."""
        found, _ = self.run("the evaluation", _evaluate, self.path("whole.pt"))
        modules, losses, faults = found
        if modules:
            raise Failed(f"not in evaluation mode: {', '.join(modules)}")
        if losses[0] != losses[1]:
            raise Failed("two evaluations of it differ: {:.6f} and {:.6f} nats".format(*losses))
        _compare(losses[0], self.file.valid_loss, "the validation loss from it", "the recorded one")
        for fault, size in faults.items():
            if size > FAULT:
                raise Failed(f"{fault}, by {size:.1e}")
        return (
            f"a new process computes the recorded validation loss of {losses[0]:.4f} nats from it"
        )

    def stopping(self) -> str:
        """A run that is stopped within two epochs and resumed equals the first, bit for bit."""
        argv = [*self.argv, "--epochs", "2"]
        for stop in ((1, 2), (2, 2), ()):
            self.train("main", "cut.pt", *argv, stop=stop)
            argv = ["--resume", self.path("cut.pt"), *self.device_flags()]
        names = differing_files(self.file, checkpoint.load(self.path("cut.pt")))
        if names:
            raise Failed(f"{len(names)} values of the resumed run differ, such as {names[0]}")
        averaging = any("average" in s for s in self.file.training["optimizer"]["state"].values())
        switch = " and after the switch to averaging" if averaging else ""
        return f"stopped within an epoch{switch} and resumed, the run is the same bit for bit"

    def forms(self) -> str:
        """The faster forms, on a GPU recorded as graphs, give the definitions' loss."""
        if self.args["plain"]:
            return "none are used (--plain)"
        off = dict.fromkeys(flags.dropouts(argparse.Namespace(**self.args)), 0.0)
        argv = [*self.argv, *self.parser.spelled(off).split(), "--precision", "fp32"]
        # Only a length that comes again is recorded.
        argv += ["--epochs", "1", *([] if self.args["max_seq_len"] else ["--fixed-length"])]
        losses = []
        for words in ([], ["--plain"]):
            self.train("main", "forms.pt", *argv, *words)
            losses.append(checkpoint.load(self.path("forms.pt")).valid_loss)
        _compare(*losses, "without dropout their validation loss", "the definitions'")
        return f"without dropout they give the definitions' validation loss of {losses[0]:.4f} nats"

    def finetuning(self) -> str:
        """finetune.py runs, and has every flag that belongs to training."""
        checkpoint.save(self.path("tuned.pt"), self.file)
        argv = ["--data", self.args["data"], "--epochs", "1", *self.device_flags()]
        self.train("finetune", "tuned.pt", *argv)
        after = checkpoint.load(self.path("tuned.pt")).training["args"]
        shared = self.training_flags()
        other = [flag.name for name, flag in shared if after.get(name) != self.args[name]]
        return "it runs" + (f", with a value of its own for {', '.join(other)}" if other else "")

    def later_stages(self) -> str:
        """The other scripts run; dynamic evaluation at rate 0 is the static score."""
        path, data = self.path("whole.pt"), ["--data", self.args["data"]]
        words = " ".join(self.file.dictionary.idx2word[:20])
        self.later("generate", "--checkpoint", path, "--words", "20", "--outf", "-")
        self.later("score", "--checkpoint", path, "--text", words)
        self.later("pointer", "--save", path, *data, "--window", "100", "--max-batches", "1")
        scored = ["--save", path, *data, "--bptt", "5", "--max-batches", SEGMENTS]
        static = self.later("pointer", *scored, "--lambdasm", "0")
        dynamic = self.later("dynamiceval", *scored, "--sgd", "--lr", "0", "--lamb", "0")
        found = (re.findall(r"End of .* ppl +(\S+)", text) for text in (dynamic, static))
        for first, second in zip(*found, strict=True):
            if abs(float(first) - float(second)) > 0.02 + TOLERANCE * float(second):
                raise Failed(f"at rate 0 dynamiceval.py gives the perplexity {first}, not {second}")
        return "generate.py, score.py, pointer.py and dynamiceval.py run"

    def path(self, name: str) -> str:
        """The path of a file in the folder."""
        return os.path.join(self.folder, name)

    def train(
        self, script: str, name: str, *argv: str, stop: Sequence[int] | None = None
    ) -> list[str]:
        """Run main.py or finetune.py; returns the names of the weights without gradient.

        With `stop`, the run is a part of one, up to that (epoch, batch) unless it is empty.
        """
        argv = (*argv, *SMALL, "--logdir", "", "--save", self.path(name))
        (rest, read, compiler, seen), _ = self.run(f"{script}.py", _train, script, argv, stop or ())
        if compiler:
            importlib.import_module("torch._dynamo")  # 2 s: once, not in each of the others
        if name == "whole.pt":
            self.file = checkpoint.load(self.path(name))
            self.args = self.file.args
        # A flag with its default value may have an effect only with another.
        unread = [(n, flag) for n, flag in self.training_flags() if n not in read]
        idle = [flag.name for n, flag in unread if self.args[n] != flag.default]
        if idle:
            raise Failed(
                f'{script}.py does not use {", ".join(idle)}: use it, or say belongs="run"'
            )
        for fault, names in seen.items():
            if names and stop is None:
                raise Failed(f"{fault}: {', '.join(names)}")
        return rest

    def training_flags(self) -> list[tuple[str, Flag]]:
        """The flags that finetune.py shares, except those in a model file's configuration."""
        every = self.parser.flags.items()
        return [(n, flag) for n, flag in every if flag.belongs == "training" and not flag.config]

    def later(self, script: str, *words: str) -> str:
        """Run another script on the first run's device; its output."""
        return self.run(f"{script}.py", _script, script, [*words, *self.device_flags()])[1]

    def device_flags(self) -> list[str]:
        """--cuda, --no-cuda and --plain as the first run had them."""
        device = {None: [], True: ["--cuda"], False: ["--no-cuda"]}[self.args["cuda"]]
        return [*device, *(["--plain"] if self.args["plain"] else [])]

    def run(self, what: str, work: Callable[..., Any], *args: Any) -> tuple[Any, str]:
        """The result of `work` in a new process, and its output; raises Failed if it fails."""
        with ProcessPoolExecutor(1, _PROCESSES, torch.set_num_threads, (self.threads,)) as pool:
            try:
                return pool.submit(_quiet, work, *args).result()
            except (Exception, SystemExit) as error:
                if not isinstance(error, ToolkitError | Failed):
                    traceback.print_exception(error)
                raise Failed(f"{what} ended with {type(error).__name__}: {error}") from None


CHECKS: dict[str, Callable[[Rehearsal], str]] = {
    "training": Rehearsal.training,
    "model file": Rehearsal.model_file,
    "resuming": Rehearsal.stopping,
    "faster forms": Rehearsal.forms,
    "finetune.py": Rehearsal.finetuning,
    "later stages": Rehearsal.later_stages,
}


def _compare(first: float, second: float, what: str, other: str) -> None:
    if abs(first - second) > TOLERANCE * abs(second):
        raise Failed(f"{what} is {first:.6f}, {other} {second:.6f}")


def differing_files(first: Checkpoint, second: Checkpoint) -> list[str]:
    """The places where the contents of two model files differ, apart from their flags."""
    contents = []
    for file in (first, second):
        training = file.training and {**file.training, "args": {}}
        contents.append({**vars(file), "args": {}, "training": training})
    return list(differing(*contents))


def differing(first: Any, second: Any, place: str = "") -> Iterator[str]:
    """The places where two trees of dictionaries, lists, tuples, tensors and values differ."""
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        first, second = dict(enumerate(first)), dict(enumerate(second))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for name in {**first, **second}:
            parts = (half.get(name, "absent") for half in (first, second))
            yield from differing(*parts, f"{place}.{name}" if place else str(name))
    elif isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.dtype != second.dtype or not torch.equal(first, second):
            yield place
    elif type(first) is not type(second) or first != second:
        yield place


# What runs in the new processes


def _quiet(work: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """The result of `work` and its output, which goes to standard error if the work fails."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return work(*args), output.getvalue()
    except BaseException:
        sys.stderr.write(output.getvalue())
        raise


def _script(name: str, argv: Sequence[str]) -> None:
    importlib.import_module(name).main(argv)


def _train(
    script: str, argv: Sequence[str], stop: Sequence[int]
) -> tuple[list[str], set[str], bool, dict[str, list[str]]]:
    """Run a script, with averaging from epoch 2 on, up to `stop` (epoch, batch) if given.

    Returns the weights without gradient, the flags read, whether PyTorch's compiler was imported,
    as some optimisers do, and the weights and modules by fault.
    """
    weights: dict[str, tuple[Tensor, Tensor]] = {}  # each with a copy from the start
    frozen: dict[str, nn.Module] = {}
    strangers: dict[int, str] = {}
    with_gradient, woken = set(), set()
    prepare, after_batch, forward = Session.prepare, Session.after_batch, TrainingLoss.forward

    def watched_prepare(session: Session, *args: Any) -> None:
        prepare(session, *args)
        for name, p in session.network.named_parameters():
            if p.requires_grad:
                weights[plain_name(name)] = p, p.detach().clone()
        for name, part in session.network.named_modules():
            if is_frozen(part):
                frozen[name] = part

    def watched_forward(network: TrainingLoss, *args: Any) -> Any:
        results = forward(network, *args)
        known = {id(p) for p in network.parameters()}
        for leaf in _leaves(results[0]):
            if id(leaf) not in known:
                strangers[id(leaf)] = f"a tensor of the size {tuple(leaf.shape)}"
        return results

    def watched_batch(session: Session) -> None:
        with_gradient.update(name for name, (p, _) in weights.items() if p.grad is not None)
        woken.update(name for name, part in frozen.items() if part.training)
        if [session.epoch, session.step.batches] == list(stop):
            signal.raise_signal(signal.SIGTERM)
        after_batch(session)

    def switch(trigger: NonMonotonicTrigger, loss: float) -> bool:
        trigger.losses.append(loss)
        return True

    Session.prepare, Session.after_batch = watched_prepare, watched_batch
    TrainingLoss.forward = watched_forward
    NonMonotonicTrigger.update = switch
    read = _watch_flags()
    exact = ["--deterministic"] if torch.cuda.is_available() and "--resume" not in argv else []
    try:
        _script(script, [*argv, *exact])
    except Stopped:
        stop = ()
    if stop:
        raise Failed("the run did not obey a signal: call session.after_batch() after each batch")
    faults = {
        "unchanged by the optimiser": [
            n for n in sorted(with_gradient) if torch.equal(*weights[n])
        ],
        "frozen, but not in evaluation mode": sorted(woken),
        "with a gradient, but no part of the network": list(strangers.values()),
    }
    rest, compiler = sorted(weights.keys() - with_gradient), "torch._dynamo" in sys.modules
    return rest, read, compiler, faults


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that get a gradient from `loss`."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                yield node.variable


def _watch_flags() -> set[str]:
    """The names of the flags that the script in this process will have read."""
    read, settle = set(), Parser.settle

    class Watched(argparse.Namespace):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    Parser.settle = lambda *args: Watched(**vars(settle(*args)))
    return read


@torch.inference_mode()
def _evaluate(path: str) -> tuple[list[str], list[float], dict[str, float]]:
    """Modules in training mode, the losses of two evaluations, and the size of each fault."""
    loaded = checkpoint.load(path)
    args = argparse.Namespace(**loaded.args)
    network = network_of(loaded, args)
    columns = read_corpus(args, loaded.dictionary).columns("valid", EVAL_BATCH_SIZE)
    source = columns[: args.max_batches * args.bptt + 1].to(network.device)
    losses = []
    for seed in (1, 2):
        seed_everything(seed)
        losses.append(evaluate(network, source, args.bptt))
    modules = [name or "the network" for name, part in network.named_modules() if part.training]

    def outputs(text: Tensor, length: int) -> Tensor:
        hidden, parts = network.init_hidden(text.size(1)), []
        for chunk in text.split(length):
            output, hidden = network.model(chunk, hidden)
            parts.append(output.view(*chunk.shape, -1))
        return torch.cat(parts)

    text = source[:21, :3].long()
    together = outputs(text[:-1], 20)
    apart = torch.cat([outputs(column, 3) for column in text[:-1].split(1, dim=1)], dim=1)
    criterion, decoder = network.criterion, network.model.decoder
    rows = (decoder.weight, decoder.bias, together.flatten(0, 1))
    logprob, words = criterion.logprob(*rows), text[1:].flatten()
    loss = -logprob.gather(1, words.unsqueeze(1)).mean()
    means = torch.stack([criterion(*rows, words), -criterion.target_logprob(*rows, words).mean()])
    total = logprob.exp().sum(dim=1)
    # What is computed, by the fault that it shows, beside what it should be.
    pairs = {
        "outputs depend on the chunks or the other columns of a batch: the state is not handed on, "
        "or a word sees later ones or other columns": (apart, together),
        "probabilities of the criterion's logprob do not add up to 1": (
            total,
            torch.ones_like(total),
        ),
        "the criterion's loss or target_logprob is not that of its logprob": (
            means,
            loss.expand(2),
        ),
    }
    return (
        modules,
        losses,
        {fault: float((a - b).norm() / b.norm()) for fault, (a, b) in pairs.items()},
    )
