"""The flags that several scripts share; each script adds those it has, with its own defaults."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from cli import types
from cli.parser import Parser
from model import CELLS, find_cell
from scoring.spelling import KINDS

# The rate for SGD is 30; at 30 Adam diverges in the first batches.
ADAM_RATE = 1e-3


def dropouts(args: argparse.Namespace) -> dict[str, float]:
    """The dropout rates, as the model takes them."""
    return {
        "dropout": args.dropout,
        "dropouth": args.dropouth,
        "dropouti": args.dropouti,
        "dropoute": args.dropoute,
        "wdrop": args.wdrop,
    }


def default_rate(flags: Mapping[str, Any]) -> float:
    """The default of --lr for the optimiser and the cell that the other flags name."""
    if flags.get("optimizer") == "adam":
        return ADAM_RATE
    return getattr(find_cell(flags["model"])[0], "sgd_rate", 30.0)


def add_data(parser: Parser, default: str, either: str = "") -> None:
    """--data and --split."""
    add = parser.group("files")
    add(
        "--data",
        default,
        "the corpus: train.txt, valid.txt and test.txt, tokens separated by white space",
        belongs="run",
        either=either,
        metavar="FOLDER",
    )
    add(
        "--split",
        belongs="call",
        type=types.fraction,
        nargs=2,
        metavar=("VALID", "TEST"),
        help="for a folder with only a train.txt: fractions of its lines, cut off at the end, for "
        "valid and test, such as 0.05 0.05; later stages take them from the model file",
    )


def add_vocabulary(parser: Parser) -> None:
    """--vocab-size, --min-count and --unk."""
    add = parser.group("files", belongs="run")
    add(
        "--unk",
        "<unk>",
        "the word of the corpus that stands for unknown ones, in this and all later stages",
        metavar="TOKEN",
    )
    add(
        "--vocab-size",
        either="vocabulary",
        type=types.vocabulary_size,
        help="keep the N most frequent words of train.txt, --unk and <eos> among them, and read "
        "the others as --unk; PTB has 10,000",
    )
    add(
        "--min-count",
        either="vocabulary",
        type=types.positive_int,
        help="keep the words that occur N times or more in train.txt, and read the others as "
        "--unk; WikiText-2 and -103 have 3",
    )


def add_tokens_are(parser: Parser, needs: str = "") -> None:
    """--tokens-are."""
    parser.flag(
        "text",
        "--tokens-are",
        belongs="run",
        needs=needs,
        choices=KINDS,
        help="how tokens are put together to text: words by spaces; characters and bytes count as "
        "one each; pieces by their marker (@@ at the end, \u2581 or ## at the front); joined "
        "tokens have nothing between them; default: main.py's, or as the vocabulary shows",
    )


def add_model(parser: Parser) -> None:
    """--model."""
    parser.flag(
        "network",
        "--model",
        "LSTM",
        f"recurrent cell: {', '.join(CELLS)}; options of a cell of one's own follow a colon, "
        "as in NAME:rounds=4; later stages take it from the model file",
        type=types.cell,
        config="rnn_type",
        metavar="CELL",
    )


def add_sizes(parser: Parser) -> None:
    """The sizes of the network."""
    add = parser.group("network", type=types.positive_int)
    add(
        "--emsize",
        400,
        "size of a word's embedding, and of the last layer, whose weights are tied to it; "
        "published: 400, PTB characters 200",
        config="ninp",
    )
    add(
        "--nhid",
        1150,
        "hidden units of every layer but the last; published: LSTM 1150, QRNN 1550, "
        "PTB characters 1000, enwik8 1840, WikiText-103 2500",
        config="nhid",
    )
    add("--nlayers", 3, "layers; published: LSTM 3, QRNN 4", config="nlayers")


def add_training(parser: Parser) -> None:
    """Optimisation and its log lines."""
    add = parser.group("training", type=types.positive_int)
    add(
        "--lr",
        30.0,
        "learning rate, multiplied by a batch's length / --bptt; published: SGD 30, "
        "Adam 1e-3, PTB characters 2e-3",
        type=types.positive,
        derive=default_rate,
        metavar="RATE",
    )
    add(
        "--clip",
        0.25,
        "gradient norm to clip at, 0 for none; published: 0.25, PTB QRNN 0.2",
        type=types.non_negative,
        metavar="NORM",
    )
    add(
        "--epochs",
        8000,
        "maximum passes over train.txt; published: PTB LSTM 500, WikiText-2 LSTM 750, "
        "QRNN 550 and 500",
        belongs="run",
    )
    add(
        "--batch_size",
        80,
        "columns of a batch, each a separate stream of text; published: PTB 20, WikiText-2 "
        "LSTM 80, QRNN 40, characters 128, WikiText-103 60",
    )
    add(
        "--bptt",
        70,
        "base of the random sequence length, in tokens (variable length backpropagation "
        "sequences); published: 70, PTB characters 150, enwik8 200, WikiText-103 140",
    )
    add(
        "--nonmono",
        5,
        "NT-ASGD's non-monotone interval (the paper's n): averaging starts when the "
        "validation loss is worse than the best one more than N epochs earlier; "
        "published: 5",
        type=types.natural,
    )
    add("--log-interval", 200, "batches between log lines", belongs="run")
    add("--max-seq-len", either="lengths", help="cap on the random sequence length, in tokens")
    add = parser.group("training")
    add(
        "--fixed-length",
        False,
        "make every sequence --bptt tokens long, as in the paper's ablation",
        either="lengths",
    )
    add(
        "--partial-shuffle",
        False,
        "before each epoch, rotate every column of the text by a random offset of its own",
    )


def add_regularisers(parser: Parser) -> None:
    """Dropouts, activation penalties and weight decay."""
    add = parser.group("regularisation", type=types.probability)
    add(
        "--dropout",
        0.4,
        "variational (locked) dropout on the last layer's output; published: 0.4, PTB "
        "characters and WikiText-103 0.1",
    )
    add(
        "--dropouth",
        0.3,
        "variational dropout between layers; published: PTB LSTM 0.25, QRNN 0.3, WikiText-2 0.2",
    )
    add(
        "--dropouti",
        0.65,
        "variational dropout on the word vectors; published: WikiText-2 LSTM 0.65, "
        "PTB and WikiText-2 QRNN 0.4, characters 0.1",
    )
    add(
        "--dropoute",
        0.1,
        "embedding dropout: a word is dropped from a whole batch; published: 0.1, characters "
        "and WikiText-103 0",
    )
    add(
        "--wdrop",
        0.5,
        "weight drop (DropConnect) on the hidden-to-hidden weights, for the QRNN on its "
        "linear map; published: LSTM 0.5, QRNN 0.1, enwik8 0.2, WikiText-103 0",
    )
    add = parser.group("regularisation")
    add(
        "--alpha",
        2.0,
        "weight of activation regularisation (AR), the mean square of the last layer's "
        "dropped output, 0 for none; published: 2, characters and WikiText-103 0",
    )
    add(
        "--beta",
        1.0,
        "weight of temporal activation regularisation (TAR), the mean square of the output's "
        "change per step, 0 for none; published: 1, characters and WikiText-103 0",
    )
    add(
        "--wdecay",
        1.2e-6,
        "weight decay (L2) on every parameter; published: 1.2e-6, WikiText-103 0",
    )


def add_chunk(parser: Parser, default: int) -> None:
    """--bptt of the scripts that only score."""
    parser.flag(
        "running",
        "--bptt",
        default,
        "tokens computed at a time; the result does not depend on it",
        type=types.positive_int,
    )


def add_cache(parser: Parser, needs: str = "") -> None:
    """The continuous cache; `needs` is the flag that switches it on, if there is one."""
    add = parser.group("cache", needs=needs)
    add(
        "--window",
        3785,
        "positions the cache looks back over, in tokens; published: PTB 500, WikiText-2 3785",
        type=types.positive_int,
    )
    add(
        "--theta",
        0.6625523432485668,
        "sharpness of the cache's attention (the cache paper's theta), 0 is uniform over the "
        "window; published: PTB 1.0, WikiText-2 0.662",
        type=types.sharpness,
    )
    add(
        "--lambdasm",
        0.12785920428335693,
        "weight of the cache in the mixture with the vocabulary's softmax (the cache paper's "
        "lambda); published: PTB 0.1, WikiText-2 0.1279",
        type=types.probability,
    )
    add(
        "--cache-from-start",
        False,
        "use the cache from the second token on, not only once the window is full",
    )


def add_save(parser: Parser, help: str) -> None:
    """--save."""
    parser.flag("files", "--save", "model.pt", help, belongs="call", metavar="FILE")


def add_seed(parser: Parser, beside: Sequence[str] = ()) -> None:
    """--seed."""
    parser.flag(
        "running",
        "--seed",
        1111,
        "random seed",
        belongs="run",
        fixed="its random states belong to that seed",
        beside=beside,
        type=types.seed,
    )


def add_device(parser: Parser) -> None:
    """--cuda, --no-cuda and --plain."""
    add = parser.group("running")
    add(
        "--cuda",
        None,
        "require a CUDA device, or stay on the CPU; by default CUDA is used if available",
        belongs="call",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "--plain",
        False,
        "run the definitions alone, without the faster forms of fast/ and qrnn/",
        belongs="run",
    )


def add_running(parser: Parser) -> None:
    """How a run continues and is saved, watched and computed."""
    add = parser.group("", belongs="run")
    add(
        "--resume",
        "",
        "model file of an earlier run to continue; omitted flags come from it",
        belongs="call",
        either="start",
        metavar="FILE",
    )
    add("--save-every", 300.0, "also save within an epoch, at this interval", metavar="SECONDS")
    add(
        "--deterministic",
        False,
        "make the same seed give the same bits on a GPU too, at some cost in speed",
    )
    add = parser.group("running")
    add(
        "--logdir",
        "",
        "also write DIR/metrics.jsonl, and TensorBoard events if TensorBoard is installed",
        belongs="call",
        metavar="DIR",
    )
    add(
        "--precision",
        choices=["fp32", "tf32", "bf16"],
        help="precision of training's matrix products: float32, TensorFloat-32 (GPU only, default "
        "there) or bfloat16; weights, gradients and evaluation are float32, but on a GPU tf32 and "
        "bf16 put evaluation, and bf16 the LSTM and GRU layers, in TensorFloat-32",
    )
    add(
        "--no-cuda-graphs",
        True,
        "launch each operation of a training step on a GPU separately, instead of replaying "
        "a recorded step",
        belongs="run",
        dest="cuda_graphs",
    )


def add_max_batches(parser: Parser, what: str) -> None:
    """--max-batches."""
    parser.flag(
        "running",
        "--max-batches",
        belongs="call",
        type=types.positive_int,
        help=f"stop after N {what}, for a trial",
    )


def add_trainer(parser: Parser, save: str) -> None:
    """All flags that main.py and finetune.py share; `save` is the help of --save."""
    add_data(parser, "data/penn/")
    add_model(parser)
    add_save(parser, save)
    add_sizes(parser)
    add_training(parser)
    add_regularisers(parser)
    add_seed(parser)
    add_device(parser)
    add_running(parser)
    add_max_batches(parser, "batches of every epoch and evaluation")
