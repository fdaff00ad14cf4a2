"""Time a part of the toolkit: `python bench/parts.py PART` from the repository's root.

corpus      loading --data: the classic double loop, ours, and ours from the cache
big-corpus  time and memory of loading a synthetic corpus of WikiText-103's size, 1.2 GB in TMPDIR
pointer     the continuous cache: the classic evaluation over one-hot words, and ours
dynamic     the update of dynamic evaluation, PTB LSTM; the floor reads weights, their start, root
            mean squares and gradients and writes weights once, at the bandwidth of a copy
alignment   a layer's products at the published widths, and at multiples of 4, 8, 16 and 64: rows
            of 1150 or 1550 float32 are no multiple of 16 bytes

The last two run on the GPU if there is one.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from bench import common
from bench.common import measure, print_head, print_heading, print_row, spread
from bench.train_step import precisions_of, products
from continuous_cache import ContinuousCache
from data import EOS, SPLITS, Corpus, Dictionary
from dynamic_evaluation import DynamicEvaluation
from fast.dynamic_evaluation import FastDynamicEvaluation
from model import RNNModel
from run.device import set_precision
from run.ranks import Ranks


def load_by_double_loop(folder: Path) -> tuple[Dictionary, list[Tensor]]:
    """Load as in the classic code: read each file once for the words, again for the ids."""
    dictionary = Dictionary()
    splits = []
    for split in SPLITS:
        path = folder / f"{split}.txt"
        tokens = 0
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                words = [*line.split(), EOS]
                tokens += len(words)
                for word in words:
                    dictionary.add_word(word)
        ids = torch.empty(tokens, dtype=torch.int64)
        token = 0
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                for word in [*line.split(), EOS]:
                    ids[token] = dictionary.word2idx[word]
                    token += 1
        splits.append(ids)
    return dictionary, splits


def corpus(args: argparse.Namespace, device: torch.device) -> None:
    """Loading a corpus of usual size."""
    reference = Corpus(args.data, cache=False)
    dictionary, splits = load_by_double_loop(args.data)
    assert dictionary.idx2word == reference.dictionary.idx2word
    for split, ids in zip(SPLITS, splits, strict=True):
        assert torch.equal(ids.int(), reference.part(split))
    ways = {
        "classic double loop": lambda k: load_by_double_loop(args.data),
        "ours, no cache": lambda k: Corpus(args.data, cache=False),
        "ours, from the cache": lambda k: Corpus(args.data),
    }
    seconds = measure(ways, torch.device("cpu"), args.runs)
    print_heading(
        f"corpus {args.data.name}: {len(reference):,} tokens in three files, vocabulary "
        f"{len(reference.dictionary):,}; median of {args.runs} interleaved runs, files in memory"
    )
    print_head("loading", "ms", "fastest to slowest, ms", "tokens/s", "times the classic")
    classic = statistics.median(seconds["classic double loop"])
    for way, times in seconds.items():
        middle = statistics.median(times)
        rate = f"{len(reference) / middle:,.0f}"
        print_row(way, *spread(times, 1e-3), rate, f"{classic / middle:.1f}")


def write_corpus(folder: Path, tokens: int, words: int) -> None:
    """Lines of 25 words whose ranks follow Zipf's law, and every word at least once."""
    rng = np.random.RandomState(0)
    for split, size in (("train", tokens), ("valid", 200_000), ("test", 200_000)):
        with open(folder / f"{split}.txt", "w", encoding="utf-8") as file:
            if split == "train":
                file.write(" ".join(f"w{n}" for n in range(words - 1)) + "\n")
            for _ in range(0, size, 2_500_000):
                count = min(size, 2_500_000)
                ranks = ((words - 1) ** rng.random_sample(count)).astype(int) - 1
                lines = np.char.add("w", ranks.astype(str)).reshape(-1, 25)
                file.writelines(" ".join(line) + "\n" for line in lines)


def private_bytes() -> int:
    """Bytes of the pages that belong to this process alone."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def load_columns(folder: str, rank: int, world: int) -> tuple[float, int, int, torch.Size]:
    """Load the columns of one process of `world`, of 80 in all.

    Returns seconds, bytes of memory at the peak and at the end, and the shape (rows, columns).
    """
    before, peak, done = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    loaded = Corpus(folder)
    columns = loaded.columns("train", 80, *Ranks(rank, world).span(80))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return seconds, peak - before, private_bytes() - before, columns.shape


def big_corpus(args: argparse.Namespace, device: torch.device) -> None:
    """Loading a large corpus, each time in a process of its own.

    Memory is in private pages above those at the start; the encoded file is mapped, and its pages
    belong to all processes.
    """
    words = 267_000
    print_heading(f"{args.tokens:,} tokens, {words:,} words, 80 columns")
    print_head("process", "s", "peak MB", "MB kept", "train (rows, columns)")
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), args.tokens, words)
        for what, rank, world in (
            ("encodes", 0, 1),
            ("from the cache, alone", 0, 1),
            ("from the cache, one of 8", 5, 8),
        ):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, peak, kept, shape = pool.apply(load_columns, (folder, rank, world))
            memory = f"{peak / 1e6:.0f}", f"{kept / 1e6:.0f}"
            print_row(what, f"{seconds:.1f}", *memory, tuple(shape))


@torch.inference_mode()
def pointer(args: argparse.Namespace, device: torch.device) -> None:
    """The continuous cache on random outputs, as their values do not change the time."""
    window, ntoken, size, theta = 3785, 10_000, 400, 0.66
    few, many = 10, 5000
    first = window + 1
    outputs = torch.randn(first + many, size) * 0.2
    words = torch.randint(ntoken, (first + many,))
    one_hot = torch.zeros(first + few, ntoken)
    one_hot[range(first + few), words[: first + few]] = 1

    def classic(k: int) -> Tensor:
        """p(word), token by token over the full vocabulary, as in the classic code."""
        probs = []
        for t in range(first, first + few):
            attention = (outputs[t - window : t] @ outputs[t] * theta).softmax(dim=0)
            distribution = (attention.unsqueeze(1) * one_hot[t - window : t]).sum(dim=0)
            probs.append(distribution[words[t]])
        return torch.stack(probs)

    def ours(k: int, tokens: int = many) -> Tensor:
        cache = ContinuousCache(window, theta)
        cache.target_prob(outputs[:first], words[:first])
        last = first + tokens
        return cache.target_prob(outputs[first:last], words[first:last])[0]

    torch.testing.assert_close(ours(0, few), classic(0), atol=1e-6, rtol=1e-4)
    seconds = measure({"classic": classic, "ours": ours}, torch.device("cpu"), args.runs)
    print_heading(
        f"window {window}, vocabulary {ntoken:,}, outputs of {size}; {few} tokens the classic way "
        f"and {many} ours; median of {args.runs} interleaved runs"
    )
    print_head("cache", "us a token", "fastest to slowest", "times the classic")
    base = statistics.median(seconds["classic"]) / few
    for way, tokens in (("classic", few), ("ours", many)):
        ratio = base / statistics.median(seconds[way]) * tokens
        print_row(way, *spread(seconds[way], 1e-6 * tokens), f"{ratio:.0f}")


def dynamic(args: argparse.Namespace, device: torch.device) -> None:
    """The update of dynamic evaluation."""
    model = RNNModel("LSTM", 10_000, 400, 1150, 3, tie_weights=True).to(device)
    params = list(model.parameters())
    rms = [torch.rand_like(p).mul_(1e-3) for p in params]
    for p in params:
        p.grad = torch.randn_like(p).mul_(1e-4)
    rates = {"lr": 5e-5, "lamb": 2e-3, "epsilon": 2e-5}
    ours = FastDynamicEvaluation(params, rms, **rates)
    definition = DynamicEvaluation(params, rms, **rates)
    ways = {
        "DynamicEvaluation, one pass": lambda k: ours.step(),
        "a loop over parameters": lambda k: definition.step(),
    }
    count = sum(p.numel() for p in params)
    floor = 5 * 4 * count / common.copy_bandwidth(device)
    print_heading(
        f"the update of dynamic evaluation, PTB LSTM, {count:,} parameters, median of {args.runs} "
        f"runs in turn; the floor of one pass is {floor * 1e3:.2f} ms",
        device,
    )
    seconds = measure(ways, device, args.runs)
    base = statistics.median(seconds["DynamicEvaluation, one pass"])
    print_head("way", "ms", "fastest to slowest", "of the floor", "times ours")
    for way, times in seconds.items():
        middle = statistics.median(times)
        print_row(way, *spread(times, 1e-3), f"{middle / floor:.2f}", f"{middle / base:.2f}")


def alignment(args: argparse.Namespace, device: torch.device) -> None:
    """The products of a middle layer of each cell: forward, input's and weight's gradient."""
    rows = 70 * 20
    print_heading(f"{rows} rows; median of {args.runs} runs in turn", device)
    print_head("layer", "precision", "width", "ms", "x the published width")
    for precision in precisions_of(device):
        set_precision(precision, device)
        for layer, width, gates in (("LSTM 1150", 1150, 4), ("QRNN 1550", 1550, 3)):
            calls = {}
            for n in sorted({width, *(-(-width // to) * to for to in (4, 8, 16, 64))}):
                run = products([(rows, n, gates * n)], device, precision)
                calls[n] = lambda k, run=run: run()
            seconds = measure(calls, device, args.runs)
            base = statistics.median(seconds[width])
            for n, times in seconds.items():
                middle = statistics.median(times)
                print_row(layer, precision, n, f"{middle * 1e3:.3f}", f"{middle / base:.3f}")


PARTS = {
    "corpus": corpus,
    "big-corpus": big_corpus,
    "pointer": pointer,
    "dynamic": dynamic,
    "alignment": alignment,
}


def main(argv: list[str] | None = None) -> None:
    """Print the table of a part."""
    parser = common.build_parser(__doc__)
    parser.add_argument("part", choices=PARTS)
    sample = Path(__file__).resolve().parent.parent / "data" / "sample"
    parser.add_argument("--data", type=Path, default=sample, help="folder of a corpus to load")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="of the synthetic corpus")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    PARTS[args.part](args, common.prepare(args))


if __name__ == "__main__":
    main()
