"""Score a trained model that keeps learning from the text it scores (dynamic evaluation).

Each segment is scored before the model learns from it. The weights are reset to the model file's
before each text, and the file is never changed. Statistics of the gradients over train.txt are
collected once and kept beside the model, as SAVE.rms.
"""

import run.interpreter

import argparse
import hashlib
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import checkpoint
import fast
from checkpoint import Checkpoint, resume
from cli import flags
from cli.parser import Parser, Recorded
from cli.types import positive_int
from continuous_cache import ContinuousCache
from data import Corpus
from dynamic_evaluation import DynamicEvaluation, GradientStatistics
from loss import TrainingLoss
from model import Hidden
from qrnn.check import source_digest
from run import program
from run.corpus import read_corpus
from run.log_lines import DOUBLE_RULE, alone_line, partial, scored_line
from run.network import choose_forms, network_of
from run.progress import Bar
from scoring.stream import Piece, with_cache
from training import TrainingStep, evaluate
from utils import ToolkitError, batchify, check_length, perplexity, predicted

# The published grid, which --grid tries, multiplied by --bptt / 5.
RATES = (3e-5, 4e-5, 5e-5, 6e-5, 7e-5, 1e-4)
LAMBDAS = (1e-3, 2e-3, 3e-3, 5e-3)
FAST_TOKENS = 30_000
# Without learning, this many tokens are computed at a time.
STATIC_TOKENS = 500


def build_parser() -> Parser:
    """The command line of dynamiceval.py."""
    parser = Parser("dynamiceval", __doc__)
    flags.add_data(parser, "data/penn")
    flags.add_model(parser)
    flags.add_save(parser, "model file to score")
    add = parser.group("dynamic evaluation")
    add("--lr", 5e-5, "rate; published: 5e-5, QRNNs 1.2e-4")
    add("--lamb", 0.002, "pull to the weights; published: 0.002, QRNNs 0.02 and 0.008")
    add("--bptt", 5, "tokens per segment; published: 5, QRNNs 20", type=positive_int)
    add("--sgd", False, "use plain gradient descent, without statistics")
    of_statistics = parser.group("dynamic evaluation", beside=["--sgd"])
    of_statistics("--epsilon", 2e-5, "added to the root mean square of a gradient")
    of_statistics("--batch_size", 100, "columns of their batches", type=positive_int)
    of_statistics(
        "--oldhyper",
        False,
        "divide --lamb by the number of weight tensors, and --lr and --epsilon by the root of "
        "the number of segments",
    )
    add("--grid", False, f"try {len(RATES) * len(LAMBDAS)} settings, and that given, on valid.txt")
    add("--gridfast", False, f"as --grid, on the first {FAST_TOKENS:,} tokens of valid.txt")
    parser.flag("cache", "--cache", False, "add the continuous cache")
    flags.add_cache(parser, needs="--cache")
    flags.add_device(parser)
    flags.add_max_batches(parser, "segments of each text")
    return parser


class ScoredLoss(TrainingLoss):
    """The cross-entropy; `piece` keeps the last segment's results for the continuous cache."""

    piece: Piece | None = None

    def forward(
        self, data: Tensor, targets: Tensor, hidden: Hidden
    ) -> tuple[Tensor, Tensor, Hidden]:
        """As TrainingLoss without penalties."""
        output, hidden, raw, _ = self.model(data, hidden, return_h=True)
        decoder = self.model.decoder.weight, self.model.decoder.bias
        loss = self.criterion(*decoder, output, targets)
        with torch.no_grad():
            logprob = self.criterion.target_logprob(*decoder, output.detach(), targets)
        self.piece = Piece(raw[-1].detach().squeeze(1), targets, logprob)
        return loss, loss.detach(), hidden


def run(
    network: TrainingLoss,
    optimizer: torch.optim.Optimizer,
    source: Tensor,
    args: argparse.Namespace,
    what: str,
) -> tuple[float, int]:
    """Score `source` (rows, batch) once, with a step after each segment of --bptt rows.

    Returns the mean loss, nats a token, of the segments, each scored before its step (with --cache,
    by the mixture), and the number of steps.
    """
    network.eval()
    if network.device.type == "cuda":
        # cuDNN has a backward pass in training mode only; a cell of PyTorch has no dropout here.
        for module in network.modules():
            module.train(isinstance(module, nn.RNNBase))
    step = TrainingStep(network, optimizer, source, bptt=args.bptt, clip=0.0)
    choose_forms(network, optimizer, step, plain=args.plain)
    if network.device.type == "cuda" and not args.plain:
        fast.record_steps(step)
    cached = isinstance(network, ScoredLoss)
    cache = ContinuousCache(args.window, args.theta, args.cache_from_start) if cached else None
    last, total = len(source) - 1, 0.0
    with Bar(predicted(source, args.bptt, args.max_batches) * source.size(1), what) as bar:
        while step.row < last and step.batches != args.max_batches:
            rows = min(args.bptt, last - step.row)
            # A shorter last segment gets the rate of a full one.
            step.take(rows, args.bptt)
            if cache is not None:
                total -= with_cache(network.piece, cache, args.lambdasm)[0].double().sum()
            if bar.shown and step.batches % 50 == 0:
                loss = float(step.total if cache is None else total) / step.row
                bar.update(0, loss=f"{loss:.2f}", ppl=f"{perplexity(loss):.2f}")
            bar.to(step.row * source.size(1))
    return float(step.total if cache is None else total) / step.row, step.batches


def statistics(
    network: TrainingLoss, args: argparse.Namespace, loaded: Checkpoint, corpus: Corpus
) -> tuple[list[Tensor], int]:
    """Root mean squares of the gradients over train.txt, and the number of segments.

    They are read from SAVE.rms if that file fits the weights, the settings and the text, if there
    is one; otherwise they are collected and written to it. Raises ToolkitError if train.txt is too
    short, or needed and missing.
    """
    path = f"{args.save}.rms"
    text = resume.fingerprint(corpus, "train") if len(corpus.part("train", 0, 1)) else None
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (*loaded.model.values(), *loaded.criterion.values()):
        digest.update(tensor.numpy().tobytes())
    code = source_digest(GradientStatistics)
    digest.update(f"{args.batch_size} {args.bptt} {args.max_batches} {code}".encode())
    params = [p for p in network.parameters() if p.requires_grad]
    optimizer = GradientStatistics(params)
    kept = read_statistics(path, digest.hexdigest(), text, params)
    if kept is None and text is None:
        raise ToolkitError(
            f"{args.data} has no train.txt to collect the gradients' statistics from, and {path} "
            "has none for these weights and settings: bring train.txt, or pass --sgd"
        )
    if kept is not None:
        if text is None:
            print(f"{args.data} has no train.txt: {path} is used, and its text is not compared")
        return kept
    source = corpus.columns("train", args.batch_size).to(params[0].device)
    cure = "lower --batch_size or bring a longer text"
    check_length(source, "train.txt", cure, args.batch_size)
    _, segments = run(network, optimizer, source, args, "gradients")
    rms = optimizer.rms(segments)
    held = {"key": digest.hexdigest(), "text": text, "segments": segments}
    held["rms"] = [part.cpu() for part in rms]
    try:
        checkpoint.write(path, held, own=True)
        print(f"Wrote {path}")
    except ToolkitError as error:
        print(f"The next run collects the statistics again: {error}")
    return rms, segments


def read_statistics(
    path: str, key: str, text: str | None, params: Sequence[Tensor]
) -> tuple[list[Tensor], int] | None:
    """The root mean squares and the number of segments in an intact file with this key, or None.

    `text` is the fingerprint of train.txt; it is not compared if it is None.
    """
    try:
        held = checkpoint.read(path)
        rms = [part.to(p, copy=True) for part, p in zip(held["rms"], params, strict=True)]
        fit = [part.shape == p.shape for part, p in zip(rms, params, strict=True)]
        fit += [part.isfinite().all() for part in rms]
        good = all(fit) and held["key"] == key and held["segments"] > 0
        good = good and text in (None, held["text"])
        return (rms, int(held["segments"])) if good else None
    except Exception:
        # torch raises many kinds of error; after any, the statistics are collected again.
        return None


def tune(
    network: TrainingLoss, optimizer: DynamicEvaluation, source: Tensor, args: argparse.Namespace
) -> None:
    """Give the optimiser the best of the grid's settings and its own on `source` (rows, 1)."""
    group, scale, losses = optimizer.param_groups[0], args.bptt / 5, {}
    rates, lambdas = [lr * scale for lr in RATES], [lamb * scale for lamb in LAMBDAS]
    for lr, lamb in [(group["lr"], group["lamb"]), *itertools.product(rates, lambdas)]:
        group.update(lr=lr, lamb=lamb)
        optimizer.restore()
        loss, _ = run(network, optimizer, source, args, "valid.txt")
        losses[lr, lamb] = math.inf if math.isnan(loss) else loss
        ppl = f"{perplexity(loss):8.2f}{partial(args, source)}"
        print(f"| lr {lr:.3g} | lamb {lamb:.3g} | val ppl {ppl}")
    lr, lamb = min(losses, key=losses.get)
    # --oldhyper would scale them once more.
    old = f" --epsilon {group['epsilon']:.4g}, without --oldhyper" if args.oldhyper else ""
    print(f"| best: --lr {lr:.4g} --lamb {lamb:.4g}{old}")
    if not (rates[0] < lr < rates[-1] and lambdas[0] < lamb < lambdas[-1]):
        print("| it is at the grid's edge or beyond: another --lr or --lamb may be better")
    group.update(lr=lr, lamb=lamb)


@program.out_of_memory("--batch_size")
def main(argv: Sequence[str] | None = None) -> None:
    """Score validation and test; raises ToolkitError for problems the user can fix."""
    parser = build_parser()
    given = parser.given(argv)
    path = given.get("save", parser.flags["save"].default)
    loaded = checkpoint.load(path)
    args = parser.settle(given, Recorded(path, "start", loaded.config, loaded.args))
    corpus = read_corpus(args, loaded.dictionary, train=False)
    network = network_of(loaded, args)
    for title in ("dynamic evaluation", *(["cache"] if args.cache else [])):
        print(f"{title.capitalize()}: {parser.of_group(title, args)}")
    parts = (corpus.valid, corpus.test)
    valid_data, test_data = (batchify(part, 1).to(network.device) for part in parts)
    check_length(valid_data, "valid.txt", "bring a longer text")
    check_length(test_data, "test.txt", "bring a longer text")
    rms, segments = (None, 1) if args.sgd else statistics(network, args, loaded, corpus)
    if args.cache:
        network = ScoredLoss(network.model, network.criterion)
    params = [p for p in network.parameters() if p.requires_grad]
    lr, lamb, epsilon = args.lr, args.lamb, args.epsilon
    if args.oldhyper:
        lr, lamb, epsilon = lr / segments**0.5, lamb / len(params), epsilon / segments**0.5
    optimizer = DynamicEvaluation(params, rms, lr, lamb, epsilon)
    if args.grid or args.gridfast:
        some = valid_data[:FAST_TOKENS] if args.gridfast else valid_data
        tune(network, optimizer, some, args)
    method = "dynamic evaluation and the cache" if args.cache else "dynamic evaluation"
    for what, part, source in (("valid.txt", "val", valid_data), ("test.txt", "test", test_data)):
        optimizer.restore()
        scored = source[: predicted(source, args.bptt, args.max_batches) + 1]
        alone = evaluate(network, scored, STATIC_TOKENS)
        print(alone_line(what, method, alone) + partial(args, source))
        loss, _ = run(network, optimizer, source, args, what)
        if not math.isfinite(loss):
            raise ToolkitError(f"the {part} loss became {loss}: lower --lr or raise --lamb")
        print(DOUBLE_RULE)
        print(scored_line("dynamic evaluation", part, loss) + partial(args, source))
    print(DOUBLE_RULE)


if __name__ == "__main__":
    program.run(main)
