"""A stored trace of losses, which shows changes of figures that no other test detects.

The losses come from main.py itself, so they show that figures have not moved, not that they are
right. After a change that moves figures on purpose, store new losses with
`PYTHONPATH=. python tests/test_golden.py`, and add a line to CHANGELOG.md.
"""

import json
import tempfile
from pathlib import Path

import pytest
from conftest import ORIGINAL_CELLS

import main
from run import metrics

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("golden.json")
# Without dropout, as PyTorch's masks may differ between kinds of processors.
FLAGS = (
    "--emsize 12 --nhid 16 --nlayers 2 --batch_size 4 --bptt 10 --no-cuda --seed 7 --dropout 0 "
    "--dropouth 0 --dropouti 0 --dropoute 0 --wdrop 0 --max-batches 12 --log-interval 1 --lr 5 "
    "--epochs 2"
).split()
NAMES = {"batch": "loss", "epoch": "valid_loss", "test": "test_loss"}


def trace(cell: str, folder: Path) -> list[float]:
    """All losses of a short run on the sample corpus: 24 batches, two evaluations, the test."""
    argv = ["--data", str(ROOT / "data" / "sample"), "--model", cell, *FLAGS]
    main.main([*argv, "--save", str(folder / "m.pt"), "--logdir", str(folder / "log")])
    lines = metrics.read(folder / "log" / metrics.NAME)
    return [line[NAMES[line["kind"]]] for line in lines if line.get("kind") in NAMES]


@pytest.mark.parametrize("cell", ORIGINAL_CELLS)
def test_the_losses_are_what_they_were(cell, tmp_path):
    losses = trace(cell, tmp_path)
    assert len(losses) == 27
    assert losses == pytest.approx(json.loads(GOLDEN.read_text(encoding="utf-8"))[cell], rel=1e-4)


if __name__ == "__main__":
    traces = {}
    for cell in ORIGINAL_CELLS:
        with tempfile.TemporaryDirectory() as folder:
            traces[cell] = [round(loss, 6) for loss in trace(cell, Path(folder))]
    GOLDEN.write_text(json.dumps(traces) + "\n", encoding="utf-8")
