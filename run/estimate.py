"""The time that training will take, estimated from the first batches."""

# The first batches allocate memory and, on a GPU, record the steps: the next ones are timed.
WARM_UP, TIMED = 3, 20
# A forward pass without a backward pass takes about a third of a training step.
_EVALUATION = 1 / 3


def times(seconds: float, *, train: int, valid: int, done: int, epochs: int) -> tuple[float, float]:
    """The seconds of an epoch, and of the rest of `epochs` epochs, at `seconds` a token.

    An epoch trains on `train` tokens, `done` of them already, and evaluates `valid` tokens.
    """
    epoch = seconds * (train + valid * _EVALUATION)
    return epoch, epoch * epochs - seconds * done


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
