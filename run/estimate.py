"""The time that training will take, estimated from the first batches."""

# The first batches allocate memory and, on a GPU, record the steps: the next ones are timed.
WARM_UP, TIMED = 3, 20
# A forward pass without a backward pass takes about a third of a training step.
_EVALUATION = 1 / 3


def estimate_line(
    seconds: float, train: int, valid: int, done: float, epochs: int, loss: float
) -> tuple[str, float]:
    """The line that tells how long the run takes, and the seconds left.

    `seconds` a token were measured; an epoch has `train` tokens, of which the fraction `done` is
    trained on, and `valid` tokens of evaluation; `epochs` are left with this one, and `loss` is
    that of the batches so far, in nats a token.
    """
    epoch = seconds * (train + valid * _EVALUATION)
    left = epoch * epochs - seconds * train * done
    return (
        f"| about {in_words(epoch)} an epoch, {in_words(left)} for {epochs} "
        f"epoch{'s' * (epochs > 1)} | loss of the first batches {loss:.2f}",
        left,
    )


def in_words(seconds: float) -> str:
    """A duration with two digits, such as "45 s", "14 min", "3.2 hours" or "5 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    if hours < 36:
        return f"{hours:.0f} hours" if hours >= 10 else f"{hours:.1f} hours"
    return f"{hours / 24:.0f} days"
