"""Score a trained model together with the continuous cache; nothing is trained.

With --search the cache's window, theta and lambda are first tuned on valid.txt, and test.txt is
scored with the best.
"""

import run.interpreter  # noqa: F401

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import checkpoint
from cli import flags
from cli.parser import Parser, Recorded
from cli.types import positive_int
from continuous_cache import ContinuousCache
from loss import TrainingLoss
from run import program
from run.corpus import read_corpus
from run.log_lines import DOUBLE_RULE, pointer_line
from run.network import network_of
from run.progress import Bar
from scoring import plotting, search, words
from scoring.search import Setting
from scoring.stream import Piece, joined, pieces, with_cache
from utils import batchify, check_length, perplexity, predicted

DRAWN_WORDS = 20


def build_parser() -> Parser:
    """The command line of pointer.py."""
    parser = Parser("pointer", __doc__)
    flags.add_data(parser, "data/penn")
    flags.add_split(parser)
    flags.add_model(parser)
    flags.add_save(parser, "model file to score")
    flags.add_cache(parser)
    parser.flag(
        "search",
        "--search",
        action="store_true",
        help="tune the window, theta and lambda on valid.txt and score test.txt with the best "
        "values; the values given are tried too",
    )
    parser.flag(
        "words",
        "--by-word",
        type=positive_int,
        help="print the N words of valid.txt that the cache helps most, and the N it hurts most",
    )
    parser.flag(
        "words",
        "--plot",
        metavar="FILE",
        help=f"draw these words, {DRAWN_WORDS} of each without --by-word, as .png, .pdf or .svg",
    )
    flags.add_chunk(parser, 5000)
    flags.add_device(parser)
    flags.add_max_batches(parser, "chunks of --bptt tokens of each file")
    return parser


@torch.inference_mode()
def evaluate(
    network: TrainingLoss,
    source: Tensor,
    cache: ContinuousCache,
    *,
    lambdasm: float,
    bptt: int,
    max_batches: int | None = None,
    what: str = "",
) -> float:
    """Mean cross-entropy, nats a predicted token, of the mixture of network and `cache`.

    `source` is (rows, 1): the cache follows one stream. Where the cache is in use, a word has the
    probability `lambdasm * p_cache + (1 - lambdasm) * p_vocabulary`. If `what`, a name for the
    source, is given, a terminal shows a progress bar, and the loss of the network alone is printed.
    """
    total = torch.zeros(2, dtype=torch.float64, device=source.device)  # with and without cache
    rows = 0
    with Bar(predicted(source, bptt, max_batches), what, wanted=bool(what)) as bar:
        for piece in pieces(network, source, bptt, max_batches):
            both = torch.stack([with_cache(piece, cache, lambdasm)[0], piece.logprob])
            total -= both.double().sum(dim=1)
            rows += len(piece.words)
            if bar.shown:
                loss = total[0].item() / rows
                bar.update(len(piece.words), loss=f"{loss:.2f}", ppl=f"{perplexity(loss):.2f}")
    loss, alone = (total / rows).tolist()
    if what:
        print_alone(what, alone)
    return loss


def print_alone(what: str, loss: float) -> None:
    """Print the loss of the network without the cache."""
    print(f"| {what} without the cache | loss {loss:5.2f} | ppl {perplexity(loss):8.2f}")


def run_once(network: TrainingLoss, source: Tensor, bptt: int, max_batches: int | None) -> Piece:
    """Outputs, words and log p of all of `source` (rows, 1), from one run of the network."""
    parts = []
    with Bar(predicted(source, bptt, max_batches), "valid.txt") as bar:
        for piece in pieces(network, source, bptt, max_batches):
            parts.append(joined([piece]))
            bar.update(len(piece.words))
    return joined(parts)


def study(
    args: argparse.Namespace, stored: Piece, given: Setting, names: Sequence[str]
) -> tuple[Setting, float]:
    """Tune the cache and report its effect on single words, from the results of `run_once`.

    `names` are the words by id. Returns the setting, which --search tunes, and its loss.
    """
    setting, from_start = given, args.cache_from_start
    if args.search:
        given = given._replace(loss=search.loss_at(stored, given, from_start))
        with Bar(2 * len(stored.words), "search") as bar:
            table, setting = search.search(stored, given, from_start, bar.update)
        print_search(table, setting, given, len(stored.words))
    print_alone("valid.txt", -stored.logprob.double().mean().item())
    logprob = search.logprobs_at(stored, setting, from_start)
    if args.by_word or args.plot:
        changes = words.changes(logprob - stored.logprob, stored.words, names)
        if args.by_word:
            words.print_words(changes, args.by_word)
        if args.plot:
            words.draw_words(changes, args.by_word or DRAWN_WORDS, args.plot)
    return setting, -logprob.double().mean().item()


def print_search(table: Sequence[Setting], best: Setting, given: Setting, tokens: int) -> None:
    """Print the table of --search: a row a theta, a column a window, each at its best lambda."""
    windows = sorted({setting.window for setting in table})
    cells = {(setting.window, setting.theta): setting for setting in table}
    print(f"| {tokens} tokens of valid.txt: perplexity at the best lambda, and that lambda")
    print("|  theta | " + " | ".join(f"window {window:7d}" for window in windows))
    for theta in sorted({setting.theta for setting in table}):
        row = [cells[window, theta] for window in windows]
        shown = [f"{perplexity(cell.loss):8.2f} {cell.lambdasm:5.3f}" for cell in row]
        print(f"| {theta:6.3f} | " + " | ".join(shown))
    for name, setting in (("given", given), ("best", best)):
        print(
            f"| {name}: --window {setting.window} --theta {setting.theta!r} --lambdasm "
            f"{setting.lambdasm!r} | val ppl {perplexity(setting.loss):.2f}"
        )
    if best.window == windows[-1] and best.window < tokens:
        print(
            f"| the widest window is best: --search --window {2 * best.window} looks further back"
        )


@program.out_of_memory("--bptt")
def main(argv: Sequence[str] | None = None) -> None:
    """Score validation and test; raises ToolkitError for problems the user can fix."""
    parser = build_parser()
    given = parser.given(argv)
    path = given.get("save", parser.flags["save"].default)
    loaded = checkpoint.load(path)
    args = parser.settle(given, Recorded(path, "start", loaded.config, loaded.args))
    if args.plot:
        plotting.check(args.plot, "--plot")
    cache_flags = ("window", "theta", "lambdasm", "cache_from_start")
    print("Cache:", parser.spelled({name: getattr(args, name) for name in cache_flags}))
    corpus = read_corpus(args, loaded.dictionary, train=False)
    network = network_of(loaded, args)
    parts = (corpus.valid, corpus.test)
    valid_data, test_data = (batchify(part, 1).to(network.device) for part in parts)
    check_length(valid_data, "valid.txt", "bring a longer text")
    check_length(test_data, "test.txt", "bring a longer text")
    setting = Setting(args.window, args.theta, args.lambdasm, math.nan)

    def score(source: Tensor, what: str) -> float:
        if not args.cache_from_start and len(source) - 1 <= setting.window:
            print(f"| {what} is no longer than --window: the cache is used with a smaller one only")
        cache = ContinuousCache(setting.window, setting.theta, args.cache_from_start)
        chunks = {"bptt": args.bptt, "max_batches": args.max_batches, "what": what}
        return evaluate(network, source, cache, lambdasm=setting.lambdasm, **chunks)

    if args.search or args.by_word or args.plot:
        stored = run_once(network, valid_data, args.bptt, args.max_batches)
        setting, valid_loss = study(args, stored, setting, loaded.dictionary.idx2word)
        del stored
    else:
        valid_loss = score(valid_data, "valid.txt")
    print(DOUBLE_RULE)
    print(pointer_line("val", valid_loss))
    test_loss = score(test_data, "test.txt")
    print(DOUBLE_RULE)
    print(pointer_line("test", test_loss))
    print(DOUBLE_RULE)


if __name__ == "__main__":
    program.run(main)
