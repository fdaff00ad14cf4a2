"""Score a trained model together with the continuous cache; nothing is trained.

With --search the cache's window, theta and lambda are first tuned on valid.txt, and test.txt is
scored with the best.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoint import model_file as checkpoint
from cli import flags as options
from cli import plotting
from cli.progress import Bar
from continuous_cache import ContinuousCache
from model import RNNModel
from scoring import search as cache_search
from scoring import stream as scoring
from scoring.search import Setting
from scoring.stream import Piece
from splitcross import SplitCrossEntropyLoss
from utils import (
    batchify,
    check_length,
    out_of_memory,
    perplexity,
    pointer_line,
    score_as_trained,
    select_device,
)

DRAWN_WORDS = 20


def build_parser() -> options.Parser:
    """The command line of pointer.py."""
    parser = options.Parser(options.CLASSIC["pointer"], __doc__)
    options.add_data(parser, "data/penn")
    options.add_split(parser)
    options.add_model(parser)
    options.add_save(parser, "model file to score")
    options.add_cache(parser)
    add = parser.group("search").add_argument
    add(
        "--search",
        action="store_true",
        help="tune the window, theta and lambda on valid.txt and score test.txt with the best; the "
        "given ones take part",
    )
    add = parser.group("words").add_argument
    add(
        "--by-word",
        type=options.positive_int,
        metavar="N",
        help="print the N words of valid.txt that the cache helps most and hurts most",
    )
    add(
        "--plot",
        metavar="FILE",
        help=f"draw them, {DRAWN_WORDS} each without --by-word, as .png, .pdf or .svg",
    )
    options.add_chunk(parser, 5000)
    options.add_device(parser)
    options.add_max_batches(parser, "chunks of --bptt tokens of each file")
    return parser


@torch.inference_mode()
def evaluate(
    model: RNNModel,
    criterion: SplitCrossEntropyLoss,
    source: Tensor,
    cache: ContinuousCache,
    *,
    lambdasm: float,
    bptt: int,
    max_batches: int | None = None,
    tick: Callable[[int, float], None] = lambda n, loss: None,
) -> float:
    """Mean cross-entropy, nats a predicted token, of the mixture of model and `cache`.

    `source` is (rows, 1): the cache follows one stream. Where the cache speaks, the probability of
    a word is `lambdasm * p_cache + (1 - lambdasm) * p_vocabulary`. `tick` is told how many tokens
    each chunk had, and the mean so far.
    """
    total = torch.zeros((), dtype=torch.float64, device=source.device)
    rows = 0
    for piece in scoring.pieces(model, criterion, source, bptt, max_batches):
        total -= scoring.with_cache(piece, cache, lambdasm)[0].double().sum()
        rows += len(piece.words)
        tick(len(piece.words), total.item() / rows)
    return total.item() / rows


def run_once(
    model: RNNModel,
    criterion: SplitCrossEntropyLoss,
    source: Tensor,
    bptt: int,
    max_batches: int | None,
    bar: Bar,
) -> Piece:
    """All that the cache needs to know of `source` (rows, 1), from one run of the model."""

    def parts():
        for piece in scoring.pieces(model, criterion, source, bptt, max_batches):
            yield piece
            bar.update(len(piece.words))

    return scoring.joined(parts())


class Change(NamedTuple):
    """What the cache changed for a word over all of its occurrences."""

    word: str
    total: float  # the sum of the changes of log p, in nats
    count: int


def changes(gain: Tensor, words: Tensor, names: Sequence[str]) -> list[Change]:
    """The change of every word that occurs, those the cache helps most first.

    `gain` (n,) is the change of log p at each position, in nats, `words` (n,) the words there.
    """
    totals = torch.zeros(len(names), dtype=torch.float64, device=gain.device)
    totals.index_add_(0, words, gain.double())
    counts = words.bincount(minlength=len(names)).tolist()
    found = [
        Change(names[i], total, counts[i]) for i, total in enumerate(totals.tolist()) if counts[i]
    ]
    return sorted(found, key=lambda change: -change.total)


def extremes(found: Sequence[Change], n: int) -> tuple[list[Change], list[Change]]:
    """The `n` words helped most and the `n` hurt most, the most first; a word is in one only."""
    helped = [change for change in found if change.total > 0]
    hurt = [change for change in reversed(found) if change.total < 0]
    return helped[:n], hurt[:n]


def print_words(found: Sequence[Change], n: int) -> None:
    """The table of --by-word."""
    for what, some in zip(("helps", "hurts"), extremes(found, n), strict=True):
        print(f"| words of valid.txt that the cache {what} most, log p with it less log p without")
        print("|        sum |     mean |   count | word")
        for word, total, count in some:
            print(f"| {total:10.2f} | {total / count:8.3f} | {count:7d} | {word}")


def draw_words(found: Sequence[Change], n: int, path: str) -> None:
    """The figure of --plot, after arXiv 1708.02182: left what the cache hurts, right what it helps.

    Raises ToolkitError if it cannot be drawn.
    """
    helped, hurt = extremes(found, n)
    rows = max(len(helped), len(hurt), 1)
    figure = plotting.figure_class()(figsize=(9, 1.4 + 0.24 * rows), layout="constrained")
    # One scale: the two sides are to be compared.
    axes = figure.subplots(1, 2, sharex=True)
    for ax, some, colour, what, unit in (
        (axes[0], hurt, "#c0392b", "hurts", "lost"),
        (axes[1], helped, "#2471a3", "helps", "gained"),
    ):
        totals = [abs(change.total) for change in some]
        ax.barh(range(len(some)), totals, color=colour)
        # A dollar sign would start a formula.
        labels = [f"{change.word} ({change.count})".replace("$", r"\$") for change in some]
        ax.set_yticks(range(len(some)), labels)
        ax.set_ylim(rows - 0.4, -0.6)
        ax.set_title(f"words the cache {what} most")
        ax.set_xlabel(f"nats {unit} over all occurrences (their number)")
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    plotting.save(figure, path, "--plot")


def print_search(table: Sequence[Setting], best: Setting, given: Setting, tokens: int) -> None:
    """The table of --search: rows are thetas, columns windows, each at its best lambda."""
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


@out_of_memory("--bptt")
def main(argv: Sequence[str] | None = None) -> None:
    """Score validation and test; raises ToolkitError for what the user can mend."""
    args = options.parse(build_parser, argv)
    if args.plot:
        plotting.check(args.plot, "--plot")
    loaded = checkpoint.load(args.save)
    options.check_architecture(args, loaded.config, args.save)
    device = select_device(args.cuda)
    score_as_trained(loaded.args, device)
    corpus = options.read_corpus(args, print, loaded.dictionary, loaded.args)
    model, criterion = checkpoint.rebuild(loaded, device)
    valid_data = batchify(corpus.valid, 1).to(device)
    test_data = batchify(corpus.test, 1).to(device)
    check_length(valid_data, "valid.txt", "bring a longer text")
    check_length(test_data, "test.txt", "bring a longer text")
    setting = Setting(args.window, args.theta, args.lambdasm, float("nan"))
    from_start = args.cache_from_start

    def predicted(source: Tensor) -> int:
        most = source.size(0) - 1
        return most if args.max_batches is None else min(most, args.max_batches * args.bptt)

    def score(source: Tensor, name: str) -> float:
        """The loss of a file, chunk by chunk, at the setting."""
        with Bar(predicted(source), name) as bar:
            return evaluate(
                model,
                criterion,
                source,
                ContinuousCache(setting.window, setting.theta, from_start),
                lambdasm=setting.lambdasm,
                bptt=args.bptt,
                max_batches=args.max_batches,
                tick=lambda n, loss: bar.update(
                    n, loss=f"{loss:.2f}", ppl=f"{perplexity(loss):.2f}"
                ),
            )

    if not (args.search or args.by_word or args.plot):
        valid_loss = score(valid_data, "valid.txt")
    else:
        with Bar(predicted(valid_data), "valid.txt") as bar:
            stored = run_once(model, criterion, valid_data, args.bptt, args.max_batches, bar)
        if args.search:
            given = setting._replace(loss=cache_search.loss_at(stored, setting, from_start))
            with Bar(2 * len(stored.words), "search") as bar:
                table, setting = cache_search.search(stored, given, from_start, bar.update)
            print_search(table, setting, given, len(stored.words))
        logprob = cache_search.logprobs_at(stored, setting, from_start)
        valid_loss = -logprob.double().mean().item()
        if args.by_word or args.plot:
            found = changes(logprob - stored.logprob, stored.words, loaded.dictionary.idx2word)
            if args.by_word:
                print_words(found, args.by_word)
            if args.plot:
                draw_words(found, args.by_word or DRAWN_WORDS, args.plot)
        del stored
    print("=" * 89)
    print(pointer_line("val", valid_loss))
    test_loss = score(test_data, "test.txt")
    print("=" * 89)
    print(pointer_line("test", test_loss))
    print("=" * 89)


if __name__ == "__main__":
    options.run(main)
