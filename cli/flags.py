"""Command lines: shared flags and presets, which flags were given, and how errors end."""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from cli.progress import Bar
from cli.signals import Output, Stopped
from data import SPLITS, Corpus, Dictionary
from model import RNN_TYPES
from training import parallel
from utils import ToolkitError, keep_memory

VERSION = "0.1.0"

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

# The published commands, stage by stage, as flags. What is missing was never published.
_PTB_QRNN = """
    --model QRNN --batch_size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 --emsize 400
    --dropouth 0.3 --dropouti 0.4 --data data/penn --save PTB.pt
"""
_WT2_QRNN = """
    --epochs 500 --data data/wikitext-2 --clip 0.25 --dropouti 0.4 --dropouth 0.2 --nhid 1550
    --nlayers 4 --seed 4002 --model QRNN --wdrop 0.1 --batch_size 40 --save WT2.pt
"""
_PTB_LSTM = """
    --batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 --epochs 500
    --save PTB.pt
"""
_WT2_LSTM = "--epochs 750 --data data/wikitext-2 --save WT2.pt --dropouth 0.2 --seed 1882"
_PTB_CACHE = "--data data/penn --save PTB.pt --lambdasm 0.1 --theta 1.0 --window 500 --bptt 5000"
_WT2_CACHE = """
    --save WT2.pt --lambdasm 0.1279 --theta 0.662 --window 3785 --bptt 2000 --data data/wikitext-2
"""
PRESETS = {
    "main": {
        "ptb-lstm": _PTB_LSTM,
        "ptb-qrnn": _PTB_QRNN + "--seed 9001 --epochs 550",
        "wt2-lstm": _WT2_LSTM,
        "wt2-qrnn": _WT2_QRNN,
        "ptbc": """
            --epochs 500 --nlayers 3 --emsize 200 --nhid 1000 --alpha 0 --beta 0 --dropoute 0
            --dropouth 0.25 --dropouti 0.1 --dropout 0.1 --wdrop 0.5 --wdecay 1.2e-6 --bptt 150
            --batch_size 128 --optimizer adam --lr 2e-3 --data data/pennchar --save PTBC.pt
            --when 300 400
        """,
        "enwik8": """
            --epochs 50 --nlayers 3 --emsize 400 --nhid 1840 --alpha 0 --beta 0 --dropoute 0
            --dropouth 0.1 --dropouti 0.1 --dropout 0.4 --wdrop 0.2 --wdecay 1.2e-6 --bptt 200
            --batch_size 128 --optimizer adam --lr 1e-3 --data data/enwik8 --save ENWIK8.pt
            --when 25 35
        """,
        "wt103": """
            --epochs 14 --nlayers 4 --emsize 400 --nhid 2500 --alpha 0 --beta 0 --dropoute 0
            --dropouth 0.1 --dropouti 0.1 --dropout 0.1 --wdrop 0 --wdecay 0 --bptt 140
            --batch_size 60 --optimizer adam --lr 1e-3 --data data/wikitext-103
            --save WT103.12hr.QRNN.pt --when 12 --model QRNN
        """,
    },
    "finetune": {
        "ptb-lstm": _PTB_LSTM,
        "ptb-qrnn": _PTB_QRNN + "--seed 404 --epochs 300",
        "wt2-lstm": _WT2_LSTM,
        "wt2-qrnn": _WT2_QRNN,
    },
    "pointer": {
        "ptb-lstm": _PTB_CACHE,
        "ptb-qrnn": _PTB_CACHE + " --model QRNN",
        "wt2-lstm": _WT2_CACHE,
        "wt2-qrnn": _WT2_CACHE + "--model QRNN",
    },
}
# What a preset fills in but does not insist on: a resumed run keeps its own.
_PRESET_DEFAULTS = {"data", "save", "seed"}

# Which flag sets which part of a model's configuration.
ARCHITECTURE = {"model": "rnn_type", "emsize": "ninp", "nhid": "nhid", "nlayers": "nlayers"}
_TOO_LARGE = 2**63  # for the whole numbers of PyTorch
DROPOUTS = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", False) or action.default == [-1]:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that says an error in one line and keeps the classic abbreviations.

    `classic` is the list of the original's flags. Where it is that of a stage with published
    commands there is a `--preset`.
    """

    def __init__(self, classic: Sequence[str], description: str | None) -> None:
        super().__init__(description=description, formatter_class=_Formatter)
        self.classic = classic
        self._groups: dict[str, Any] = {}
        stage = next((name for name, flags in CLASSIC.items() if flags == classic), "")
        self.presets: Mapping[str, str] = PRESETS.get(stage, {})
        self.add_argument(
            "--version", action="version", version=f"%(prog)s {VERSION} (torch {torch.__version__})"
        )
        if self.presets:
            self.add_argument(
                "--preset",
                type=self._preset,
                metavar="NAME",
                help=f"take the published flags: {', '.join(self.presets)}; any flag given beside "
                "it counts instead",
            )

    def group(self, title: str) -> Any:
        """The group of flags under `title` in the help, made when first asked for."""
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title]

    def _preset(self, name: str) -> str:
        if name not in self.presets:
            known = ", ".join(self.presets)
            if any(name in presets for presets in PRESETS.values()):
                raise argparse.ArgumentTypeError(
                    f"nothing was published for {name} at this stage, only for {known}"
                )
            raise argparse.ArgumentTypeError(f"must be one of {known}, not {name!r}")
        return name

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
    """Parse, with the flags of a preset, and add `given`: the flags that stood on the command line.

    A preset's flags, which any other flag overrides, are printed; they count as given, so that an
    architecture that contradicts a model file is an error, but for --data, --save and --seed. In a
    resumed run the architecture alone counts so: the rest comes from the run it goes on from.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv)
    args.given = _given(build_parser, argv, args)
    if getattr(args, "preset", None) is None:
        return args
    flags = build_parser().presets[args.preset].split()
    given = args.given
    args = build_parser().parse_args([*flags, *argv])
    preset = _given(build_parser, flags, args)
    if getattr(args, "resume", None):
        preset &= ARCHITECTURE.keys()
    args.given = given | (preset - _PRESET_DEFAULTS)
    values = {name: getattr(args, name) for name in sorted(preset - given)}
    said = " ".join(f"--{name} {_as_flag(value)}" for name, value in values.items())
    sys.stdout.write(f"--preset {args.preset}: {said}\n")
    return args


def _given(
    build_parser: Callable[[], Parser], argv: Sequence[str], args: argparse.Namespace
) -> set[str]:
    """The names, among those in `args`, that `argv` sets."""
    parser = build_parser()
    # Not a string: argparse would convert that as if it had been given.
    absent = object()
    parser.set_defaults(**dict.fromkeys((name for name in vars(args) if name != "given"), absent))
    parsed = vars(parser.parse_args(argv))
    return {name for name, value in parsed.items() if value is not absent}


def _as_flag(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else f"{value}"


def run(main: Callable[[], None]) -> NoReturn:
    """Call a script's `main` and end the process.

    A ToolkitError becomes one line on stderr and exit status 1; a signal that was obeyed one line
    and 128 + its number.
    """
    # None where the caller has closed them.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    # Log lines reach a file or a pipe as they are made, and a word or a file's name that the
    # terminal cannot show ends nothing.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    keep_memory()
    try:
        output = Output(sys.stdout)
        with contextlib.redirect_stdout(output):
            main()
        if output.failure:
            raise ToolkitError(output.failure)
    except ToolkitError as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {error}\n")
        parallel.leave(1)
    except OSError as error:
        if error.filename is None:
            raise
        sys.stderr.write(
            f"{Path(sys.argv[0]).name}: error: cannot use {error.filename} ({error.strerror}): "
            "name another, or change what is in its way\n"
        )
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
    here = {"given", "resume", "save", "cuda", "max_batches", "keep", "split"}
    for group in parser._mutually_exclusive_groups:
        flags = {action.dest for action in group._group_actions}
        if flags & args.given:
            here |= flags
    for action in parser._actions:
        name = action.dest
        if name not in recorded or name in args.given | here or name not in vars(args):
            continue
        value = recorded[name]
        try:
            several = action.nargs not in (None, 0)
            kind = bool if action.nargs == 0 else str
            if value is not None and isinstance(value, list) != several:
                raise ValueError(f"it is {value!r}")
            for one in value if isinstance(value, list) else [value]:
                if one is not None and action.type is None and not isinstance(one, kind):
                    raise ValueError(f"it is {value!r}")
                if one is None and action.default is None:
                    continue
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


def dropouts(args: argparse.Namespace) -> dict[str, float]:
    """The dropout rates, as the model takes them."""
    return {name: getattr(args, name) for name in DROPOUTS}


def take_architecture(args: argparse.Namespace, config: Mapping[str, Any]) -> None:
    """Take the cell and the sizes from the model of a file, which no flag contradicts."""
    for flag, key in ARCHITECTURE.items():
        setattr(args, flag, config[key])


def take_dropouts(args: argparse.Namespace, config: Mapping[str, Any]) -> None:
    """Take every dropout rate that was not given from the model of a file."""
    for name in DROPOUTS:
        if name not in args.given:
            setattr(args, name, config[name])


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
    """A number from 0 to 1e30: beyond that, products with it leave float32."""
    return _number(text, float, lambda x: 0 <= x <= 1e30, "a number from 0 to 1e30")


def probability(text: str) -> float:
    """A number in [0, 1)."""
    return _number(text, float, lambda x: 0 <= x < 1, "in [0, 1)")


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


def add_data(parser: Parser, default: str) -> None:
    """--data."""
    parser.group("files").add_argument(
        "--data",
        default=default,
        metavar="FOLDER",
        help="the corpus: train.txt, valid.txt and test.txt, tokens apart by white space",
    )


def fraction(text: str) -> float:
    """A number above 0 and below 1."""
    return _number(text, float, lambda x: 0 < x < 1, "above 0 and below 1")


def add_split(parser: Parser) -> None:
    """--split."""
    parser.group("files").add_argument(
        "--split",
        type=fraction,
        nargs=2,
        metavar=("VALID", "TEST"),
        help="for a folder with a train.txt alone: the shares of its lines, at its end, that "
        "become valid and test, such as 0.05 0.05; later stages take it from the model file",
    )


def add_vocabulary(parser: Parser) -> None:
    """--vocab-size and --min-count."""
    group = parser.group("files").add_mutually_exclusive_group()
    group.add_argument(
        "--vocab-size",
        type=vocabulary_size,
        metavar="N",
        help="keep the N most frequent words of train.txt, <unk> and <eos> among them, and read "
        "the others as <unk>; PTB has 10,000",
    )
    group.add_argument(
        "--min-count",
        type=positive_int,
        metavar="N",
        help="keep the words that occur N times or more in train.txt, and read the others as "
        "<unk>; WikiText-2 and -103 have 3",
    )


def read_corpus(
    args: argparse.Namespace,
    say: Callable[[str], None],
    dictionary: Dictionary | None = None,
    recorded: Mapping[str, Any] | None = None,
    first: bool = True,
) -> Corpus:
    """The corpus of --data in the vocabulary `dictionary` of a model, or its own.

    `recorded` are the flags a model file holds: their --split counts where none is given and the
    folder has a train.txt alone, and goes into `args`. On a terminal a bar shows the reading, on
    the `first` process. `say` is told what is read as <unk>. Raises CorpusError.
    """
    folder = Path(args.data)
    parts = [folder / f"{name}.txt" for name in SPLITS]
    split = args.split
    if split is None and recorded is not None and not any(part.exists() for part in parts[1:]):
        # Set, so that the file a later stage writes records it in turn.
        split = recorded.get("split")
        shares = isinstance(split, list) and [type(share) for share in split] == [float, float]
        if split is not None and not shares:
            raise ToolkitError(f"the model file is damaged (its split is {split!r}): give --split")
        args.split = split
    size = sum(part.stat().st_size for part in parts if part.is_file())
    with Bar(size, "reading", "B", wanted=first) as bar:
        corpus = Corpus(folder, dictionary, split=split, tick=bar.update)
    if corpus.unknown:
        say(
            f"| {corpus.unknown} of the {len(corpus)} tokens of {args.data} "
            f"({corpus.unknown / len(corpus):.2%}) are not in the model's vocabulary: read as <unk>"
        )
    if dictionary is None and (args.vocab_size or args.min_count):
        fewer = corpus.with_fewer_words(args.vocab_size, args.min_count or 0)
        kept = fewer.dictionary.word2idx
        rare = sum(word not in kept for word in corpus.dictionary.idx2word)
        say(f"| vocabulary of {len(kept)} words, {rare} rarer ones left out")
        return fewer
    return corpus


def add_model(parser: Parser) -> None:
    """--model."""
    parser.group("network").add_argument(
        "--model",
        default="LSTM",
        choices=RNN_TYPES,
        help="recurrent cell; later stages take it from the model file",
    )


def add_sizes(parser: Parser) -> None:
    """The sizes of the network."""
    add = parser.group("network").add_argument
    add(
        "--emsize",
        type=positive_int,
        default=400,
        metavar="N",
        help="size of a word's embedding, and of the last layer, whose weights are tied to it; "
        "published: 400, PTB characters 200",
    )
    add(
        "--nhid",
        type=positive_int,
        default=1150,
        metavar="N",
        help="hidden units of every layer but the last; published: LSTM 1150, QRNN 1550, "
        "PTB characters 1000, enwik8 1840, WikiText-103 2500",
    )
    add(
        "--nlayers",
        type=positive_int,
        default=3,
        metavar="N",
        help="recurrent layers; published: LSTM 3, QRNN 4",
    )


def add_training(parser: Parser) -> None:
    """Optimisation and what is said of it."""
    add = parser.group("training").add_argument
    add(
        "--lr",
        type=positive,
        default=30.0,
        metavar="RATE",
        help="learning rate, scaled for each batch by its length over --bptt; published: SGD 30, "
        "Adam 1e-3, PTB characters 2e-3",
    )
    add(
        "--clip",
        type=non_negative,
        default=0.25,
        metavar="NORM",
        help="gradient norm to clip at, 0 for none; published: 0.25, PTB QRNN 0.2",
    )
    add(
        "--epochs",
        type=positive_int,
        default=8000,
        metavar="N",
        help="passes over train.txt at most; published: PTB LSTM 500, WikiText-2 LSTM 750, "
        "QRNN 550 and 500",
    )
    add(
        "--batch_size",
        type=positive_int,
        default=80,
        metavar="N",
        help="columns of a batch, each a stream of text of its own; published: PTB 20, WikiText-2 "
        "LSTM 80, QRNN 40, characters 128, WikiText-103 60",
    )
    add(
        "--bptt",
        type=positive_int,
        default=70,
        metavar="N",
        help="base of the random sequence length, in tokens (variable length backpropagation "
        "sequences); published: 70, PTB characters 150, enwik8 200, WikiText-103 140",
    )
    add(
        "--nonmono",
        type=natural,
        default=5,
        metavar="N",
        help="epochs whose losses NT-ASGD's trigger leaves out (the paper's n, the non-monotone "
        "interval): averaging starts when validation is worse than the best before them; "
        "published: 5",
    )
    add(
        "--log-interval",
        type=positive_int,
        default=200,
        metavar="N",
        help="batches from one log line to the next",
    )
    lengths = parser.group("training").add_mutually_exclusive_group()
    lengths.add_argument(
        "--max-seq-len",
        type=positive_int,
        metavar="N",
        help="cap on the random sequence length, in tokens",
    )
    lengths.add_argument(
        "--fixed-length",
        action="store_true",
        help="make every sequence --bptt tokens long, as in the paper's ablation",
    )


def add_regularisers(parser: Parser) -> None:
    """Dropouts, activation penalties and weight decay."""
    add = parser.group("regularisation").add_argument
    add(
        "--dropout",
        type=probability,
        default=0.4,
        metavar="P",
        help="variational (locked) dropout on the last layer's output; published: 0.4, PTB "
        "characters and WikiText-103 0.1",
    )
    add(
        "--dropouth",
        type=probability,
        default=0.3,
        metavar="P",
        help="variational dropout between layers; published: PTB LSTM 0.25, QRNN 0.3, "
        "WikiText-2 0.2",
    )
    add(
        "--dropouti",
        type=probability,
        default=0.65,
        metavar="P",
        help="variational dropout on the word vectors; published: WikiText-2 LSTM 0.65, "
        "PTB and WikiText-2 QRNN 0.4, characters 0.1",
    )
    add(
        "--dropoute",
        type=probability,
        default=0.1,
        metavar="P",
        help="embedding dropout: a word is gone from the whole batch; published: 0.1, characters "
        "and WikiText-103 0",
    )
    add(
        "--wdrop",
        type=probability,
        default=0.5,
        metavar="P",
        help="weight drop (DropConnect) on the hidden-to-hidden weights, for the QRNN on its "
        "linear map; published: LSTM 0.5, QRNN 0.1, enwik8 0.2, WikiText-103 0",
    )
    add(
        "--alpha",
        type=non_negative,
        default=2.0,
        metavar="X",
        help="activation regularisation (AR): times the mean square of the last layer's dropped "
        "output, 0 for none; published: 2, characters and WikiText-103 0",
    )
    add(
        "--beta",
        type=non_negative,
        default=1.0,
        metavar="X",
        help="temporal activation regularisation (TAR): times the mean square of its change from "
        "step to step, 0 for none; published: 1, characters and WikiText-103 0",
    )
    add(
        "--wdecay",
        type=non_negative,
        default=1.2e-6,
        metavar="X",
        help="weight decay (L2) on every parameter; published: 1.2e-6, WikiText-103 0",
    )


def add_chunk(parser: Parser, default: int) -> None:
    """--bptt where nothing is trained."""
    parser.group("running").add_argument(
        "--bptt",
        type=positive_int,
        default=default,
        metavar="N",
        help="tokens computed at a time; the result does not depend on it",
    )


def add_cache(parser: Parser) -> None:
    """The continuous cache."""
    add = parser.group("cache").add_argument
    add(
        "--window",
        type=positive_int,
        default=3785,
        metavar="N",
        help="positions the cache looks back over, in tokens; published: PTB 500, WikiText-2 3785",
    )
    add(
        "--theta",
        type=sharpness,
        default=0.6625523432485668,
        metavar="X",
        help="sharpness of the cache's attention (the cache paper's theta), 0 is uniform over the "
        "window; published: PTB 1.0, WikiText-2 0.662",
    )
    add(
        "--lambdasm",
        type=probability,
        default=0.12785920428335693,
        metavar="P",
        help="weight of the cache in the mixture with the vocabulary's softmax (the cache paper's "
        "lambda); published: PTB 0.1, WikiText-2 0.1279",
    )
    add(
        "--cache-from-start",
        action="store_true",
        help="use the cache from the second token on and not only once the window is full",
    )


def add_save(parser: Parser, help: str) -> None:
    """--save."""
    parser.group("files").add_argument("--save", default="model.pt", metavar="FILE", help=help)


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


def add_logdir(parser: Parser) -> None:
    """--logdir."""
    parser.group("running").add_argument(
        "--logdir",
        default="",
        metavar="DIR",
        help="also write DIR/metrics.jsonl, and TensorBoard events where that is installed",
    )


def add_seed(parser: Parser) -> None:
    """--seed."""
    parser.group("running").add_argument(
        "--seed", type=seed, default=1111, metavar="N", help="random seed"
    )


def add_device(parser: Parser) -> None:
    """--cuda and --no-cuda."""
    parser.group("running").add_argument(
        "--cuda",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="demand a CUDA device, or stay on the CPU; without either, CUDA when there is one",
    )


def add_speed(parser: Parser) -> None:
    """--precision and --no-cuda-graphs."""
    add = parser.group("running").add_argument
    add(
        "--precision",
        choices=["fp32", "tf32", "bf16"],
        help="of training's matrix products: float32, TensorFloat-32 (a GPU's, and its default) or "
        "bfloat16; weights, their gradients and evaluation are float32, in TensorFloat-32 with the "
        "last two on a GPU, as are an LSTM's and a GRU's layers there with bf16",
    )
    add(
        "--no-cuda-graphs",
        dest="cuda_graphs",
        action="store_false",
        help="launch every operation of a training step on a GPU by itself, instead of replaying "
        "the whole step",
    )


def add_max_batches(parser: Parser, what: str) -> None:
    """--max-batches."""
    parser.group("running").add_argument(
        "--max-batches", type=positive_int, metavar="N", help=f"stop after N {what}, for a trial"
    )
