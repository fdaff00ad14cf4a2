"""Kill main.py at random moments and resume it, many times; called by test_survival.py.

    python tests/killed.py CORPUS FOLDER CELL KILLS

Children are forked after the imports, which take longer than such a run.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from conftest import TINY

import checkpoint
import main
import nt_asgd
from run import program
from run.rehearsal import differing_files


def switch_after_two_epochs(self, loss):
    """A trigger that starts averaging after the second epoch, whatever the losses."""
    self.losses.append(loss)
    return len(self.losses) == 2


def start(argv):
    """Run main.py in a forked child; return the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    status = 1
    try:
        main.main([str(arg) for arg in argv])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def inode(path):
    """The inode at `path`, None if there is no file; every save changes it."""
    return path.stat().st_ino if path.exists() else None


def ended(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def assert_same_files(path, other):
    assert not differing_files(checkpoint.load(path), checkpoint.load(other))


def survive(corpus, folder, cell, kills):
    """Train once undisturbed, then with `kills` kills in total; all runs must end equal."""
    torch.set_num_threads(1)
    program.start_optimizers_sooner()
    nt_asgd.NonMonotonicTrigger.update = switch_after_two_epochs
    folder = Path(folder)
    few = ["--max-batches", 12, "--save-every", 0]
    flags = ["--data", corpus, *TINY, "--model", cell, "--lr", 5, "--epochs", 5, "--when", 2, 4]
    began = time.monotonic()
    assert os.waitpid(start([*flags, *few, "--save", folder / "whole"]), 0)[1] == 0
    seconds = time.monotonic() - began
    rng = random.Random(1)
    killed = runs = within = saving = 0
    while killed < kills:
        runs += 1
        path = folder / f"{runs}"
        while True:
            argv = ["--resume", path] if path.exists() else [*flags, "--save", path]
            pid = start([*argv, *few])
            if killed < kills:
                before = inode(path)
                # Most children are killed after their first save, the others at any time.
                if rng.random() < 0.8:
                    while inode(path) == before and not ended(pid):
                        time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.3 * seconds))
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if status == 0:
                break
            assert os.WIFSIGNALED(status), "a child failed by itself"
            killed += 1
            saving += bool(list(folder.glob(f".{path.name}*.tmp")))
            if path.exists():
                within += checkpoint.load(path).training["position"] is not None
        assert_same_files(folder / "whole", path)
        for epoch in (2, 4):
            assert_same_files(f"{folder / 'whole'}.e{epoch}", f"{path}.e{epoch}")
        # The next save of a file writes to a killed run's temporary file.
        assert len(list(folder.glob(f".{path.name}*.tmp"))) == 0
    assert within > kills // 4, "the kills came too early to show anything"
    print(
        f"{cell}: {killed} kills, {saving} of them while saving; {within} left a state within an "
        f"epoch; {runs} runs ({seconds:.1f} s undisturbed)"
    )


if __name__ == "__main__":
    survive(*sys.argv[1:4], int(sys.argv[4]))
