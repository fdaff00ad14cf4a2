"""The types of flags. Each raises ArgumentTypeError."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from model import find_cell

_TOO_LARGE = 2**63  # for PyTorch's integers


def _number(
    kind: Callable[[str], Any], what: str, fits: Callable[[Any], bool]
) -> Callable[[str], Any]:
    """The type of a flag that takes `what`: a number of a `kind` that `fits`."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        expected = what
        if kind is float and value and not 1e-37 < abs(value) < 1e37:
            value, expected = None, f"{what}, in the range of float32"
        if kind is int and value is not None and value >= _TOO_LARGE:
            value, expected = None, f"{what} and below 2**63"
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"must be {expected}, not {text!r}")
        return value

    return number


positive_int = _number(int, "an integer of 1 or more", lambda n: n >= 1)
natural = _number(int, "an integer of 0 or more", lambda n: n >= 0)
# PyTorch and numpy both take these seeds.
seed = _number(int, "an integer from 0 to 2**32 - 1", lambda n: 0 <= n < 2**32)
vocabulary_size = _number(int, "an integer of 3 or more", lambda n: n >= 3)
positive = _number(float, "a number above 0", lambda x: 0 < x < math.inf)
non_negative = _number(float, "a number of 0 or more", lambda x: 0 <= x < math.inf)
# Products with a larger one overflow float32.
sharpness = _number(float, "a number from 0 to 1e30", lambda x: 0 <= x <= 1e30)
probability = _number(float, "in [0, 1)", lambda x: 0 <= x < 1)
share_of_one = _number(float, "above 0 and at most 1", lambda x: 0 < x <= 1)
fraction = _number(float, "above 0 and below 1", lambda x: 0 < x < 1)


def cell(text: str) -> str:
    """The name of a cell, with its options."""
    try:
        find_cell(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


METAVARS = {
    **dict.fromkeys((positive_int, natural, seed, vocabulary_size), "N"),
    **dict.fromkeys((positive, non_negative, sharpness), "X"),
    probability: "P",
}
