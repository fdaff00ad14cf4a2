"""Time the continuous cache: the classic per-token evaluation over one-hot words, and ours.

Run as `python bench/pointer.py` from the repository's root. The model outputs are random, as their
values do not change the time.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.common import in_turns, print_heading
from continuous_cache import ContinuousCache


def classic(outputs: Tensor, words: Tensor, one_hot: Tensor, first: int, window: int) -> Tensor:
    """The cache's p(word), token by token over the whole vocabulary, as in the classic code."""
    probs = []
    for t in range(first, len(words)):
        attention = (outputs[t - window : t] @ outputs[t] * 0.66).softmax(dim=0)
        distribution = (attention.unsqueeze(1) * one_hot[t - window : t]).sum(dim=0)
        probs.append(distribution[words[t]])
    return torch.stack(probs)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=int, default=3785)
    parser.add_argument("--ntoken", type=int, default=10_000, help="vocabulary, PTB's by default")
    parser.add_argument("--size", type=int, default=400, help="size of the outputs")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    few, many = 10, 5000
    length = args.window + 1 + many
    outputs = torch.randn(length, args.size) * 0.2
    words = torch.randint(args.ntoken, (length,))
    first = args.window + 1
    one_hot = torch.zeros(first + few, args.ntoken)
    one_hot[range(first + few), words[: first + few]] = 1

    def ours(tokens: int) -> Tensor:
        cache = ContinuousCache(args.window, 0.66)
        cache.target_prob(outputs[:first], words[:first])
        return cache.target_prob(outputs[first : first + tokens], words[first : first + tokens])[0]

    expected = classic(outputs[: first + few], words[: first + few], one_hot, first, args.window)
    torch.testing.assert_close(ours(few), expected, atol=1e-6, rtol=1e-4)
    seconds = in_turns(
        {
            "classic": lambda: classic(
                outputs[: first + few], words[: first + few], one_hot, first, args.window
            ),
            "ours": lambda: ours(many),
        },
        args.runs,
    )
    print_heading(
        f"window {args.window}, vocabulary {args.ntoken:,}, outputs of {args.size}; {few} tokens "
        f"the classic way and {many} ours; median of {args.runs} interleaved runs"
    )
    print("| cache | us a token | fastest to slowest | times the classic |")
    print("|---|---|---|---|")
    per_token = {
        way: [1e6 * t / n for t in seconds[way]] for way, n in (("classic", few), ("ours", many))
    }
    base = statistics.median(per_token["classic"])
    for way, times in per_token.items():
        middle = statistics.median(times)
        span = f"{min(times):.1f} to {max(times):.1f}"
        print(f"| {way} | {middle:.1f} | {span} | {base / middle:.0f} |")


if __name__ == "__main__":
    main()
