"""The modules: which imports which, what an idea needs, and the effects of an import."""

import ast
import inspect
import json
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter

from conftest import ROOT, TINY

SCRIPTS = {path.stem for path in ROOT.glob("*.py") if "__main__" in path.read_text("utf-8")}
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"bench"}
ROOT_MODULES = {path.stem for path in ROOT.glob("*.py")} - SCRIPTS


def modules():
    """Every module outside tests, tools and bench by its name, with its file."""
    found = {path.stem: path for path in ROOT.glob("*.py")}
    for package in PACKAGES:
        for path in (ROOT / package).glob("*.py"):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            found[name] = path
    return found


MODULES = modules()


def imported(name):
    """The modules of ours that a module imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {n if n in MODULES else node.module for n in inner}
    return names & MODULES.keys() - {name}


def rooms(name):
    return {module.split(".")[0] for module in imported(name)} - {name.split(".")[0]}


def test_imports_make_no_circle_not_within_a_package_either():
    graph = {name: imported(name) for name in MODULES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert not SCRIPTS & set().union(*graph.values())
    assert {"main", "finetune", "pointer", "generate"} <= SCRIPTS


def test_ideas_know_no_mechanics():
    for name in ROOT_MODULES:
        assert rooms(name) <= ROOT_MODULES | {"qrnn", "files"}, name
    for name in MODULES:
        if name.startswith(("qrnn", "files")):
            assert rooms(name) <= {"utils"}, name
    # Only data.py reads files.
    assert [name for name in ROOT_MODULES if "files" in rooms(name)] == ["data"]


# Each idea's file: what it needs, and a step of training a toy with it alone in a folder.
ALONE = {
    "weight_drop": """
        cell = weight_drop.WeightDrop(torch.nn.LSTM(3, 4), ["weight_hh_l0"], 0.5)
        loss = cell(torch.randn(5, 2, 3))[0].square().mean()
    """,
    "locked_dropout": """
        cell = torch.nn.Linear(3, 4)
        loss = locked_dropout.LockedDropout()(cell(torch.randn(5, 2, 3)), 0.5).square().mean()
    """,
    "embed_regularize": """
        cell = torch.nn.Embedding(9, 4)
        loss = embed_regularize.embedded_dropout(cell, torch.arange(9), 0.5).square().mean()
    """,
    "splitcross": """
        cell = torch.nn.Linear(4, 9)
        criterion = splitcross.SplitCrossEntropyLoss(4, [3, 6])
        loss = criterion(cell.weight, cell.bias, torch.randn(7, 4), torch.arange(7))
    """,
    "nt_asgd": """
        cell = torch.nn.Linear(4, 9)
        optimizer = nt_asgd.NTASGD(cell.parameters(), 0.1)
        optimizer.start_averaging()
        loss = cell(torch.randn(7, 4)).square().mean()
    """,
    "dynamic_evaluation": """
        cell = torch.nn.Linear(4, 9)
        optimizer = dynamic_evaluation.DynamicEvaluation(cell.parameters(), None, 0.1, 0.1)
        loss = cell(torch.randn(7, 4)).square().mean()
    """,
    "continuous_cache": """
        cell = torch.nn.Linear(4, 4)
        cache = continuous_cache.ContinuousCache(3, 1.0, from_start=True)
        outputs = cell(torch.randn(7, 4))
        probs, _ = cache.target_prob(outputs.detach(), torch.arange(7) % 2)
        loss = outputs.square().mean() * probs.sum()
    """,
    "qrnn": """
        cell = qrnn.QRNN(3, 4, num_layers=2, window=2)
        loss = cell(torch.randn(5, 2, 3))[0].square().mean()
    """,
}


# Runs each idea in a fork, so that PyTorch is imported once.
FORKS = """
import json, os, sys
import torch
for folder, code in json.loads(sys.argv[1]).items():
    if not os.fork():
        sys.path[0] = folder
        exec(code)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(folder)
"""


def test_an_idea_works_copied_alone_into_an_empty_folder(tmp_path):
    work = {}
    for idea, toy in ALONE.items():
        folder = tmp_path / idea
        folder.mkdir()
        if (ROOT / idea).is_dir():
            shutil.copytree(ROOT / idea, folder / idea)
        else:
            shutil.copy(ROOT / f"{idea}.py", folder)
        lines = [f"import {idea}", *toy.strip().splitlines(), "loss.backward()"]
        lines += ["before = [p.clone() for p in cell.parameters()]"]
        lines += ["for p in () if 'optimizer' in dir() else cell.parameters(): p.data -= p.grad"]
        lines += ["if 'optimizer' in dir(): optimizer.step()"]
        lines += ["assert not all(map(torch.equal, before, cell.parameters()))"]
        work[str(folder)] = "\n".join(line.strip() for line in lines)
    command = [sys.executable, "-c", FORKS, json.dumps(work)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_flags_are_settled_once():
    """Nothing sets a flag after `Parser.settle`: the file records what the run really does."""
    found = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            for target in targets if isinstance(node, ast.Assign | ast.AugAssign) else ():
                if isinstance(target, ast.Attribute) and ast.unparse(target.value).endswith("args"):
                    found.append(f"{name}: {ast.unparse(node)}")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("setattr", "vars(args).update", "args.__dict__.update")
            ):
                found += [f"{name}: {ast.unparse(node)}"] * ("args" in ast.unparse(node))
    assert found == []


def test_a_step_is_short_to_follow(corpus_dir, tmp_path, monkeypatch):
    """From main.train to the optimiser's step: files and functions of ours, on the plain path."""
    import main
    import nt_asgd
    import training

    seen = set()

    def watch(frame, event, arg):
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if event == "call" and path.startswith(str(ROOT)) and name[0] != "<":
            seen.add((path.removeprefix(f"{ROOT}/"), frame.f_code))

    take = training.TrainingStep.take

    def traced(self, *args):
        frame = sys._getframe(1)  # train_epoch, and main.train which iterates over it
        while frame and frame.f_code.co_name != "main":
            watch(frame, "call", None)
            frame = frame.f_back
        sys.setprofile(watch)
        try:
            take(self, *args)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(training.TrainingStep, "take", traced)
    flags = ["--data", str(corpus_dir), *TINY, "--plain", "--epochs", "1", "--max-batches", "2"]
    main.main([*flags, "--save", str(tmp_path / "m.pt")])
    assert ("nt_asgd.py", inspect.unwrap(nt_asgd.NTASGD.step).__code__) in seen
    assert {"main.py", "training.py", "loss.py", "model.py"} <= {path for path, _ in seen}
    assert len({path for path, _ in seen}) <= 10, seen
    assert len(seen) <= 20, seen


def run_python(code, *flags):
    return subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_importing_is_silent_and_needs_neither_cupy_nor_a_gpu():
    code = (
        "import sys\n"
        "sys.modules['cupy'] = sys.modules['pynvrtc'] = None  # importing them now fails\n"
        f"import {', '.join(MODULES)}\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    result = run_python(code, "-W", "error")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_scripts_load_only_what_they_need(trained, corpus_dir, tmp_path):
    argv = ["--data", str(corpus_dir), *TINY, "--epochs", "1", "--save", str(tmp_path / "m.pt")]
    code = (
        "import sys, checkpoint, generate, pointer, score\n"
        f"checkpoint.rebuild(checkpoint.load({str(trained['LSTM'])!r}), 'cpu')\n"
        "assert not {'training', 'nt_asgd', 'run.session', 'fast.step'} & {*sys.modules}\n"
        "import main\n"
        "from run import program\n"
        "try:\n"
        f"    program.run(lambda: main.main({argv}))\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    assert run_python(code).returncode == 0
