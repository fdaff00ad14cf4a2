"""The parser of every script: one-line errors, classic abbreviations, presets, model files."""

import argparse
import difflib
import functools
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from cli import presets
from cli.types import METAVARS, natural, non_negative
from utils import ToolkitError

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

# The type of a flag by that of its default.
_TYPES = {int: natural, float: non_negative}

# A preset sets these flags too, but what a model file says goes before them.
_PRESET_DEFAULTS = {"data", "save", "seed"}


@dataclass
class Flag:
    """A flag as it was added; `Parser.flag` describes the fields."""

    name: str
    group: str
    default: Any
    belongs: str
    either: str
    config: str
    fixed: str
    needs: str
    beside: Sequence[str]
    derive: Callable[[Mapping[str, Any]], Any] | None
    action: argparse.Action

    def words(self, value: Any) -> list[str]:
        """The words of a command line that set the flag to `value`; none for an unset switch."""
        if isinstance(value, bool):
            return [] if value == self.default else [self.name]
        return [self.name, *map(str, value if isinstance(value, list) else [value])]

    def check(self, value: Any) -> None:
        """Raise ValueError or ArgumentTypeError for a recorded value that no command line gives."""
        for part in value if isinstance(value, list) else [value]:
            if self.action.type is not None:
                self.action.type(str(part))

    def configured(self, file: "Recorded") -> Any:
        """The value in a file's configuration; files from before the flag have its default."""
        return file.config.get(self.config, self.default)


@dataclass
class Given:
    """The flags that a command line gives, and those of its preset."""

    line: dict[str, Any]
    preset: dict[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """A flag's value, None if it is not given."""
        return self.line.get(name, self.preset.get(name, default))


@dataclass
class Recorded:
    """What the model file `path` says about flags: its configuration and those of its training.

    `use` is what the file is for: "resume", "finetune", or "start" for a new run and for scoring.
    `fixed` has, by name, the reasons why flags cannot be changed.
    """

    path: str
    use: str
    config: Mapping[str, Any]
    args: Mapping[str, Any]
    fixed: dict[str, str] = field(default_factory=dict)


class _Help(argparse.RawDescriptionHelpFormatter):
    """The help with the description's paragraphs wrapped for the terminal; tables stay."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            part if "  " in part else textwrap.fill(part, width) for part in paragraphs
        )


class Parser(argparse.ArgumentParser):
    """The parser of the script `stage`; a stage without published commands has no --preset.

    `given` reads a command line, and `settle` makes the final flags of it and of a model file;
    `parse_args` does both, without a file.
    """

    def __init__(self, stage: str, description: str | None) -> None:
        own = [f"  python {line}" for line in presets.EXAMPLES if line.startswith(f"{stage}.py ")]
        super().__init__(
            description=description,
            epilog="\n".join(["examples:", *own]) if own else None,
            formatter_class=_Help,
        )
        # Python 3.14 colours the help with control characters by default.
        self.color = False
        self.stage = stage
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
                belongs="call",
                choices=self.presets,
                metavar="NAME",
                help="use the published flags of a row of docs/commands.md, or those of a small "
                f"model: {', '.join(self.presets)}; flags given beside it override them",
            )

    def flag(
        self,
        group: str,
        name: str,
        default: Any = None,
        help: str = "",
        *,
        belongs: str = "training",
        either: str = "",
        config: str = "",
        fixed: str = "",
        needs: str = "",
        beside: Sequence[str] = (),
        derive: Callable[[Mapping[str, Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        """Add a flag under the title `group` of the help; other `options` are `add_argument`'s.

        The type is by default that of the default value: False is a switch, and a number may be
        anything from 0 on.

        `belongs` says which later calls take the flag's value from a model file, unless it is
        given there: "training" are finetune.py and a resumed run, "run" is a resumed run alone, and
        "call" is none. A flag with `config`, the name of an argument of `model.make_network`,
        belongs to the architecture: every stage takes it from the file and refuses another value.
        `fixed` is the reason why a resumed run cannot change the flag. `derive` computes the
        default from the other flags. Of the flags of a group with the same `either`, only one may
        be given. A flag without effect unless the flag `needs` is given, such as "--cache", or
        beside one of the flags `beside`, is refused there. The default `metavar` depends on the
        type.
        """
        if isinstance(default, bool):
            options.setdefault("action", "store_false" if default else "store_true")
        elif type(default) in _TYPES:
            options.setdefault("type", _TYPES[type(default)])
        if options.get("type") in METAVARS:
            options.setdefault("metavar", METAVARS[options["type"]])
        place: Any = self
        if group:
            if group not in self._groups:
                self._groups[group] = self.add_argument_group(group)
            place = self._groups[group]
        if either:
            if either not in self._groups:
                self._groups[either] = place.add_mutually_exclusive_group()
            place = self._groups[either]
        if not isinstance(default, bool) and default not in (None, "", [-1], []):
            help += f" (default: {default})"
        # The parser itself sets no defaults, so that it returns the flags given.
        action = place.add_argument(name, default=argparse.SUPPRESS, help=help, **options)
        self.flags[action.dest] = Flag(
            name, group, default, belongs, either, config, fixed, needs, beside, derive, action
        )

    def group(self, title: str, **common: Any) -> Callable[..., None]:
        """`flag` for the flags under one title, with `common` options."""
        return functools.partial(self.flag, title, **common)

    def given(self, argv: Sequence[str] | None = None) -> Given:
        """Read a command line, by default the process's, and its preset."""
        line = self._read(sys.argv[1:] if argv is None else argv)
        preset = self._read(self.presets[line["preset"]].split()) if "preset" in line else {}
        self._check_effects(line, preset)
        if line.get("resume"):
            # The other flags come from the resumed run.
            preset = {name: value for name, value in preset.items() if self.flags[name].config}
        return Given(line, preset)

    def settle(self, given: Given, file: Recorded | None = None) -> argparse.Namespace:
        """The final value of every flag, from the command line, its preset and a model file.

        Prints what the preset and the file add. Raises ToolkitError if a flag that was given cannot
        take effect.
        """
        if "preset" in given.line:
            added = given.preset.keys() - given.line.keys()
            words = self.spelled({name: given.preset[name] for name in added})
            print(f"--preset {given.line['preset']}: {words}")
        chosen = {**given.preset, **given.line}
        counts = given.line.keys() | given.preset.keys() - _PRESET_DEFAULTS
        counted = [name for name in self.flags if name in counts]
        values = {name: flag.default for name, flag in self.flags.items()} | chosen
        recorded = {}
        if file is not None:
            self._check_given({name: chosen[name] for name in counted}, file)
            recorded = self._recorded(counted, values, file)
        values |= recorded
        for name, flag in self.flags.items():
            if flag.derive and name not in counted and name not in recorded:
                values[name] = flag.derive(values)
                if values[name] != flag.default:
                    print(f"{flag.name} is {values[name]:g} here, not {flag.default:g}")
        return argparse.Namespace(**values)

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        return self.settle(self.given(args))

    def spelled(self, values: Mapping[str, Any]) -> str:
        """Flags and their values as on a command line, sorted by name."""
        return " ".join(w for name in sorted(values) for w in self.flags[name].words(values[name]))

    def of_group(self, title: str, args: argparse.Namespace) -> str:
        """The flags of a group that have a value, as on a command line."""
        own = {name: value for name, value in vars(args).items() if value not in (None, "")}
        return self.spelled({n: v for n, v in own.items() if self.flags[n].group == title})

    def by_group(self, args: argparse.Namespace) -> str:
        """The flags that have a value, a line for each group of the help."""
        titles = dict.fromkeys(flag.group for flag in self.flags.values())
        groups = {title: self.of_group(title, args) for title in titles}
        return "".join(f"\n  {t or 'options'}: {words}" for t, words in groups.items() if words)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: --"):
            flag = message.split()[2].partition("=")[0]
            known = self._option_string_actions
            close = difflib.get_close_matches(flag.replace("_", "-"), known, n=1, cutoff=0.7)
            message += f"; did you mean {close[0]}?" if close else ""
        self.exit(2, f"{self.prog}: error: {message} (--help lists every flag)\n")

    def _check_effects(self, line: Collection[str], preset: Collection[str]) -> None:
        """End with an error for a flag of a command line or its preset that has no effect there."""
        names = {self.flags[name].name for name in (*line, *preset)}
        for dest in (*line, *preset):
            flag, origin = self.flags[dest], "" if dest in line else " of the preset"
            if flag.needs and flag.needs not in names:
                self.error(f"{flag.name}{origin} has no effect without {flag.needs}: add it")
            for other in names.intersection(flag.beside):
                self.error(f"{flag.name}{origin} has no effect with {other}: leave one out")

    def _check_given(self, given: Mapping[str, Any], file: Recorded) -> None:
        """Raise ToolkitError for a flag that contradicts the file."""
        for name, value in given.items():
            flag = self.flags[name]
            if flag.config and value != flag.configured(file):
                raise ToolkitError(
                    f"--{name} {value} contradicts {file.path}, whose model has {name} "
                    f"{flag.configured(file)}: leave the flag out or name another model file"
                )
            reason = file.fixed.get(name) or flag.fixed
            recorded = file.args.get(name)
            if file.use == "resume" and reason and value != recorded:
                raise ToolkitError(
                    f"--{name} {value} contradicts {file.path}, which was trained with "
                    f"{recorded}, and {reason}: leave the flag out, or train from the start "
                    "without --resume"
                )

    def _recorded(
        self, given: Sequence[str], values: Mapping[str, Any], file: Recorded
    ) -> dict[str, Any]:
        """The flags to take from the file, where they are not `given`; `values` are the others."""
        excluded = {self.flags[name].either for name in given} - {""}
        model = {n: flag.configured(file) for n, flag in self.flags.items() if flag.config}
        kinds = {"resume": ("training", "run"), "finetune": ("training",)}.get(file.use, ())
        # The configuration has the dropouts.
        recorded = {**file.args, **file.config} if file.use == "finetune" else file.args
        taken = {
            name: recorded[name]
            for name, flag in self.flags.items()
            if flag.belongs in kinds and not flag.config and flag.either not in excluded
            if name not in given and recorded.get(name) is not None
        }
        for name, value in taken.items():
            try:
                self.flags[name].check(value)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise ToolkitError(
                    f"{file.path} records {value} for --{name} ({error}): give that flag"
                ) from error
        if file.use == "finetune":
            if file.args.get("optimizer", "sgd") != "sgd":
                taken.pop("lr", None)  # another optimiser's rate is not one of SGD's
            print(f"From {file.path}: {self.spelled(taken)}")
        split = file.args.get("split")
        if "split" in self.flags and split and "split" not in given:
            folder = Path(taken.get("data", values["data"]))
            # The file's split is for its own text, which is a train.txt alone.
            if not (folder / "valid.txt").exists() and not (folder / "test.txt").exists():
                taken["split"] = split
        if file.use == "resume" and "save" not in given:
            if file.path.endswith(".before-finetune"):
                raise ToolkitError(
                    f"{file.path} is finetune.py's copy and stays as it is: name another file for "
                    "the resumed run with --save"
                )
            taken["save"] = file.path
        return model | taken

    def _read(self, words: Sequence[str]) -> dict[str, Any]:
        """What `words` set, and nothing else."""
        return vars(super().parse_args([self._expanded(word) for word in words]))

    def _expanded(self, word: str) -> str:
        """A word of the command line; a flag, with - or _ within it, gets its own spelling."""
        flag, equals, value = word.partition("=")
        known = self._option_string_actions
        if not flag.startswith("--") or flag == "--" or flag in known:
            return word
        hyphens = flag.replace("_", "-")
        spellings = {name.replace("_", "-"): name for name in known}
        other = {"--save": "--checkpoint", "--checkpoint": "--save"}.get(flag)
        exact = spellings.get(hyphens) or (other if other in known else None)
        classic = [name for name in self.classic if name.replace("_", "-").startswith(hyphens)]
        every = [name for spelled, name in spellings.items() if spelled.startswith(hyphens)]
        for matches in ([exact] if exact else [], classic, every):
            if len(matches) == 1:
                return f"{matches[0]}{equals}{value}"
        return word
