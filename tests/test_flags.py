"""cli/: every flag's default, the classic abbreviations, presets, one-line errors."""

import importlib
import re
import shlex

import pytest
import torch
from conftest import ROOT, TINY

from cli import flags, resuming
from cli.parser import ARCHITECTURE, CLASSIC, VERSION, plain
from cli.presets import COMMANDS
from model import DROPOUTS
from utils import ToolkitError

TRAINING = {
    "data": "data/penn/", "model": "LSTM", "emsize": 400, "nhid": 1150, "nlayers": 3, "lr": 30,
    "clip": 0.25, "epochs": 8000, "batch_size": 80, "bptt": 70, "dropout": 0.4, "dropouth": 0.3,
    "dropouti": 0.65, "dropoute": 0.1, "wdrop": 0.5, "alpha": 2, "beta": 1, "wdecay": 1.2e-6,
    "seed": 1111, "nonmono": 5, "log_interval": 200, "save": "model.pt", "cuda": None,
}  # fmt: skip
DEFAULTS = {
    "main": {**TRAINING, "resume": "", "optimizer": "sgd", "when": [-1]},
    "finetune": {**TRAINING, "tied": False},
    "pointer": {
        "data": "data/penn", "model": "LSTM", "save": "model.pt", "bptt": 5000, "window": 3785,
        "theta": 0.6625523432485668, "lambdasm": 0.12785920428335693, "cuda": None,
    },
    "generate": {
        "data": "./data/penn", "model": "LSTM", "checkpoint": "./model.pt", "outf": "generated.txt",
        "words": 1000, "seed": 1111, "temperature": 1.0, "log_interval": 100, "cuda": None,
    },
}  # fmt: skip


def parser_of(script):
    return importlib.import_module(script).build_parser()


@pytest.mark.parametrize("script", DEFAULTS)
def test_defaults(script):
    args = vars(parser_of(script).parse_args([]))
    assert {name: args[name] for name in DEFAULTS[script]} == DEFAULTS[script]
    # The list of classic flags has the flags of the table.
    flags = {flag.removeprefix("--").replace("-", "_") for flag in CLASSIC[script]}
    assert flags == set(DEFAULTS[script])


@pytest.mark.parametrize("script", DEFAULTS)
def test_every_classic_abbreviation_still_works(script):
    classic = CLASSIC[script]
    values = {"--model": "QRNN", "--optimizer": "adam", "--cuda": None, "--tied": None}
    for flag in classic:
        for length in range(3, len(flag) + 1):
            short = flag[:length]
            meant = [f for f in classic if f.startswith(short)]
            if short != flag and (len(meant) > 1 or short in classic):
                continue
            value = values.get(flag, "0.5" if flag in ("--lambdasm", "--theta") else "1")
            if flag.startswith("--drop") or flag == "--wdrop":
                value = "0.5"
            argv = [short] if value is None else [short, value]
            args = parser_of(script).parse_args(argv)
            assert args.given == {flag.removeprefix("--").replace("-", "_")}, short
            if value is not None:
                joined = parser_of(script).parse_args([f"{short}={value}"])
                assert vars(joined) == vars(args)


def test_given_flags():
    args = parser_of("main").parse_args("--lr 30 --when 3 4 --no-cuda".split())
    assert args.given == {"lr", "when", "cuda"}
    assert args.cuda is False
    assert "given" not in plain(args)
    rates = {"dropout": 0.4, "dropouth": 0.3, "dropouti": 0.65, "dropoute": 0.1, "wdrop": 0.5}
    assert rates.items() <= flags.dropouts(args).items()
    assert tuple(flags.dropouts(args)) == DROPOUTS


TRAINED = {"args": {"lr": 7.0, "clip": 0.5, "when": [3], "other": 1}, "position": None, "epoch": 2}


def resumed(argv, **recorded):
    args = parser_of("main").parse_args(argv)
    training = {**TRAINED, "args": {**TRAINED["args"], **recorded}}
    resuming.resume_flags(args, parser_of("main"), training, "m.pt")
    return args


def test_a_resumed_run_takes_what_is_not_given():
    args = resumed(["--lr", "3"])
    assert (args.lr, args.clip, args.when) == (3, 0.5, [3])
    assert args.given == {"lr"}
    # A flag equal to the recorded one does not count as given.
    args = resumed(["--lr", "7", "--when", "3", "--save", "m.pt", "--clip", "2"], save="m.pt")
    assert (args.lr, args.clip, args.save) == (7, 2, "m.pt")
    assert args.given == {"clip", "save"}


@pytest.mark.parametrize(
    "bad",
    [
        {"bptt": -5}, {"clip": "x"}, {"optimizer": "sgdd"}, {"when": [1, "x"]}, {"when": 3},
        {"data": 3}, {"logdir": 5.0}, {"clip": [1.0]}, {"deterministic": "x"},
    ],
)  # fmt: skip
def test_flags_recorded_in_a_file_are_checked(bad):
    with pytest.raises(ToolkitError, match=r"m\.pt is damaged \(its --"):
        resumed([], **bad)


def test_finetuning_takes_what_shapes_training(capsys):
    config = {"dropout": 0.1, "dropouth": 0.2, "dropouti": 0.3, "dropoute": 0.4, "wdrop": 0.0}
    recorded = {"alpha": 0.0, "clip": 1.0, "lr": 7.0, "seed": 3, "optimizer": "adam", "epochs": 9,
                "fixed_length": True, "partial_shuffle": False, "precision": None}  # fmt: skip

    def taken(argv, **more):
        args = parser_of("finetune").parse_args(argv)
        parser = parser_of("finetune")
        resuming.finetune_flags(args, parser, config, {**recorded, **more}, "m.pt")
        return args, capsys.readouterr().out

    args, out = taken(["--dropouth", "0.5"])
    unset = dict.fromkeys(DROPOUTS, 0.0)
    assert flags.dropouts(args) == {**unset, **config, "dropouth": 0.5}
    # Adam's rate is not taken, as finetuning uses SGD.
    assert (args.alpha, args.clip, args.lr, args.fixed_length) == (0, 1, 30, True)
    assert (args.seed, args.epochs) == (1111, 8000)
    assert out == (
        "From m.pt: --alpha 0.0 --clip 1.0 --dropout 0.1 --dropoute 0.4 --dropouti 0.3 "
        "--fixed-length --wdrop 0.0\n"
    )
    args, _ = taken(["--max-seq-len", "9"], optimizer="sgd")
    assert (args.lr, args.fixed_length, args.max_seq_len) == (7, False, 9)


BAD_FLAGS = {
    "main": """
        --model RNN_TANH; --model QRNN:rounds=2; --model LSTM:; --model LSTM:2;
        --emsize 0; --nhid -3; --nlayers 0; --nlayers 1.5; --batch_size -1;
        --batch_size many; --fixed-length --max-seq-len 7; --batch_size 9223372036854775808;
        --bptt 0; --epochs 0; --dropout 1; --dropouth -0.1; --dropouti 1.5; --dropoute nan;
        --wdrop 1.0; --lr 0; --lr inf; --clip -1; --alpha -1; --beta x; --wdecay -1e-6; --seed
        -1; --seed 99999999999999999999; --nonmono -1; --log-interval 0; --optimizer adagrad;
        --when soon; --max-batches 0; --max-seq-len 0; --save-every -1; --save-every soon;
        --save-every nan; --resume; --nosuchflag 3; --drop 0.1; stray; --preset ptb
    """,
    "pointer": """
        --window 99999999999999999999; --theta 1e39; --window 0; --lambdasm 1; --theta -1;
        --bptt -5; --preset wt103
    """,
    "finetune": """
        --model LSTMM; --dropout 2; --optimizer adam; --save-every -3; --resume; --preset ptbc
    """,
    "generate": """
        --temperature 0; --words 0; --top-k 0; --top-p 0; --top-p 1.5; --samples 0; --next 3
    """,
    "dynamiceval": """
        --lr -1; --lamb x; --epsilon -1; --bptt 0; --batch_size 0; --sgd --oldhyper; --preset ptbc
    """,
}


@pytest.mark.parametrize(
    ("name", "flags"), [(name, one) for name, all in BAD_FLAGS.items() for one in all.split(";")]
)
def test_bad_flags(name, flags, script):
    argv = flags.split()
    status, out, err = script(name, *argv)
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "error: " in err
    flag = argv[0]
    assert flag in err


@pytest.mark.parametrize("name", DEFAULTS)
def test_help_names_every_flag_and_its_default(name, script):
    status, out, _ = script(name, "--help")
    assert status == 0
    for flag in CLASSIC[name]:
        assert flag in out
    assert str(DEFAULTS[name].get("nhid", "model.pt")) in out


@pytest.mark.parametrize("name", DEFAULTS)
def test_help_is_for_people(name, script):
    _, out, _ = script(name, "--help")
    for silly in ("default: None", "default: )", "default: False", "default: [-1]"):
        assert silly not in out
    if name in ("main", "finetune"):
        for title in ("files:", "network:", "training:", "regularisation:", "running:"):
            assert f"\n{title}\n" in out
        assert "published: PTB LSTM 0.25, QRNN 0.3" in " ".join(out.split())


@pytest.mark.parametrize("name", DEFAULTS)
def test_version(name, script):
    status, out, _ = script(name, "--version")
    assert status == 0
    assert f" {VERSION} (torch {torch.__version__})\n" in out
    assert f'version = "{VERSION}"' in (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.parametrize("row", COMMANDS)
def test_a_preset_is_the_published_command(row, capsys):
    for name, published in COMMANDS[row].items():
        given = parser_of(name).parse_args(shlex.split(published))
        preset = parser_of(name).parse_args(["--preset", row])
        assert plain(preset) == {**plain(given), "preset": row}
        assert preset.given == (given.given - {"data", "save", "seed"}) | {"preset"}
        # The printed flags are equivalent to the preset.
        (said,) = capsys.readouterr().out.splitlines()
        assert said.startswith(f"--preset {row}: --")
        spelled = parser_of(name).parse_args(shlex.split(said.split(": ", 1)[1]))
        assert {**plain(spelled), "preset": row} == plain(preset)


def test_a_flag_overrides_a_preset_on_either_side_of_it(capsys):
    for argv in (
        ["--preset", "ptbc", "--lr", "0.5", "--when", "7"],
        ["--lr=0.5", "--when", "7", "--preset=ptbc"],
        ["--lr", "0.5", "--when", "7", "--pres", "ptbc"],
    ):
        args = parser_of("main").parse_args(argv)
        assert (args.lr, args.when, args.nhid) == (0.5, [7], 1000)
        out = capsys.readouterr().out
        assert "--nhid 1000" in out
        assert "--lr" not in out
        assert "--when" not in out
    assert {"lr", "nhid", "dropouth"} <= args.given
    # A resumed run takes these three from the file.
    assert not {"data", "save", "seed"} & args.given
    assert {"dropouti"} <= args.given
    assert flags.dropouts(args)["dropouti"] == 0.1


def test_a_preset_in_a_resumed_run_sets_the_architecture_alone(capsys):
    argv = ["--preset", "wt103", "--resume", "m.pt", "--epochs", "20"]
    args = parser_of("main").parse_args(argv)
    assert args.given == {"preset", "resume", "epochs", *ARCHITECTURE}
    training = {"args": {"lr": 1e-4, "when": [3]}, "position": None, "epoch": 1}
    resuming.resume_flags(args, parser_of("main"), training, "m.pt")
    assert (args.lr, args.when, args.nhid) == (1e-4, [3], 2500)


def test_a_preset_that_contradicts_the_model_is_an_error(script, trained, corpus_dir):
    argv = ["--save", trained["GRU"], "--data", corpus_dir]
    status, _, err = script("pointer", "--preset", "wt2-qrnn", *argv)
    assert status == 1
    assert "--model QRNN contradicts" in err
    status, _, err = script("finetune", "--preset", "ptb-qrnn", "--model", "GRU", *argv)
    assert status == 1
    assert re.search("--(emsize|nhid) .* contradicts", err)


def test_a_run_with_a_preset_and_its_resumption(script, corpus_dir, tmp_path):
    path = tmp_path / "m.pt"
    argv = ["--preset", "ptb-lstm", *TINY, "--data", corpus_dir, "--max-batches", 3]
    status, out, err = script("main", *argv, "--lr", 5, "--epochs", 1, "--save", path)
    assert (status, err) == (0, "")
    assert out.startswith("--preset ptb-lstm: ")
    assert "'seed': 7" in out
    size = ["--emsize", 12, "--nhid", 16, "--nlayers", 2]
    argv = ["--preset", "ptb-lstm", *size, "--resume", path, "--epochs", 2, "--max-batches", 3]
    status, out, err = script("main", *argv)
    assert (status, err) == (0, "")
    assert "'seed': 7" in out
    assert f"'data': '{corpus_dir}'" in out
    assert "end of epoch   2" in out
