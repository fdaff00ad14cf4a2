"""The time that training will take, estimated from the first batches."""

# The first batches allocate memory and, on a GPU, record the steps: the next ones are timed.
WARM_UP, TIMED = 3, 20


def times(seconds: float, *, train: int, valid: int, done: int, epochs: int) -> tuple[float, float]:
    """The seconds of an epoch, and of the rest of `epochs` epochs, at `seconds` a token.

    An epoch trains on `train` tokens, `done` of them already, and evaluates `valid` tokens.
    """
    # A forward pass alone takes about a third of a training step.
    epoch = seconds * (train + valid / 3)
    return epoch, epoch * epochs - seconds * done


def in_words(seconds: float) -> str:
    """A duration in one unit, such as "45 s", "14 min", "3.2 hours" or "5.0 days"."""
    unit, size = "s", 1
    for longer, its_size in (("min", 60), ("hours", 3600), ("days", 86400)):
        if seconds >= 1.5 * its_size:
            unit, size = longer, its_size
    digits = 0 if seconds >= 10 * size else 1
    return f"{seconds / size:.{digits}f} {unit}"
