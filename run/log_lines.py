"""The classic log lines, which programs parse; losses are in nats a token."""

import argparse

from torch import Tensor

from utils import bits, perplexity, predicted

RULE = "-" * 89
DOUBLE_RULE = "=" * 89


def batch_line(epoch: int, batch: int, batches: int, lr: float, ms: float, loss: float) -> str:
    """The line within an epoch; `ms` is milliseconds a batch."""
    return (
        f"| epoch {epoch:3d} | {batch:5d}/{batches:5d} batches | lr {lr:05.5f} | "
        f"ms/batch {ms:5.2f} | loss {loss:5.2f} | ppl {perplexity(loss):8.2f} | "
        f"bpc {bits(loss):8.3f}"
    )


def epoch_line(epoch: int, seconds: float, loss: float) -> str:
    """The line at the end of an epoch; `loss` is the validation loss."""
    return (
        f"| end of epoch {epoch:3d} | time: {seconds:5.2f}s | valid loss {loss:5.2f} | "
        f"valid ppl {perplexity(loss):8.2f} | valid bpc {bits(loss):8.3f}"
    )


def end_line(loss: float) -> str:
    """The last line of training; `loss` is the test loss."""
    return (
        f"| End of training | test loss {loss:5.2f} | test ppl {perplexity(loss):8.2f} | "
        f"test bpc {bits(loss):8.3f}"
    )


def scored_line(method: str, part: str, loss: float) -> str:
    """The last line of "pointer" or "dynamic evaluation" for a `part`, val or test."""
    return f"| End of {method} | {part} loss {loss:5.2f} | {part} ppl {perplexity(loss):8.2f}"


def alone_line(what: str, method: str, loss: float) -> str:
    """The model's own loss on the text `what`, beside its loss with a method."""
    return f"| {what} without {method} | loss {loss:5.2f} | ppl {perplexity(loss):8.2f}"


def partial(args: argparse.Namespace, source: Tensor) -> str:
    """The end of a line with figures of `source`, where --max-batches leaves a part of it out."""
    share = predicted(source, args.bptt, args.max_batches) / (len(source) - 1)
    return f" | partial: {share:.1%} of the text" if share < 1 else ""
