"""The published commands, word by word, and a small model.

The commands of main.py, finetune.py and pointer.py are from the original's documentation, the
settings of dynamiceval.py from the code of arXiv 1709.07432. A script that is missing has none.
"""

_CHARACTERS = "--alpha 0 --beta 0 --dropoute 0"
_PTB_LSTM = (
    "--batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 --epoch 500 "
    "--save PTB.pt"
)
_PTB_QRNN = (
    "--model QRNN --batch_size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 --emsize 400 "
    "--dropouth 0.3"
)
_WT2_LSTM = "--epochs 750 --data data/wikitext-2 --save WT2.pt --dropouth 0.2 --seed 1882"
_WT2_QRNN = (
    "--epochs 500 --data data/wikitext-2 --clip 0.25 --dropouti 0.4 --dropouth 0.2 --nhid 1550 "
    "--nlayers 4 --seed 4002 --model QRNN --wdrop 0.1 --batch_size 40 --save WT2.pt"
)
_DYNAMIC_LSTM = "--lr 0.002 --lamb 0.02 --epsilon 0.001 --oldhyper"
_WT2_CACHE = "--lambdasm 0.1279 --theta 0.662 --window 3785 --bptt 2000 --data data/wikitext-2"

COMMANDS = {
    "ptb-lstm": {
        "main": _PTB_LSTM,
        "finetune": _PTB_LSTM,
        "pointer": "--data data/penn --save PTB.pt --lambdasm 0.1 --theta 1.0 --window 500 "
        "--bptt 5000",
        "dynamiceval": f"--data data/penn --save PTB.pt {_DYNAMIC_LSTM}",
    },
    "ptb-qrnn": {
        "main": f"{_PTB_QRNN} --seed 9001 --dropouti 0.4 --epochs 550 --save PTB.pt",
        "finetune": f"{_PTB_QRNN} --seed 404 --dropouti 0.4 --epochs 300 --save PTB.pt",
        "pointer": "--model QRNN --lambdasm 0.1 --theta 1.0 --window 500 --bptt 5000 --save PTB.pt",
        "dynamiceval": "--model QRNN --data data/penn --save PTB.pt --lr 0.00012 --lamb 0.02 "
        "--bptt 20",
    },
    "wt2-lstm": {
        "main": _WT2_LSTM,
        "finetune": _WT2_LSTM,
        "pointer": f"--save WT2.pt {_WT2_CACHE}",
        "dynamiceval": f"--data data/wikitext-2 --save WT2.pt {_DYNAMIC_LSTM}",
    },
    "wt2-qrnn": {
        "main": _WT2_QRNN,
        "finetune": _WT2_QRNN,
        "pointer": f"--save WT2.pt --model QRNN {_WT2_CACHE}",
        "dynamiceval": "--model QRNN --data data/wikitext-2 --save WT2.pt --lr 0.00012 "
        "--lamb 0.008 --bptt 20",
    },
    "ptbc": {
        "main": f"--epochs 500 --nlayers 3 --emsize 200 --nhid 1000 {_CHARACTERS} --dropouth 0.25 "
        "--dropouti 0.1 --dropout 0.1 --wdrop 0.5 --wdecay 1.2e-6 --bptt 150 --batch_size 128 "
        "--optimizer adam --lr 2e-3 --data data/pennchar --save PTBC.pt --when 300 400"
    },
    "enwik8": {
        "main": f"--epochs 50 --nlayers 3 --emsize 400 --nhid 1840 {_CHARACTERS} --dropouth 0.1 "
        "--dropouti 0.1 --dropout 0.4 --wdrop 0.2 --wdecay 1.2e-6 --bptt 200 --batch_size 128 "
        "--optimizer adam --lr 1e-3 --data data/enwik8 --save ENWIK8.pt --when 25 35"
    },
    "wt103": {
        "main": f"--epochs 14 --nlayers 4 --emsize 400 --nhid 2500 {_CHARACTERS} --dropouth 0.1 "
        "--dropouti 0.1 --dropout 0.1 --wdrop 0 --wdecay 0 --bptt 140 --batch_size 60 "
        "--optimizer adam --lr 1e-3 --data data/wikitext-103 --save WT103.12hr.QRNN.pt --when 12 "
        "--model QRNN"
    },
}

# Small enough for minutes on two cores; tools/demo.py runs it.
_SMALL = (
    "--batch_size 20 --bptt 35 --emsize 128 --nhid 256 --nlayers 2 --dropout 0.3 --dropouth 0.2 "
    "--dropouti 0.3 --dropoute 0.05 --wdrop 0.3 --seed 1 --nonmono 2"
)
SMALL = {
    "main": f"{_SMALL} --epochs 10",
    "finetune": f"{_SMALL} --epochs 4",
    "pointer": "--window 500 --theta 0.5 --lambdasm 0.1",
}

# The help of each script ends with its own.
EXAMPLES = """
main.py --preset small --data data/sample --save SMALL.pt
main.py --resume PTB.pt
finetune.py --data data/penn --save PTB.pt --keep
pointer.py --data data/penn --save PTB.pt --search
dynamiceval.py --data data/penn --save PTB.pt --gridfast
generate.py --checkpoint PTB.pt --outf - --words 100 --prompt "the company"
score.py --checkpoint PTB.pt --text "the company said" --tokens
score.py --checkpoint PTB.pt --html surprisal.html data/penn/test.txt
plot.py main.log finetune.log --out curves.png
""".strip().splitlines()


def of_stage(stage: str) -> dict[str, str]:
    """The flags of a script's presets by name; empty if there are none."""
    rows = {**COMMANDS, "small": SMALL}
    return {name: row[stage] for name, row in rows.items() if stage in row}
