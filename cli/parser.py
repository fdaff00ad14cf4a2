"""The parser of every script: one-line errors, classic abbreviations, presets."""

import argparse
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from cli import presets

VERSION = "0.1.0"

# The flags of the original, script by script. An abbreviation that is unambiguous among them stays
# valid when flags are added.
_TRAINING = """
    --data --model --emsize --nhid --nlayers --lr --clip --epochs --batch_size --bptt --dropout
    --dropouth --dropouti --dropoute --wdrop --seed --nonmono --cuda --log-interval --save --alpha
    --beta --wdecay
""".split()
CLASSIC = {
    "main": [*_TRAINING, "--resume", "--optimizer", "--when"],
    "finetune": [*_TRAINING, "--tied"],
    "pointer": "--data --model --save --cuda --bptt --window --theta --lambdasm".split(),
    "generate": """
        --data --model --checkpoint --outf --words --seed --cuda --temperature --log-interval
    """.split(),
}

# A preset sets these flags too, but a resumed run keeps its own values.
_PRESET_DEFAULTS = {"data", "save", "seed"}

# The flag that sets each part of a model's configuration.
ARCHITECTURE = {"model": "rnn_type", "emsize": "ninp", "nhid": "nhid", "nlayers": "nlayers"}

_TOO_LARGE = 2**63  # for PyTorch's whole numbers


class Flag(NamedTuple):
    """A flag as it was added: its first long name, its default, and the flags it excludes."""

    name: str
    default: Any
    either: str

    def words(self, value: Any) -> list[str]:
        """The words of a command line that set the flag to `value`; none for an unset switch."""
        if isinstance(value, bool):
            return [] if value == self.default else [self.name]
        return [self.name, *map(str, value if isinstance(value, list) else [value])]


class Parser(argparse.ArgumentParser):
    """The parser of the script `stage`; a stage without published commands has no --preset.

    `parse_args` returns every flag's value, and in `given` the names of the flags that count as
    given: those on the command line and those of a preset, except `--data`, `--save` and `--seed`
    of a preset. With `--resume`, a preset sets only the architecture: the other flags come from the
    resumed run. The flags that a preset sets are printed.
    """

    def __init__(self, stage: str, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        # Python 3.14 colours the help with control characters by default.
        self.color = False
        self.classic = CLASSIC.get(stage, [])
        self.presets = presets.of_stage(stage)
        self.flags: dict[str, Flag] = {}
        self._groups: dict[str, Any] = {}
        self.add_argument(
            "--version", action="version", version=f"%(prog)s {VERSION} (torch {torch.__version__})"
        )
        if self.presets:
            self.flag(
                "",
                "--preset",
                choices=self.presets,
                help="use the published flags; flags given beside it override them",
            )

    def flag(
        self, group: str, *names: str, default: Any = None, either: str = "", **options: Any
    ) -> None:
        """Add a flag under the title `group` of the help; the other arguments are `add_argument`'s.

        Of the flags of a group with the same `either`, only one may be given. The default `metavar`
        depends on the type.
        """
        if options.get("type") in _METAVARS:
            options.setdefault("metavar", _METAVARS[options["type"]])
        place: Any = self
        if group:
            if group not in self._groups:
                self._groups[group] = self.add_argument_group(group)
            place = self._groups[group]
        if either:
            if either not in self._groups:
                self._groups[either] = place.add_mutually_exclusive_group()
            place = self._groups[either]
        if options.get("action") in ("store_true", "store_false"):
            default = options["action"] == "store_false"
        elif default not in (None, "", [-1]):
            options["help"] += f" (default: {default})"
        # The namespace holds only the flags given: `parse_known_args` adds the defaults.
        action = place.add_argument(*names, default=argparse.SUPPRESS, **options)
        self.flags[action.dest] = Flag(names[0], default, either)

    def group(self, title: str) -> Callable[..., None]:
        """`flag` for the flags under one title."""
        return functools.partial(self.flag, title)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        found, unknown = super().parse_known_args([self._expanded(w) for w in words], namespace)
        given, counted, preset = vars(found), {*vars(found)}, {}
        if "preset" in given:
            preset = self._given(self.presets[given["preset"]].split())
            if given.get("resume"):
                preset = {name: preset[name] for name in ARCHITECTURE if name in preset}
            counted |= preset.keys() - _PRESET_DEFAULTS
            said = self.spelled({name: preset[name] for name in preset.keys() - given.keys()})
            sys.stdout.write(f"--preset {given['preset']}: {said}\n")
        defaults = {name: flag.default for name, flag in self.flags.items()}
        return argparse.Namespace(**{**defaults, **preset, **given, "given": counted}), unknown

    def checked(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of `values` that belong to flags of this parser and are not None.

        Raises ValueError, naming the flag, for a value that no command line could give.
        """
        result = {}
        self.exit_on_error = False
        for name in values.keys() & self.flags.keys():
            value, flag = values[name], self.flags[name]
            try:
                given = {} if value == flag.default else self._given(flag.words(value))
            except argparse.ArgumentError as error:
                raise ValueError(f"{flag.name}: {error.message}") from error
            if value is not None and given.get(name, flag.default) != value:
                raise ValueError(f"{flag.name}: it is {value!r}")
            if value is not None:
                result[name] = value
        self.exit_on_error = True
        return result

    def spelled(self, values: Mapping[str, Any]) -> str:
        """Flags and their values as on a command line, sorted by name."""
        return " ".join(w for name in sorted(values) for w in self.flags[name].words(values[name]))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists every flag)\n")

    def _given(self, words: Sequence[str]) -> dict[str, Any]:
        """What `words` set, and nothing else; raises ArgumentError unless `exit_on_error`."""
        return vars(super().parse_known_args([self._expanded(word) for word in words])[0])

    def _expanded(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag == "--" or flag in self.classic:
            return word
        matches = [classic for classic in self.classic if classic.startswith(flag)]
        return f"{matches[0]}{equals}{value}" if len(matches) == 1 else word


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as a dictionary of plain values, to be kept in a model file."""
    return {name: value for name, value in vars(args).items() if name != "given"}


# The types of flags. Each raises ArgumentTypeError.


def positive_int(text: str) -> int:
    """A whole number of 1 or more."""
    return _number(text, int, lambda n: 1 <= n < _TOO_LARGE, "a whole number of 1 or more")


def natural(text: str) -> int:
    """A whole number of 0 or more."""
    return _number(text, int, lambda n: 0 <= n < _TOO_LARGE, "a whole number of 0 or more")


def seed(text: str) -> int:
    """A seed that PyTorch and numpy both take."""
    return _number(text, int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1")


def vocabulary_size(text: str) -> int:
    """A whole number of 3 or more."""
    return _number(text, int, lambda n: 3 <= n < _TOO_LARGE, "a whole number of 3 or more")


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


def _number(text: str, kind: Callable[[str], Any], fits: Callable[[Any], bool], what: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        if kind is int and value is not None and value >= _TOO_LARGE:
            what += " and below 2**63"
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
    return value


_METAVARS = {
    **dict.fromkeys((positive_int, natural, seed, vocabulary_size), "N"),
    **dict.fromkeys((positive, non_negative, sharpness), "X"),
    probability: "P",
}
