"""fast/: aligned products, and the choice of the forms that agree with their definitions."""

import copy
import pydoc
import shutil
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import checkpoint
import fast
import fast.dynamic_evaluation
import fast.linear
import fast.nt_asgd
import fast.splitcross
import fast.step
import fast.weight_drop
import main
import qrnn
from dynamic_evaluation import DynamicEvaluation
from fast.linear import FastLinear
from loss import TrainingLoss
from model import make_network
from nt_asgd import NTASGD
from training import TrainingStep
from weight_drop import WeightDrop

MODULES = ("weight_drop", "linear", "splitcross", "nt_asgd", "dynamic_evaluation", "step")


@pytest.fixture(autouse=True)
def checked_anew():
    """Each test checks the forms for itself."""
    fast._problem.cache_clear()
    yield
    fast._problem.cache_clear()


# Products with aligned rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 7), (4, 16, 32), (6, 33, 17)])
def test_a_product_has_aligned_rows(sizes, dtype, monkeypatch):
    monkeypatch.setattr(fast.linear, "_mkl_is_slow", lambda: False)
    torch.manual_seed(0)
    rows, inner, columns = sizes
    a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype).t()
    result = fast.linear.matmul(a, b)
    expected = (a.double().unsqueeze(2) * b.double()).sum(dim=1)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)
    assert result.stride(0) * result.element_size() % 64 == 0
    assert 0 <= result.stride(0) - columns < 64 // result.element_size()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 7), (4, 16, 32), (60, 50, 3), (70, 400, 90)])
def test_where_mkl_is_slow_a_product_of_any_layout_is_onednn_s(sizes, monkeypatch):
    monkeypatch.setattr(fast.linear, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(torch, "mm", None)
    torch.manual_seed(0)
    rows, inner, columns = sizes
    wide = torch.randn(rows, inner + 3)[:, :inner]
    for a in (torch.randn(rows, inner), torch.randn(inner, rows).t(), wide):
        for b in (torch.randn(inner, columns), torch.randn(columns, inner).t()):
            expected = (a.double().unsqueeze(2) * b.double()).sum(dim=1)
            result = fast.linear.matmul(a, b).double()
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_no_rows_give_gradients_of_zero(monkeypatch):
    monkeypatch.setattr(fast.linear, "_mkl_is_slow", lambda: True)
    layer = FastLinear(5, 7)
    x = torch.zeros(0, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 5)
    assert not any(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_of_inputs_of_any_layout(bias):
    torch.manual_seed(0)
    layer = FastLinear(5, 7, bias=bias).double()
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    for given in (x[0, 0], x.transpose(0, 1), x.unsqueeze(1)):
        inputs = (given.requires_grad_(), *layer.parameters())
        expected = (given.unsqueeze(-2) * layer.weight).sum(-1) + (layer.bias if bias else 0)
        torch.testing.assert_close(layer(given), expected)
        assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs)


class TestRowsForAGPU:
    """The GPU's rule, rows at multiples of 16 bytes, on the CPU."""

    @pytest.fixture(autouse=True)
    def as_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(fast.linear, "_on_gpu", lambda tensor: True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_sizes_stay_and_rows_are_aligned(self, dtype):
        per_line = 16 // dtype.itemsize
        for columns in (1, 7, 8, 1550, 4650):
            tensor = fast.linear.empty((3, columns), torch.zeros(1, dtype=dtype))
            assert tensor.shape == (3, columns)
            assert tensor.stride(0) % per_line == 0
            assert 0 <= tensor.stride(0) - columns < per_line

    def test_products_see_aligned_operands_only(self, monkeypatch):
        seen = []
        mm = torch.mm

        def watched(a, b, out):
            seen.extend([a, b, out])
            return mm(a, b, out=out)

        monkeypatch.setattr(torch, "mm", watched)
        torch.manual_seed(0)
        layer = FastLinear(7, 5).double()
        contiguous = torch.randn(3, 2, 7, dtype=torch.float64)
        # The row stride is aligned, but the rows begin 8 bytes late.
        late = torch.randn(6, 8, dtype=torch.float64)[:, 1:]
        for x in (contiguous.requires_grad_(), late.requires_grad_()):
            inputs = (x, layer.weight)
            assert torch.autograd.gradcheck(lambda x, _: layer(x, with_bias=False), inputs)
        assert len(seen) > 9
        for matrix in seen:
            rows = matrix if matrix.stride(1) == 1 else matrix.t()
            assert rows.stride(1) == 1
            assert rows.stride(0) * 8 % 16 == 0
            assert rows.data_ptr() % 16 == 0

    def test_with_a_bias_it_is_the_plain_product(self):
        torch.manual_seed(0)
        layer, x = FastLinear(7, 5), torch.randn(3, 7)
        expected = (x.unsqueeze(1) * layer.weight).sum(dim=2) + layer.bias
        torch.testing.assert_close(layer(x), expected)
        assert layer(x).is_contiguous()


@pytest.mark.parametrize("with_rms", [True, False])
def test_dynamic_evaluation_in_many_blocks(with_rms, monkeypatch):
    monkeypatch.setattr(fast.dynamic_evaluation, "BLOCK", 7)
    torch.manual_seed(0)
    shapes = ((5, 4), (3, 9), (2,))
    starts, grads = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    rms = [torch.rand(shape) for shape in shapes] if with_rms else None
    results = []
    for kind in (DynamicEvaluation, fast.dynamic_evaluation.FastDynamicEvaluation):
        params = [start.clone().requires_grad_() for start in starts]
        optimizer = kind(params, rms, lr=0.1, lamb=0.7, epsilon=1e-3)
        for _ in range(3):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
        results.append(params)
    torch.testing.assert_close(*results)


# The choice


def network(cell="LSTM"):
    torch.manual_seed(0)
    sizes = {"ntoken": 40, "ninp": 6, "nhid": 9, "nlayers": 2, "tie_weights": True}
    return TrainingLoss(*make_network([], rnn_type=cell, wdrop=0.4, **sizes))


def kinds(*objects):
    return {type(part).__name__ for part in objects if type(part).__name__.startswith("Fast")}


def test_each_object_of_a_definition_s_class_gets_the_form_s():
    net = network("QRNN")
    optimizer = NTASGD(net.parameters(), 1.0)
    step = TrainingStep(net, optimizer, torch.zeros(9, 2).int(), bptt=3, clip=0.1)
    twin = copy.deepcopy(net)
    lines = fast.choose(net, optimizer, step)
    assert len(lines) == 1
    assert "fast.weight_drop" in lines[0]
    assert "qrnn.fused" in lines[0]
    assert kinds(*net.modules(), optimizer, step) == {
        "FastWeightDrop", "FastLinear", "FastSplitCrossEntropyLoss", "FastNTASGD", "FastStep",
    }  # fmt: skip
    assert list(net.state_dict()) == list(twin.state_dict())
    assert fast.choose(twin, plain=True) == ["Definitions only (--plain)"]
    assert kinds(*twin.modules()) == set()


def test_a_subclass_runs_its_own_code():
    class Own(WeightDrop):
        pass

    class OwnStep(TrainingStep):
        pass

    net = network()
    net.model.rnns[0].__class__ = Own
    optimizer = NTASGD(net.parameters(), 1.0)
    step = OwnStep(net, optimizer, torch.zeros(9, 2).int(), bptt=3, clip=0.1)
    fast.choose(net, optimizer, step)
    assert type(net.model.rnns[0]) is Own
    assert type(net.model.rnns[1]) is fast.weight_drop.FastWeightDrop
    assert type(step) is OwnStep


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("module", MODULES)
def test_the_check_draws_nothing_and_finds_agreement(module, bf16):
    before = torch.get_rng_state()
    with torch.inference_mode():
        form = next(name for name in fast.FORMS.values() if name.startswith(f"fast.{module}."))
        problem = fast._problem(form, torch.device("cpu"), torch.float32, bf16)
    assert problem == ""
    assert torch.equal(torch.get_rng_state(), before)


def breaking(module, how):
    """A method of a form, its results scaled, or raising."""
    places = {
        "weight_drop": (fast.weight_drop.FastWeightDrop, "drop"),
        "linear": (FastLinear, "forward"),
        "splitcross": (fast.splitcross.FastSplitCrossEntropyLoss, "forward"),
        "nt_asgd": (fast.nt_asgd.FastNTASGD, "step"),
        "dynamic_evaluation": (fast.dynamic_evaluation.FastDynamicEvaluation, "update"),
        "step": (fast.step.FastStep, "update"),
    }
    kind, name = places[module]
    original = getattr(kind, name)

    def broken(self, *args, **kwargs):
        if how == "raises":
            raise RuntimeError("no such function in this release")
        result = original(self, *args, **kwargs)
        if result is not None:
            return result * 1.01
        for group in getattr(self, "optimizer", self).param_groups:
            for p in group["params"]:
                p.data.mul_(1.01)
        return None

    return kind, name, broken


@pytest.mark.parametrize("how", ["raises", "is off by 1 %"])
@pytest.mark.parametrize("module", MODULES)
def test_a_form_that_fails_or_is_off_is_not_used_and_a_line_says_so(module, how, monkeypatch):
    kind, name, broken = breaking(module, how)
    monkeypatch.setattr(kind, name, broken)
    net = network("QRNN")
    optimizer = NTASGD(net.parameters(), 1.0)
    step = TrainingStep(net, optimizer, torch.zeros(9, 2).int(), bptt=3, clip=0.1)
    own = DynamicEvaluation(net.parameters(), None, 1.0, 1.0)
    lines = fast.choose(net, optimizer, step, own)
    reason = "no such function" if how == "raises" else r"its results differ by \d\.\de-0[123]"
    assert any(
        f"fast/{module}.py does not do what its definition does" in line for line in lines[1:]
    ), lines
    assert any(reason.split(" ")[0] in line for line in lines[1:])
    assert kind.__name__ not in kinds(*net.modules(), optimizer, step, own)


def test_a_share_that_is_off_is_found(monkeypatch):
    kept = fast.weight_drop._kept
    monkeypatch.setattr(
        fast.weight_drop, "_kept", lambda like, p, dtype: kept(like, p * 1.03, dtype)
    )
    lines = fast.choose(network())
    assert "it drops 3" in lines[1]


def test_a_way_of_the_qrnn_that_is_off_is_not_used():
    way = ModuleType("qrnn.off")
    way.forget_mult = qrnn.fused.forget_mult

    def pool(*args, **kwargs):
        h, last = qrnn.fused.pool(*args, **kwargs)
        return h * 1.01, last

    way.pool = pool
    with pytest.warns(UserWarning, match=r"qrnn/off\.py is not used .* differ by 1\.0e-02"):
        assert not qrnn.forget_mult._agrees(way, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("cell", ["LSTM", "QRNN", "GRU"])
def test_without_dropout_plain_and_fast_give_the_same_losses(cell, corpus_dir, tmp_path):
    off = "--dropout 0 --dropouth 0 --dropouti 0 --dropoute 0 --wdrop 0 --epochs 2 --lr 5".split()
    losses = []
    for plain in ([], ["--plain"]):
        path = tmp_path / f"{bool(plain)}.pt"
        flags = ["--data", str(corpus_dir), "--model", cell, *TINY, *off, "--save", str(path)]
        main.main([*flags, *plain])
        losses.append(checkpoint.load(path).training["valid_losses"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


EDITS = {
    "weight drop scales by 2": (
        "weight_drop.py",
        "return functional.dropout(raw, self.dropout)",
        "return 2 * functional.dropout(raw, self.dropout)",
        "fast/weight_drop.py",
    ),
    "another update": (
        "nt_asgd.py",
        'p -= group["lr"] * (p.grad',
        'p -= group["lr"] * (0.5 * p.grad',
        "fast/nt_asgd.py",
    ),
    "another loss": (
        "splitcross.py",
        "return -self.target_logprob(weight, bias, hiddens, targets).mean()",
        "return -0.5 * self.target_logprob(weight, bias, hiddens, targets).mean()",
        "fast/splitcross.py",
    ),
    "another penalty": ("loss.py", "dropped.float().pow(2)", "dropped.float().pow(4)", ""),
    "a clip that the check's small example does not reach": (
        "training.py",
        "        self.optimizer.step()",
        "        if self.source.size(1) > 3:\n            for p in self.params:\n"
        "                p.grad *= 0.1\n"
        "        self.optimizer.step()",
        "fast/step.py",
    ),
}


def trained_in(tree, corpus_dir, path):
    """The validation loss of a run of the main.py in `tree`, and its output."""
    flags = ["--data", corpus_dir, *TINY, "--lr", 5, "--epochs", 1, "--max-batches", 30]
    command = [sys.executable, "main.py", *flags, "--save", path]
    done = subprocess.run([*map(str, command)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return checkpoint.load(path).valid_loss, done.stdout


@pytest.fixture(scope="module")
def unedited(corpus_dir, tmp_path_factory):
    return trained_in(ROOT, corpus_dir, tmp_path_factory.mktemp("unedited") / "m.pt")[0]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_a_definition_takes_effect_and_is_reported(edit, unedited, corpus_dir, tmp_path):
    file, before, after, form = EDITS[edit]
    tree = tmp_path / "tree"
    unneeded = shutil.ignore_patterns("data", ".*", "*.pt", "results", "docs", "tests", "bench")
    shutil.copytree(ROOT, tree, ignore=unneeded)
    text = (tree / file).read_text("utf-8")
    assert text.count(before) == 1
    (tree / file).write_text(text.replace(before, after), "utf-8")
    loss, output = trained_in(tree, corpus_dir, tmp_path / "m.pt")
    assert loss != pytest.approx(unedited, rel=1e-4)
    assert ("it replaces " in output and "was edited): it is not used" in output) == bool(form)


def test_an_edit_of_the_recurrence_s_definition_takes_effect_where_no_check_reaches(tmp_path):
    shutil.copytree(ROOT / "qrnn", tmp_path / "qrnn")
    file = tmp_path / "qrnn" / "definition.py"
    file.write_text(
        file.read_text().replace("if output_gate else c\n", "if output_gate else 2 * c\n")
    )
    code = """
import torch
from qrnn import QRNNLayer
layer, x = QRNNLayer(4, 5, output_gate=False), torch.randn(3, 2, 4)
h, last = layer(x)
print(torch.equal(h[-1], 2 * last[0]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stdout == "True\n"
    assert "qrnn/fused.py is not used for torch.float32 on cpu: qrnn/definition.py was edited" in (
        result.stderr
    )


def test_the_digests_are_those_of_the_definitions():
    forms = [*fast.FORMS.values(), *fast.GPU_FORMS.values(), "fast.cuda_graphs.GraphedStep"]
    found = {form: fast.replaced(pydoc.locate(form))[1] for form in forms}
    assert {form: digest for form, digest in found.items() if digest} == fast.REPLACED
    assert qrnn.check.source_digest(qrnn.definition) == qrnn.forget_mult.DEFINITION
