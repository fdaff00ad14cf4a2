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
from run.log_lines import DOUBLE_RULE, alone_line, partial, scored_line
from run.network import network_of
from run.progress import Bar
from scoring import plotting, search, words
from scoring.search import Setting
from scoring.stream import Piece, pieces, with_cache
from utils import batchify, check_length, perplexity, predicted

DRAWN_WORDS = 20


def build_parser() -> Parser:
    """The command line of pointer.py."""
    parser = Parser("pointer", __doc__)
    flags.add_data(parser, "data/penn")
    flags.add_model(parser)
    flags.add_save(parser, "model file to score")
    flags.add_cache(parser)
    parser.flag(
        "search",
        "--search",
        False,
        "tune the window, theta and lambda on valid.txt and score test.txt with the best "
        "values; the values given are tried too",
    )
    add = parser.group("words")
    add(
        "--by-word",
        type=positive_int,
        help="print the N words of valid.txt that the cache helps most, and the N it hurts most",
    )
    add(
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
    network: TrainingLoss, source: Tensor, setting: Setting, args: argparse.Namespace, what: str
) -> float:
    """Mean cross-entropy, nats a predicted token, of the network with the cache at `setting`.

    `source` is (rows, 1): the cache follows one stream. Where the cache is in use, a word has the
    probability `lambdasm * p_cache + (1 - lambdasm) * p_vocabulary`. Prints the loss of the network
    alone; `what` is the text's name.
    """
    cache = ContinuousCache(setting.window, setting.theta, args.cache_from_start)
    total = torch.zeros(2, dtype=torch.float64, device=source.device)  # with and without cache
    rows, done = predicted(source, args.bptt, args.max_batches), 0
    with Bar(rows, what) as bar:
        for piece in pieces(network, source[: rows + 1], args.bptt):
            both = torch.stack([with_cache(piece, cache, setting.lambdasm)[0], piece.logprob])
            total -= both.double().sum(dim=1)
            done += len(piece.words)
            if bar.shown:
                loss = total[0].item() / done
                bar.update(len(piece.words), loss=f"{loss:.2f}", ppl=f"{perplexity(loss):.2f}")
    loss, alone = (total / rows).tolist()
    print_alone(alone, source, setting, args, what)
    return loss


def print_alone(
    loss: float, source: Tensor, setting: Setting, args: argparse.Namespace, what: str
) -> None:
    """Print the loss of the network alone, and whether the text is too short for the cache."""
    rows = predicted(source, args.bptt, args.max_batches)
    # The cache's first use is after `window` + 1 positions.
    if not args.cache_from_start and rows <= setting.window + 1:
        print(f"| {what} is too short for --window: the cache is used with a smaller one only")
    print(alone_line(what, "the cache", loss) + partial(args, source))


def study(
    network: TrainingLoss,
    source: Tensor,
    given: Setting,
    args: argparse.Namespace,
    names: Sequence[str],
) -> tuple[Setting, float]:
    """Tune the cache on valid.txt, `source` (rows, 1), and report its effect on single words.

    The network runs once. `names` are the words by id. Returns the setting, which --search tunes,
    and its loss.
    """
    parts, part = [], partial(args, source)
    rows = predicted(source, args.bptt, args.max_batches)
    with Bar(rows, "valid.txt") as bar:
        for piece in pieces(network, source[: rows + 1], args.bptt):
            parts.append(piece[:3])  # without the layers and the states
            bar.update(len(piece.words))
    stored = Piece(*map(torch.cat, zip(*parts, strict=True)))
    setting, from_start = given, args.cache_from_start
    if args.search:
        given = given._replace(loss=search.loss_at(stored, given, from_start))
        with Bar(2 * rows, "search") as bar:
            table, setting = search.search(stored, given, from_start, bar.update)
        print_search(table, setting, given, rows, part)
    alone = -stored.logprob.double().mean().item()
    print_alone(alone, source, setting, args, "valid.txt")
    logprob = search.logprobs_at(stored, setting, from_start)
    if args.by_word or args.plot:
        changes = words.changes(logprob - stored.logprob, stored.words, names)
        helped, hurt = words.extremes(changes, args.by_word or DRAWN_WORDS)
        if args.by_word:
            words.print_words(helped, hurt, part)
        if args.plot:
            words.draw_words(helped, hurt, part, args.plot)
    return setting, -logprob.double().mean().item()


def print_search(
    table: Sequence[Setting], best: Setting, given: Setting, tokens: int, part: str
) -> None:
    """Print the table of --search: a row a theta, a column a window, each at its best lambda."""
    windows = sorted({setting.window for setting in table})
    thetas = sorted({setting.theta for setting in table})
    cells = {(setting.window, setting.theta): setting for setting in table}
    print(f"| {tokens} tokens of valid.txt: perplexity at the best lambda, and that lambda{part}")
    print("|  theta | " + " | ".join(f"window {window:7d}" for window in windows))
    for theta in thetas:
        row = [cells[window, theta] for window in windows]
        shown = [f"{perplexity(cell.loss):8.2f} {cell.lambdasm:5.3f}" for cell in row]
        print(f"| {theta:6.3f} | " + " | ".join(shown))
    for name, setting in (("given", given), ("best", best)):
        print(
            f"| {name}: --window {setting.window} --theta {setting.theta!r} --lambdasm "
            f"{setting.lambdasm!r} | val ppl {perplexity(setting.loss):.2f}{part}"
        )
    if best.window == windows[-1] and best.window < tokens:
        print(
            f"| the widest window is best: --search --window {2 * best.window} looks further back"
        )
    elif best.window < windows[0] or not thetas[0] <= best.theta <= thetas[-1]:
        print("| the best setting lies outside the table: --search with it looks around it")


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
    print("Cache:", parser.of_group("cache", args))
    corpus = read_corpus(args, loaded.dictionary, train=False)
    network = network_of(loaded, args)
    parts = (corpus.valid, corpus.test)
    valid_data, test_data = (batchify(part, 1).to(network.device) for part in parts)
    check_length(valid_data, "valid.txt", "bring a longer text")
    check_length(test_data, "test.txt", "bring a longer text")
    setting = Setting(args.window, args.theta, args.lambdasm, math.nan)
    if args.search or args.by_word or args.plot:
        names = loaded.dictionary.idx2word
        setting, valid_loss = study(network, valid_data, setting, args, names)
    else:
        valid_loss = evaluate(network, valid_data, setting, args, "valid.txt")
    print(DOUBLE_RULE)
    print(scored_line("pointer", "val", valid_loss) + partial(args, valid_data))
    test_loss = evaluate(network, test_data, setting, args, "test.txt")
    print(DOUBLE_RULE)
    print(scored_line("pointer", "test", test_loss) + partial(args, test_data))
    print(DOUBLE_RULE)


if __name__ == "__main__":
    program.run(main)
