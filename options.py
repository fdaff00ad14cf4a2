"""Command lines: the flags several scripts share, which of them were given, and how errors end."""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import parallel
from model import RNN_TYPES
from safekeeping import Stopped
from utils import ToolkitError

# The flags of the original, script by script. What was an unambiguous abbreviation among them stays
# one, however many flags are added.
_TRAINING = """
    --data --model --emsize --nhid --nlayers --lr --clip --epochs --batch_size --bptt --dropout
    --dropouth --dropouti --dropoute --wdrop --seed --nonmono --cuda --log-interval --save --alpha
    --beta --wdecay
""".split()
CLASSIC = {
    "main": [*_TRAINING, "--resume", "--optimizer", "--when"],
    "finetune": [*_TRAINING, "--tied"],
    "pointer": """
        --data --model --save --cuda --bptt --window --theta --lambdasm
    """.split(),
    "generate": """
        --data --model --checkpoint --outf --words --seed --cuda --temperature --log-interval
    """.split(),
}

# Which flag sets which part of a model's configuration.
ARCHITECTURE = {"model": "rnn_type", "emsize": "ninp", "nhid": "nhid", "nlayers": "nlayers"}
DROPOUTS = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")


class Parser(argparse.ArgumentParser):
    """An argument parser that says an error in one line and keeps the classic abbreviations.

    `classic` is the list of the original's flags.
    """

    def __init__(self, classic: Sequence[str], description: str) -> None:
        super().__init__(
            description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        self.classic = classic

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists every flag)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._expanded(arg) for arg in args], namespace)

    def _expanded(self, arg: str) -> str:
        flag, equals, value = arg.partition("=")
        if not flag.startswith("--") or flag == "--" or flag in self.classic:
            return arg
        matches = [classic for classic in self.classic if classic.startswith(flag)]
        return f"{matches[0]}{equals}{value}" if len(matches) == 1 else arg


def parse(build_parser: Callable[[], Parser], argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and add `given`: the set of flags that stood on the command line."""
    args = build_parser().parse_args(argv)
    parser = build_parser()
    # Not a string: argparse would convert that as if it had been given.
    absent = object()
    parser.set_defaults(**dict.fromkeys(vars(args), absent))
    given = vars(parser.parse_args(argv))
    args.given = {name for name, value in given.items() if value is not absent}
    return args


def run(main: Callable[[], None]) -> NoReturn:
    """Call a script's `main` and end the process.

    A ToolkitError becomes one line on stderr and exit status 1; a signal that was obeyed one line
    and 128 + its number.
    """
    # Log lines reach a file or a pipe as they are made.
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main()
    except ToolkitError as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {error}\n")
        parallel.leave(1)
    except Stopped as stopped:
        # The terminal may be what has gone; the status still says it.
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{Path(sys.argv[0]).name}: {stopped}\n")
        parallel.leave(128 + stopped.signum)
    except KeyboardInterrupt:
        parallel.leave(130)
    parallel.leave(0)


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as a dictionary of plain values, to be kept in a model file."""
    return {name: value for name, value in vars(args).items() if name != "given"}


def continue_from(
    args: argparse.Namespace, recorded: Mapping[str, Any], parser: Parser, path: str
) -> None:
    """For a resumed run: take every flag that was not given from the run that is resumed.

    Raises ToolkitError if the file `path` recorded what the flag does not take.
    """
    here = {"given", "resume", "save", "cuda", "max_batches", "keep"}
    for action in parser._actions:
        name = action.dest
        if name not in recorded or name in args.given | here or name not in vars(args):
            continue
        value = recorded[name]
        try:
            for one in value if isinstance(value, list) else [value]:
                if one is not None and action.type is not None:
                    action.type(str(one))
                if action.choices is not None and one not in action.choices:
                    raise ValueError(f"it is none of {', '.join(action.choices)}")
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ToolkitError(
                f"{path} is damaged (its {action.option_strings[0]}: {error}): give the flag, or "
                "train again with main.py"
            ) from error
        setattr(args, name, value)


def check_resumable(args: argparse.Namespace, training: Mapping[str, Any], path: str) -> None:
    """Raise ToolkitError if a flag that was given contradicts the training state in `path`."""
    reasons = {
        "optimizer": "its state is that optimiser's",
        "seed": "the random numbers go on from the file's states",
    }
    if training["position"] is not None:
        reasons["batch_size"] = f"it is in the middle of epoch {training['epoch'] + 1}"
    for name, reason in reasons.items():
        old = training["args"].get(name)
        if name in args.given and getattr(args, name) != old:
            raise ToolkitError(
                f"--{name} {getattr(args, name)} contradicts {path}, which was trained with {old}, "
                f"and {reason}: leave the flag out, or train from the start without --resume"
            )


def check_architecture(args: argparse.Namespace, config: Mapping[str, Any], path: str) -> None:
    """Raise ToolkitError if a flag that was given contradicts the model in the file `path`."""
    for flag, key in ARCHITECTURE.items():
        if flag in args.given and getattr(args, flag) != config[key]:
            raise ToolkitError(
                f"--{flag} {getattr(args, flag)} contradicts {path}, whose model has {flag} "
                f"{config[key]}: leave the flag out or name another model file"
            )


def given_dropouts(args: argparse.Namespace) -> dict[str, float]:
    """The dropout rates that were given on the command line."""
    return {name: getattr(args, name) for name in DROPOUTS if name in args.given}


def positive_int(text: str) -> int:
    """A whole number of 1 or more."""
    return _number(text, int, lambda n: n >= 1, "a whole number of 1 or more")


def natural(text: str) -> int:
    """A whole number of 0 or more."""
    return _number(text, int, lambda n: n >= 0, "a whole number of 0 or more")


def seed(text: str) -> int:
    """A seed that PyTorch and numpy both take."""
    return _number(text, int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2**63 - 1")


def positive(text: str) -> float:
    """A finite number above 0."""
    return _number(text, float, lambda x: 0 < x < math.inf, "a number above 0")


def non_negative(text: str) -> float:
    """A finite number of 0 or more."""
    return _number(text, float, lambda x: 0 <= x < math.inf, "a number of 0 or more")


def probability(text: str) -> float:
    """A number in [0, 1)."""
    return _number(text, float, lambda x: 0 <= x < 1, "in [0, 1)")


def _number(text: str, kind: Callable[[str], Any], fits: Callable[[Any], bool], what: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
    return value


def add_data(parser: Parser, default: str) -> None:
    """--data."""
    parser.add_argument(
        "--data", default=default, help="folder of the corpus: train.txt, valid.txt and test.txt"
    )


def add_model(parser: Parser) -> None:
    """--model."""
    parser.add_argument(
        "--model",
        default="LSTM",
        choices=RNN_TYPES,
        help="type of recurrent cell; later stages take it from the model file",
    )


def add_sizes(parser: Parser) -> None:
    """The sizes of the network."""
    group = parser.add_argument_group("network")
    group.add_argument("--emsize", type=positive_int, default=400, help="size of word embeddings")
    group.add_argument("--nhid", type=positive_int, default=1150, help="hidden units per layer")
    group.add_argument("--nlayers", type=positive_int, default=3, help="number of layers")


def add_training(parser: Parser) -> None:
    """Optimisation and what is said of it."""
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--lr", type=positive, default=30.0, help="initial learning rate")
    add("--clip", type=non_negative, default=0.25, help="gradient norm to clip at, 0 for none")
    add("--epochs", type=positive_int, default=8000, help="upper epoch limit")
    add("--batch_size", type=positive_int, default=80, metavar="N", help="columns of a batch")
    add("--bptt", type=positive_int, default=70, help="base sequence length, in tokens")
    add("--nonmono", type=natural, default=5, help="epochs the NT-ASGD trigger looks back past")
    add("--log-interval", type=positive_int, default=200, metavar="N", help="batches per log line")
    group.add_argument(
        "--max-seq-len", type=positive_int, metavar="N", help="cap on the random sequence length"
    )


def add_regularisers(parser: Parser) -> None:
    """Dropouts, activation penalties and weight decay."""
    group = parser.add_argument_group("regularisation")
    add = group.add_argument
    add("--dropout", type=probability, default=0.4, help="dropout on the last layer's output")
    add("--dropouth", type=probability, default=0.3, help="dropout between layers")
    add("--dropouti", type=probability, default=0.65, help="dropout on the embedded input")
    add("--dropoute", type=probability, default=0.1, help="dropout of whole words, embedding rows")
    add("--wdrop", type=probability, default=0.5, help="weight drop on the recurrent weights")
    add(
        "--alpha", type=non_negative, default=2.0, help="activation regularisation (AR), 0 for none"
    )
    add("--beta", type=non_negative, default=1.0, help="temporal AR (TAR), 0 for none")
    add("--wdecay", type=non_negative, default=1.2e-6, help="weight decay on every parameter")


def add_save(parser: Parser, help: str) -> None:
    """--save."""
    parser.add_argument("--save", default="model.pt", help=help)


def add_safety(parser: Parser) -> None:
    """--resume, --save-every and --deterministic."""
    parser.add_argument(
        "--resume",
        default="",
        metavar="FILE",
        help="model file of an earlier run to go on from, with its flags where none are given",
    )
    parser.add_argument(
        "--save-every",
        type=non_negative,
        default=300.0,
        metavar="SECONDS",
        help="also save within an epoch, every so many seconds",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits for the same seed on a GPU too, at some cost in speed",
    )


def add_seed(parser: Parser) -> None:
    """--seed."""
    parser.add_argument("--seed", type=seed, default=1111, help="random seed")


def add_device(parser: Parser) -> None:
    """--cuda and --no-cuda."""
    parser.add_argument(
        "--cuda",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="demand a CUDA device, or stay on the CPU; without either, CUDA when there is one",
    )


def add_max_batches(parser: Parser, what: str) -> None:
    """--max-batches."""
    parser.add_argument(
        "--max-batches", type=positive_int, metavar="N", help=f"stop after N {what}, for a trial"
    )
