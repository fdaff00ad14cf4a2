"""run/rehearsal.py: what breaks silently in a changed network is refused or found."""

import collections
import copy
import math
import pathlib
import random

import numpy as np
import pytest
import torch
from conftest import TINY
from torch import nn

import fast.step
import main
import model
import nt_asgd
from checkpoint import resume
from cli import flags
from dynamic_evaluation import DynamicEvaluation
from fast.nt_asgd import FastNTASGD
from loss import TrainingLoss
from run.rehearsal import CHECKS, Failed, Rehearsal, differing
from run.session import Session
from splitcross import SplitCrossEntropyLoss
from training import TrainingStep
from utils import ToolkitError


@pytest.fixture
def argv(corpus_dir):
    return ["--data", str(corpus_dir), *TINY, "--lr", "3"]


@pytest.fixture
def rehearsal(argv, tmp_path):
    return Rehearsal(main.build_parser(), argv, str(tmp_path))


def extended(monkeypatch, part, forward=None):
    """Make every TrainingLoss hold `part()` as `part`, and call `forward(network, losses)`."""
    begin, once = TrainingLoss.__init__, TrainingLoss.forward

    def init(self, *args, **options):
        begin(self, *args, **options)
        self.part = part()

    def call(self, data, targets, hidden):
        loss, raw_loss, hidden = once(self, data, targets, hidden)
        return (forward(self, loss), raw_loss, hidden) if forward else (loss, raw_loss, hidden)

    monkeypatch.setattr(TrainingLoss, "__init__", init)
    monkeypatch.setattr(TrainingLoss, "forward", call)


def head():
    torch.manual_seed(3)
    return nn.Linear(3, 2)


def with_head(network, loss):
    return loss + network.part(torch.ones(3)).square().sum()


def teacher():
    part = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    return part.requires_grad_(False).eval()


def noisy(kind, monkeypatch, rate=1.0):
    """Give the loss or the cell a noise of its own in training."""
    once = kind.forward

    def forward(self, *args):
        result = once(self, *args)
        noise = rate * torch.rand(()) if self.training else 0.0
        return (result[0] + noise, *result[1:]) if isinstance(result, tuple) else result + noise

    monkeypatch.setattr(kind, "forward", forward)


def with_numpy_noise(network, loss):
    return loss * (1 + 0.1 * np.random.rand() + 0.1 * random.random())  # noqa: NPY002


@pytest.mark.parametrize("cell", ["LSTM", "QRNN"])
def test_a_rehearsal_passes_and_leaves_nothing(cell, argv, script, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    status, out, err = script("main", *argv, "--model", cell, "--rehearse", "--save", "x.pt")
    assert (status, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == [f"| ok     | {c}" for c in CHECKS]
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_that_fails_says_so_in_its_exit_status(argv, script, monkeypatch):
    for kind in (nt_asgd.NTASGD, FastNTASGD):
        monkeypatch.setattr(kind, "step", lambda self, **options: None)
    status, out, err = script("main", *argv, "--rehearse")
    assert status == 1
    assert out.startswith("| failed | training: unchanged by the optimiser: model.decoder.bias, ")
    assert err.endswith("1 of the checks failed: mend what they name, then train\n")


@pytest.mark.parametrize("how", ["--resume", "torchrun"])
def test_what_cannot_be_rehearsed_is_refused(how, argv, script, monkeypatch):
    if how == "torchrun":
        monkeypatch.setenv("RANK", "0")
    else:
        argv += ["--resume", "m.pt"]
    status, out, err = script("main", *argv, "--rehearse")
    assert (status, out) == (1, "")
    assert f"leave {how} out" in err


def test_weights_of_the_loss_are_trained_saved_resumed_and_used_in_evaluation(
    rehearsal, monkeypatch
):
    extended(monkeypatch, head, with_head)
    once = TrainingLoss.forward

    def forward(self, *batch):
        loss, raw_loss, hidden = once(self, *batch)
        return loss, raw_loss + self.part.weight.detach().square().sum(), hidden

    monkeypatch.setattr(TrainingLoss, "forward", forward)
    assert rehearsal.training() == "every weight changes"
    assert rehearsal.file.loss.keys() == {"part.weight", "part.bias"}
    assert "the recorded validation loss" in rehearsal.model_file()
    assert "the same bit for bit" in rehearsal.stopping()


def test_weights_of_the_loss_that_the_optimiser_lacks_are_named(rehearsal, monkeypatch):
    extended(monkeypatch, head, with_head)
    init = nt_asgd.NTASGD.__init__
    monkeypatch.setattr(
        nt_asgd.NTASGD, "__init__", lambda self, params, *args: init(self, params[:-2], *args)
    )
    with pytest.raises(Failed, match=r"by the optimiser: part\.bias, part\.weight"):
        rehearsal.training()


def test_weights_without_a_gradient_are_named(rehearsal, monkeypatch):
    extended(monkeypatch, head)
    assert rehearsal.training().endswith("without gradient: part.bias, part.weight")


def test_a_frozen_part_keeps_its_mode(rehearsal, monkeypatch):
    extended(monkeypatch, teacher)
    assert rehearsal.training() == "every weight changes"


@pytest.mark.parametrize("woken", [True, False], ids=["by train()", "from the start"])
def test_a_frozen_part_in_training_mode_is_found(woken, rehearsal, monkeypatch):
    extended(monkeypatch, lambda: teacher().train(not woken))
    if woken:
        monkeypatch.setattr(TrainingLoss, "train", nn.Module.train)
    with pytest.raises(Failed, match=r"frozen, but not in evaluation mode: part, part\.0"):
        rehearsal.training()


@pytest.mark.parametrize("stays", [False, True])
def test_a_criterion_that_stays_in_training_mode_is_found(stays, rehearsal, monkeypatch):
    noisy(SplitCrossEntropyLoss, monkeypatch)
    rehearsal.training()
    if not stays:
        assert "from it" in rehearsal.model_file()
        return
    monkeypatch.setattr(TrainingLoss, "eval", lambda self: self.model.eval() and self)
    with pytest.raises(Failed, match="not in evaluation mode: the network"):
        rehearsal.model_file()


def test_an_argument_that_the_file_lacks_is_found(rehearsal, monkeypatch):
    class Tempered(SplitCrossEntropyLoss):
        def forward(self, weight, bias, hiddens, targets):
            return super().forward(8 * weight, bias, hiddens, targets)

    def make_network(*args, **options):
        network, _ = once(*args, **options)
        return network, Tempered(network.decoder.in_features, [])

    once = model.make_network
    # main.py's, not the later stages': they make the network without the argument.
    monkeypatch.setattr(main, "make_network", make_network)
    rehearsal.training()
    with pytest.raises(Failed, match=r"the validation loss from it is .*, the recorded one"):
        rehearsal.model_file()


def without_its_state(self, x, state, once=model.LSTM.forward):
    return once(self, x, state)[0], state


def with_the_future(self, x, state, once=model.LSTM.forward):
    output, state = once(self, x, state)
    return output + output.mean(dim=0), state


def with_the_other_columns(self, x, state, once=model.LSTM.forward):
    output, state = once(self, x, state)
    return output - output.mean(dim=1, keepdim=True), state


@pytest.mark.parametrize("forward", [without_its_state, with_the_future, with_the_other_columns])
def test_outputs_that_depend_on_the_chunks_or_the_columns_are_found(
    forward, rehearsal, monkeypatch
):
    monkeypatch.setattr(model.LSTM, "forward", forward)
    rehearsal.training()
    with pytest.raises(Failed, match="outputs depend on the chunks or the other columns"):
        rehearsal.model_file()


@pytest.mark.parametrize(
    ("method", "shift", "fault"),
    [
        ("logprob", 0.5, "logprob do not add up to 1, by 6"),
        ("target_logprob", 0.25, "target_logprob is not that of its logprob, by"),
    ],
)
def test_a_criterion_that_contradicts_itself_is_found(method, shift, fault, rehearsal, monkeypatch):
    once = getattr(SplitCrossEntropyLoss, method)
    monkeypatch.setattr(
        SplitCrossEntropyLoss, method, lambda self, *args: once(self, *args) + shift
    )
    rehearsal.training()
    with pytest.raises(Failed, match=fault):
        rehearsal.model_file()


def test_weights_outside_of_the_network_are_found(rehearsal, monkeypatch):
    hidden = [head()]
    extended(
        monkeypatch, nn.Module, lambda network, loss: loss + hidden[0](torch.ones(3)).square().sum()
    )
    with pytest.raises(Failed, match=r"no part of the network: a tensor of the size \("):
        rehearsal.training()


@pytest.mark.parametrize("shared", [True, False])
def test_a_flag_that_does_nothing_is_found(shared, rehearsal, monkeypatch):
    once = flags.add_regularisers

    def add_regularisers(parser):
        once(parser)
        parser.flag("regularisation", "--gamma", 0.0, "a weight", derive=lambda values: 0.5)

    if shared:
        monkeypatch.setattr(flags, "add_regularisers", add_regularisers)
        rehearsal.parser = main.build_parser()
        with pytest.raises(Failed, match=r"main\.py does not use --gamma"):
            rehearsal.training()
    else:
        rehearsal.training()
        rehearsal.args["gamma"] = 0.5
        rehearsal.parser.flag("regularisation", "--gamma", 0.0, "a weight")
        with pytest.raises(Failed, match=r"finetune\.py does not use --gamma"):
            rehearsal.finetuning()


@pytest.mark.parametrize("lost", [False, True])
def test_random_numbers_of_numpy_and_of_python_are_resumed(lost, rehearsal, monkeypatch):
    extended(monkeypatch, nn.Module, with_numpy_noise)
    rehearsal.training()
    if not lost:
        assert "the same bit for bit" in rehearsal.stopping()
        return
    monkeypatch.setattr(
        resume, "set_random_states", lambda states: torch.set_rng_state(states["cpu"])
    )
    with pytest.raises(Failed, match="values of the resumed run differ, such as model"):
        rehearsal.stopping()


def test_a_state_that_no_file_holds_is_found(rehearsal, monkeypatch):
    def counted(network, loss):
        network.count = getattr(network, "count", 0) + 1
        return loss * (1 + 1 / network.count)

    extended(monkeypatch, nn.Module, counted)
    rehearsal.training()
    with pytest.raises(Failed, match="values of the resumed run differ"):
        rehearsal.stopping()


@pytest.mark.parametrize("mode", [False, True])
def test_dynamic_evaluation_is_in_evaluation_mode(mode, rehearsal, monkeypatch):
    noisy(model.LSTM, monkeypatch)
    rehearsal.training()
    if not mode:
        assert "dynamiceval.py run" in rehearsal.later_stages()
        return
    begin = TrainingStep.begin

    def begin_in_training_mode(step, position=None):
        begin(step, position)
        step.network.train(isinstance(step.optimizer, DynamicEvaluation))

    monkeypatch.setattr(TrainingStep, "begin", begin_in_training_mode)
    with pytest.raises(Failed, match=r"at rate 0 dynamiceval\.py gives the perplexity"):
        rehearsal.later_stages()


def test_a_faster_form_that_is_off_is_found(rehearsal, monkeypatch):
    def uphill(step):
        step.optimizer.step(gradient_scale=torch.tensor(-1.0))

    rehearsal.training()
    monkeypatch.setattr(fast.step.FastStep, "update", uphill)
    monkeypatch.setattr("fast.check.TOLERANCE", collections.defaultdict(lambda: math.inf))
    with pytest.raises(Failed, match="their validation loss is"):
        rehearsal.forms()


def test_differences_are_named():
    tree = {"a": [1, (torch.zeros(2), "x")], "b": None}
    other = copy.deepcopy(tree)
    assert list(differing(tree, other)) == []
    other["a"][1][0][1] = 1.0
    assert list(differing(tree, other)) == ["a.1.0"]
    assert list(differing(tree, {**tree, "b": 0, "c": None})) == ["b", "c"]
    assert list(differing([1], [1.0])) == ["0"]


# What is refused before training


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ("config", np.float64(0.1), r"config\.dropout, a float64"),
        ("args", pathlib.Path("x"), r"args\.own, a P\w*Path"),
        ("stateful", np.random.RandomState(0).get_state(), r"stateful\.own\[1\], a ndarray"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(place, value, named, argv, tmp_path, monkeypatch):
    prepare = Session.prepare

    def prepared(session, *args):
        if place == "args":
            session.args.own = value
        prepare(session, *args)
        if place == "config":
            session.config["dropout"] = value
        if place == "stateful":
            session.stateful["own"] = type("Own", (), {"state_dict": lambda self: value})()

    monkeypatch.setattr(Session, "prepare", prepared)
    with pytest.raises(ToolkitError, match=f"a model file cannot hold {named}"):
        main.main([*argv, "--save", str(tmp_path / "m.pt"), "--epochs", "1"])
    assert list(tmp_path.iterdir()) == []


def test_a_flag_that_the_network_contradicts_is_refused(argv, tmp_path, monkeypatch):
    prepare = Session.prepare

    def prepared(session, corpus, config, *others):
        prepare(session, corpus, {**config, "alpha": 9.0}, *others)

    monkeypatch.setattr(Session, "prepare", prepared)
    with pytest.raises(ToolkitError, match=r"--alpha 2\.0 has no effect on .* made with 9\.0: add"):
        main.main([*argv, "--save", str(tmp_path / "m.pt")])


State = collections.namedtuple("State", "h")


@pytest.mark.parametrize("state", [torch.zeros(8, 1, 4), torch.zeros(3), State(torch.zeros(1, 8))])
def test_a_state_that_cannot_be_carried_is_refused(state, argv, tmp_path, monkeypatch):
    monkeypatch.setattr(model.LSTM, "initial_state", lambda self, bsz: state)
    with pytest.raises(ToolkitError, match="the network's initial state cannot be carried"):
        main.main([*argv, "--save", str(tmp_path / "m.pt")])


# What holds for any change


def test_clipped_gradients_are_scaled_and_then_any_optimiser_steps():
    network, source = fast.step._Toy(torch.zeros(1)), torch.arange(60).view(20, 3) * 7 % 9
    twin = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    step = TrainingStep(network, optimizer, source, bptt=3, clip=1e-4)
    fast.choose(network, optimizer, step)
    hidden, momentum = twin.init_hidden(3), 0.0
    for row in (0, 3, 6):
        step.take(3, 3)
        twin.weight.grad = None
        loss, _, hidden = twin(
            source[row : row + 3], source[row + 1 : row + 4].flatten(), [h.detach() for h in hidden]
        )
        loss.backward()
        grad = twin.weight.grad
        assert grad.norm() > 1e-4
        momentum = 0.9 * momentum + grad * 1e-4 / (grad.norm() + 1e-6)
        twin.weight.data -= 0.5 * momentum
    torch.testing.assert_close(network.weight, twin.weight)


def test_a_weight_without_a_gradient_is_left_out_of_the_mean():
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    rms = [torch.tensor([1.0, 3.0]), torch.zeros(2), torch.tensor([4.0, 4.0])]
    assert DynamicEvaluation(params, rms, lr=1.0, lamb=1.0).mean == 3.0


def test_a_criterion_needs_no_splits_for_graphs():
    network = fast.step._Toy(torch.zeros(1))
    network.criterion = nn.Module()
    optimizer = nt_asgd.NTASGD(network.parameters(), 1.0)
    source = torch.zeros(9, 3, dtype=torch.int64)
    step = TrainingStep(network, optimizer, source, bptt=3, clip=0.1)
    fast.choose(network, optimizer, step)
    assert "fast/cuda_graphs.py does not do" in fast.record_steps(step)
