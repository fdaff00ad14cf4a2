"""cli/: every flag's default, the classic abbreviations, presets, one-line errors."""

import importlib
import shlex

import pytest
import torch
from conftest import ROOT

from cli import flags
from cli.parser import CLASSIC, VERSION, Recorded
from cli.presets import COMMANDS, SMALL
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
SCRIPTS = [*DEFAULTS, "dynamiceval", "score", "plot"]


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
            line = parser_of(script).given(argv).line
            assert {*line} == {flag.removeprefix("--").replace("-", "_")}, short
            if value is not None:
                assert parser_of(script).given([f"{short}={value}"]).line == line


@pytest.mark.parametrize("script", SCRIPTS)
def test_hyphens_and_underscores_are_the_same_in_every_flag(script):
    parser = parser_of(script)
    for name in [n for n in parser._option_string_actions if n.startswith("--")]:
        for spelled in (
            name.replace("-", "_").replace("__", "--", 1),
            f"--{name[2:].replace('_', '-')}",
        ):
            assert parser._expanded(spelled) == name
            assert parser._expanded(f"{spelled}=x-y_z") == f"{name}=x-y_z"
    if script != "plot":
        paths = [parser.given([f, "x.pt"]).line for f in ("--save", "--checkpoint")]
        assert paths[0] == paths[1] != {}


@pytest.mark.parametrize(
    ("script_name", "flag", "meant"),
    [
        ("main", "--bath_size", "--batch_size"), ("main", "--droputh", "--dropouth"),
        ("score", "--indepedent", "--independent"), ("plot", "--max_pppl", "--max-ppl"),
        ("main", "--nosuchflag", None),
    ],
)  # fmt: skip
def test_a_mistyped_flag_is_answered_with_the_nearest(script_name, flag, meant, script):
    files = ["x.log"] if script_name == "plot" else []
    status, _, err = script(script_name, *files, flag, "3")
    assert (status, len(err.splitlines())) == (2, 1)
    assert err.count("did you mean") == (meant is not None)
    assert meant is None or f"; did you mean {meant}? (" in err


def test_given_flags_and_dropouts():
    argv = "--lr 30 --when 3 4 --no-cuda".split()
    assert parser_of("main").given(argv).line == {"lr": 30.0, "when": [3, 4], "cuda": False}
    args = parser_of("main").parse_args(argv)
    assert flags.dropouts(args) == {
        "dropout": 0.4, "dropouth": 0.3, "dropouti": 0.65, "dropoute": 0.1, "wdrop": 0.5,
    }  # fmt: skip


def test_the_default_rate_depends_on_optimiser_and_cell(capsys):
    for argv, rate in (([], 30), (["--model", "GRU"], 5), (["--optimizer", "adam"], 0.001)):
        assert parser_of("main").parse_args(argv).lr == rate
        expected = f"--lr is {rate:g} here, not 30\n" if argv else ""
        assert capsys.readouterr().out == expected
        assert parser_of("main").parse_args([*argv, "--lr", "7"]).lr == 7


CONFIG = {"rnn_type": "GRU", "ninp": 8, "nhid": 9, "nlayers": 2, "dropouth": 0.2, "wdrop": 0.0}


def settled(script, argv, use, recorded, **fixed):
    parser = parser_of(script)
    return parser.settle(parser.given(argv), Recorded("m.pt", use, CONFIG, recorded, fixed))


def resumed(argv, **recorded):
    return settled("main", argv, "resume", {"lr": 7.0, "clip": 0.5, "when": [3], **recorded})


def test_a_resumed_run_takes_what_is_not_given():
    args = resumed(["--lr", "3", "--epochs", "9"], epochs=4, cuda=True, max_batches=3, other=1)
    assert (args.lr, args.clip, args.when, args.epochs) == (3, 0.5, [3], 9)
    assert (args.model, args.emsize, args.nhid, args.nlayers) == ("GRU", 8, 9, 2)
    # These belong to a call, not to a run.
    assert (args.cuda, args.max_batches, args.save) == (None, None, "m.pt")
    assert resumed(["--save", "n.pt"], save="o.pt").save == "n.pt"
    # A recorded rate stays, even if it is another cell's default.
    assert resumed([], lr=30.0).lr == 30


@pytest.mark.parametrize(
    ("argv", "fixed", "message"),
    [
        ("--model LSTM", {}, "--model LSTM contradicts m.pt, whose model has model GRU"),
        ("--nhid 10", {}, "--nhid 10 contradicts m.pt, whose model has nhid 9"),
        ("--seed 2", {}, "--seed 2 contradicts m.pt, .* with 1, and its random states"),
        ("--optimizer adam", {}, "--optimizer adam contradicts m.pt, .* with sgd"),
        ("--batch_size 5", {"batch_size": "why"}, "--batch_size 5 contradicts .* and why"),
        ("--preset ptb-qrnn", {}, "--model QRNN contradicts m.pt"),
        ("--preset ptb-qrnn --model GRU", {}, "--(emsize 400|nhid 1550) contradicts m.pt"),
    ],
)
def test_a_flag_that_would_make_it_another_run_is_refused(argv, fixed, message):
    recorded = {"seed": 1, "optimizer": "sgd", "batch_size": 4}
    with pytest.raises(ToolkitError, match=message):
        settled("main", argv.split(), "resume", recorded, **fixed)
    again = "--model GRU --nhid 9 --seed 1 --optimizer sgd --batch_size 4".split()
    assert settled("main", again, "resume", recorded, **fixed).batch_size == 4


def test_finetuning_takes_what_shapes_training(capsys):
    recorded = {"alpha": 0.0, "clip": 1.0, "lr": 7.0, "seed": 3, "optimizer": "adam", "epochs": 9,
                "fixed_length": True, "partial_shuffle": False, "precision": None}  # fmt: skip

    def taken(argv, **more):
        args = settled("finetune", argv, "finetune", {**recorded, **more})
        return args, capsys.readouterr().out

    args, out = taken(["--dropouti", "0.5"])
    assert (args.dropouth, args.dropouti, args.wdrop) == (0.2, 0.5, 0)
    # Adam's rate is not taken, as finetuning uses SGD.
    assert (args.alpha, args.clip, args.lr, args.fixed_length) == (0, 1, 5, True)
    assert (args.seed, args.epochs) == (1111, 8000)
    assert out == (
        "From m.pt: --alpha 0.0 --clip 1.0 --dropouth 0.2 --fixed-length --wdrop 0.0\n"
        "--lr is 5 here, not 30\n"
    )
    args, _ = taken(["--max-seq-len", "9"], optimizer="sgd")
    assert (args.lr, args.fixed_length, args.max_seq_len) == (7, False, 9)


def test_a_split_is_the_file_s_where_the_folder_has_a_train_txt_alone(tmp_path):
    (tmp_path / "train.txt").write_text("a\n")
    argv, recorded = ["--data", str(tmp_path)], {"split": [0.1, 0.2]}
    uses = (("finetune", "finetune"), ("main", "resume"), ("main", "start"), ("pointer", "start"))
    for script, use in uses:
        assert settled(script, argv, use, recorded).split == [0.1, 0.2]
        given = [*argv, "--split", "0.3", "0.3"]
        assert settled(script, given, use, recorded).split == [0.3, 0.3]
    (tmp_path / "valid.txt").write_text("a\n")
    for script, use in uses:
        assert settled(script, argv, use, recorded).split is None


BAD_FLAGS = {
    "main": """
        --model RNN_TANH; --model QRNN:rounds=2; --model LSTM:; --model LSTM:2;
        --emsize 0; --nhid -3; --nlayers 0; --nlayers 1.5; --batch_size -1;
        --batch_size many; --fixed-length --max-seq-len 7; --batch_size 9223372036854775808;
        --bptt 0; --epochs 0; --dropout 1; --dropouth -0.1; --dropouti 1.5; --dropoute nan;
        --wdrop 1.0; --lr 0; --lr inf; --clip -1; --alpha -1; --beta x; --wdecay -1e-6; --seed
        -1; --seed 99999999999999999999; --nonmono -1; --log-interval 0; --optimizer adagrad;
        --when soon; --max-batches 0; --max-seq-len 0; --save-every -1; --save-every soon;
        --save-every nan; --resume; --nosuchflag 3; --drop 0.1; stray; --preset ptb;
        --init a --resume b; --lr 1e38
    """,
    "pointer": """
        --window 99999999999999999999; --theta 1e39; --window 0; --lambdasm 1; --theta -1;
        --bptt -5; --preset wt103
    """,
    "finetune": """
        --model LSTMM; --dropout 2; --optimizer adam; --save-every -3; --resume; --preset ptbc
    """,
    "generate": """
        --temperature -1; --temperature 1e39; --top-p 1e-46; --words 0; --top-k 0; --top-p 0;
        --top-p 1.5; --samples 0; --next 3
    """,
    "dynamiceval": """
        --lr -1; --lamb x; --epsilon -1; --bptt 0; --batch_size 0; --sgd --oldhyper;
        --sgd --epsilon 1; --sgd --batch_size 9; --preset ptbc; --sgd --preset ptb-lstm;
        --window 9; --cache-from-start --sgd
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


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = script(name, "--help")
    assert status == 0
    text, _, examples = out.partition("\nexamples:\n")
    assert [line for line in text.splitlines() if len(line) > 80] == []
    for line in examples.splitlines():
        program, script_name, *argv = shlex.split(line)
        assert (program, script_name) == ("python", f"{name}.py")
        parser_of(name).given(argv)
    assert examples
    for flag in CLASSIC.get(name, []):
        assert flag in out
    if name in DEFAULTS:
        assert str(DEFAULTS[name].get("nhid", "model.pt")) in out
    for silly in ("default: None", "default: )", "default: False", "default: [-1]"):
        assert silly not in out
    if name in ("main", "finetune"):
        for title in ("files:", "network:", "training:", "regularisation:", "running:"):
            assert f"\n{title}\n" in out
        assert "published: PTB LSTM 0.25, QRNN 0.3" in " ".join(out.split())


def test_version(script):
    status, out, _ = script("main", "--version")
    assert status == 0
    assert f" {VERSION} (torch {torch.__version__})\n" in out
    assert f"## {VERSION}, " in (ROOT / "CHANGELOG.md").read_text("utf-8")


PRESETS = {**COMMANDS, "small": SMALL}


@pytest.mark.parametrize("row", PRESETS)
def test_a_preset_is_the_published_command(row, capsys):
    for name, published in PRESETS[row].items():
        given = parser_of(name).parse_args(shlex.split(published))
        capsys.readouterr()
        preset = parser_of(name).parse_args(["--preset", row])
        assert vars(preset) == {**vars(given), "preset": row}
        # The printed flags are equivalent to the preset.
        line = capsys.readouterr().out.splitlines()[0]
        assert line.startswith(f"--preset {row}: --")
        spelled = parser_of(name).parse_args(shlex.split(line.split(": ", 1)[1]))
        assert {**vars(spelled), "preset": row} == vars(preset)


def test_a_flag_overrides_a_preset_on_either_side_of_it(capsys):
    for argv in (
        ["--preset", "ptbc", "--lr", "0.5", "--when", "7"],
        ["--lr=0.5", "--when", "7", "--preset=ptbc"],
        ["--lr", "0.5", "--when", "7", "--pres", "ptbc"],
    ):
        args = parser_of("main").parse_args(argv)
        assert (args.lr, args.when, args.nhid, args.dropouti) == (0.5, [7], 1000, 0.1)
        out = capsys.readouterr().out
        assert "--nhid 1000" in out
        assert "--lr" not in out
        assert "--when" not in out


def test_a_preset_in_a_resumed_run_sets_the_architecture_alone(capsys):
    argv = ["--preset", "wt103", "--resume", "m.pt", "--epochs", "20"]
    parser = parser_of("main")
    config = {"rnn_type": "QRNN", "ninp": 400, "nhid": 2500, "nlayers": 4}
    recorded = {"lr": 1e-4, "when": [3], "data": "elsewhere", "seed": 3}
    args = parser.settle(parser.given(argv), Recorded("m.pt", "resume", config, recorded))
    assert (args.lr, args.when, args.nhid, args.epochs) == (1e-4, [3], 2500, 20)
    assert (args.data, args.seed, args.save) == ("elsewhere", 3, "m.pt")
    assert capsys.readouterr().out == (
        "--preset wt103: --emsize 400 --model QRNN --nhid 2500 --nlayers 4\n"
    )
