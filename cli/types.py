"""The types of flags. Each raises ArgumentTypeError."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from model import find_cell

_TOO_LARGE = 2**63  # for PyTorch's integers


def positive_int(text: str) -> int:
    """An integer of 1 or more."""
    return _number(text, int, lambda n: 1 <= n < _TOO_LARGE, "an integer of 1 or more")


def natural(text: str) -> int:
    """An integer of 0 or more."""
    return _number(text, int, lambda n: 0 <= n < _TOO_LARGE, "an integer of 0 or more")


def seed(text: str) -> int:
    """A seed that PyTorch and numpy both take."""
    return _number(text, int, lambda n: 0 <= n < 2**32, "an integer from 0 to 2**32 - 1")


def vocabulary_size(text: str) -> int:
    """An integer of 3 or more."""
    return _number(text, int, lambda n: 3 <= n < _TOO_LARGE, "an integer of 3 or more")


def positive(text: str) -> float:
    """A finite number above 0."""
    return _number(text, float, lambda x: 0 < x < math.inf, "a number above 0")


def non_negative(text: str) -> float:
    """A finite number of 0 or more."""
    return _number(text, float, lambda x: 0 <= x < math.inf, "a number of 0 or more")


def sharpness(text: str) -> float:
    """A number from 0 to 1e30: products with a larger one overflow float32."""
    return _number(text, float, lambda x: 0 <= x <= 1e30, "a number from 0 to 1e30")


def probability(text: str) -> float:
    """A number in [0, 1)."""
    return _number(text, float, lambda x: 0 <= x < 1, "in [0, 1)")


def share_of_one(text: str) -> float:
    """A number above 0, and at most 1."""
    return _number(text, float, lambda x: 0 < x <= 1, "above 0 and at most 1")


def fraction(text: str) -> float:
    """A number above 0 and below 1."""
    return _number(text, float, lambda x: 0 < x < 1, "above 0 and below 1")


def cell(text: str) -> str:
    """The name of a cell, with its options."""
    try:
        find_cell(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _number(text: str, kind: Callable[[str], Any], fits: Callable[[Any], bool], what: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if kind is float and value and not 1e-37 < abs(value) < 1e37:
        value, what = None, f"{what}, in the range of float32"
    if value is None or not fits(value):
        if kind is int and value is not None and value >= _TOO_LARGE:
            what += " and below 2**63"
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
    return value


METAVARS = {
    **dict.fromkeys((positive_int, natural, seed, vocabulary_size), "N"),
    **dict.fromkeys((positive, non_negative, sharpness), "X"),
    probability: "P",
}
