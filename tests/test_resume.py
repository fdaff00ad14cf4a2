"""checkpoint/resume.py: a session resumes exactly from any state it saves; damage is refused."""

import contextlib
import copy
import functools

import pytest
import torch
from conftest import TINY, put
from torch import nn

import checkpoint
import main
from cli import flags
from loss import TrainingLoss
from model import CELLS, make_network
from nt_asgd import NTASGD
from run.corpus import read_corpus
from run.device import has_bf16
from run.ranks import Ranks
from run.rehearsal import differing
from run.session import open_session, resumed_file
from training import train_epoch
from utils import ToolkitError


class Counting(nn.GRUCell):
    """A cell with buffers of integers and of infinity, and a dictionary as its state.

    Its constructor reads numbers from a tensor, and the weights of PyTorch's orthogonal map are not
    contiguous.
    """

    weight_drop = ("weight_hh",)

    def __init__(self, n_in, n_out, layer):
        super().__init__(n_in, n_out)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.rates = torch.linspace(0.5, 1, 2).tolist()
        self.turned = nn.utils.parametrizations.orthogonal(nn.Linear(n_out, n_out))

    def initial_state(self, bsz):
        zeros = self.bias_hh.new_zeros(1, bsz, self.hidden_size)
        return {"h": zeros, "sum": [zeros.clone()]}

    def forward(self, x, state):
        h, outputs = state["h"][0], []
        for x_t in x:
            h = super().forward(x_t, h)
            outputs.append(self.rates[0] * self.turned(h))
        self.steps += len(x)
        return torch.stack(outputs), {"h": h.unsqueeze(0), "sum": [state["sum"][0] + h]}


@pytest.fixture(autouse=True)
def counting(monkeypatch):
    monkeypatch.setitem(CELLS, "COUNTING", Counting)


def averaging(params):
    optimizer = NTASGD(params, 2.0, 1e-4)
    optimizer.start_averaging()
    return optimizer


def in_groups(params):
    groups = [{"params": params[:1], "lr": 0.0}, {"params": params[1:], "momentum": 0.5}]
    return torch.optim.SGD(groups, lr=1.0, weight_decay=1e-4)


class Preconditioned(torch.optim.SGD):
    """An optimiser of one's own: attributes, a count in Python, and square matrices in a list."""

    def __init__(self, params, every):
        super().__init__(params, lr=0.5)
        self.every = every

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state, rows = self.state[p], p.grad.flatten(1) if p.dim() > 1 else p.grad[None]
            state["steps"] = state.get("steps", 0) + 1
            [square] = state.setdefault("squares", [torch.eye(len(rows))])
            if state["steps"] % self.every == 0:
                square.lerp_(rows @ rows.t(), 0.1)
            p.grad.copy_((square @ rows).view_as(p))
        super().step()


OPTIMIZERS = {
    "NT-ASGD": lambda params: NTASGD(params, 2.0, 1e-4),
    "NT-ASGD, averaging": averaging,
    "a rate of 0": lambda params: NTASGD(params, 0.0),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "Adam with amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True, fused=True),
    "several groups": in_groups,
    "no weight decay": lambda params: torch.optim.Rprop(params, lr=0.01),
    "one's own": lambda params: Preconditioned(params, every=2),
    "a row and a column": lambda params: torch.optim.Adafactor(params, lr=0.01),
}


@contextlib.contextmanager
def a_session(path, corpus_dir, cell, optimizer, *more):
    """A session of main.py on the tiny corpus, resumed from `path` if that file exists."""
    argv = ["--data", str(corpus_dir), *TINY, "--model", cell, "--save", str(path), *more]
    source = recorded = None
    if path.exists():
        argv += ["--resume", str(path)]
        source, recorded = resumed_file(str(path), "main.py")
    parser = main.build_parser()
    args = parser.settle(parser.given(argv), recorded)
    with open_session(parser, args, Ranks()) as session:
        if source is None:
            corpus = read_corpus(args).sorted_by_frequency()
            sizes = {"ntoken": len(corpus.dictionary), "ninp": 12, "nhid": 16, "nlayers": 2}
            config = {"splits": [20], "rnn_type": cell, **sizes, "tie_weights": True}
            config |= flags.dropouts(args)
            modules = make_network(**config)
        else:
            corpus, config = read_corpus(args, source.dictionary), source.config
            modules = checkpoint.rebuild(source, session.device)
        network = TrainingLoss(*modules)
        session.prepare(corpus, config, network, OPTIMIZERS[optimizer](list(network.parameters())))
        if optimizer == "SGD with momentum":
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(session.optimizer, 9)
            session.stateful["schedule"] = schedule
        if source is not None:
            session.resume(source)
        yield session


def train(session, epoch, batches):
    session.begin_epoch(epoch)
    for _ in train_epoch(session.step, session.rng, max_batches=batches):
        session.after_batch()


def end_epoch(session):
    session.finished = session.epoch
    for schedule in session.stateful.values():
        schedule.step()


@pytest.mark.parametrize("ended", [False, True], ids=["within an epoch", "after an epoch"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cell", [*CELLS, "COUNTING"])
def test_what_is_saved_is_resumed_exactly(cell, optimizer, ended, corpus_dir, tmp_path):
    with a_session(tmp_path / "whole", corpus_dir, cell, optimizer) as session:
        train(session, 1, 3 if ended else 5)
        if ended:
            end_epoch(session)
            train(session, 2, 2)
        whole = session._training_state()
    path = tmp_path / "m.pt"
    with a_session(path, corpus_dir, cell, optimizer) as session:
        train(session, 1, 3)
        if ended:
            end_epoch(session)
        session.save()
    # Every stage can use the file.
    checkpoint.rebuild(checkpoint.load(path), torch.device("cpu"))
    with a_session(path, corpus_dir, cell, optimizer) as session:
        train(session, 1 + ended, 2 if ended else 5)
        state = {**session._training_state(), "args": whole["args"]}
        assert list(differing(whole, state)) == []


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="this CPU has no bfloat16")
@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_is_resumed_exactly(cell, corpus_dir, tmp_path, monkeypatch, capsys):
    low = functools.partial(TrainingLoss, bf16=True)
    monkeypatch.setitem(globals(), "TrainingLoss", low)
    test_what_is_saved_is_resumed_exactly(cell, "NT-ASGD", False, corpus_dir, tmp_path)
    assert ("fast.rnn_bf16" in capsys.readouterr().out) == (cell != "QRNN")


def test_a_changed_setting_takes_effect_and_the_others_continue(corpus_dir, tmp_path, monkeypatch):
    with a_session(tmp_path / "m.pt", corpus_dir, "LSTM", "AdamW") as session:
        train(session, 1, 3)
        session.optimizer.param_groups[0]["lr"] = 0.001  # as a schedule by batch sets it
        session.save()
    weaker = {"AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, betas=(0.5, 0.9))}
    for made, betas in ((OPTIMIZERS, (0.9, 0.999)), (weaker, (0.5, 0.9))):
        monkeypatch.setitem(OPTIMIZERS, "AdamW", made["AdamW"])
        with a_session(tmp_path / "m.pt", corpus_dir, "LSTM", "AdamW") as session:
            (group,) = session.optimizer.param_groups
            assert (group["lr"], tuple(group["betas"])) == (0.001, betas)


def test_a_rate_that_a_schedule_would_override_is_refused(corpus_dir, tmp_path):
    run = (tmp_path / "m.pt", corpus_dir, "LSTM", "SGD with momentum")
    with a_session(*run, "--lr", "0.25") as session:
        session.save()
    with a_session(*run, "--lr", "0.25"):
        pass
    with (
        pytest.raises(
            ToolkitError, match=r"--lr 0\.5 has no effect: a schedule continues from .*5"
        ),
        a_session(*run, "--lr", "0.5"),
    ):
        pass


def test_a_network_whose_file_could_not_be_read_is_refused_before_training(
    corpus_dir, tmp_path, monkeypatch
):
    def with_an_adapter(*args, **options):
        model, criterion = make_network(*args, **options)
        model.adapter = nn.Linear(2, 2)
        return model, criterion

    monkeypatch.setattr(main, "make_network", with_an_adapter)
    argv = ["--data", str(corpus_dir), *TINY, "--save", str(tmp_path / "m.pt")]
    with pytest.raises(ToolkitError, match=r"could not be read \(.*[Uu]nexpected key.*adapter"):
        main.main(argv)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_a_slice_is_refused_before_training(corpus_dir, tmp_path, monkeypatch):
    def with_a_slice(*args, **options):
        model, criterion = make_network(*args, **options)
        cell = model.rnns[0].module
        cell.bias_hh_l0 = nn.Parameter(cell.bias_hh_l0.detach().repeat_interleave(2)[::2])
        return model, criterion

    monkeypatch.setattr(main, "make_network", with_a_slice)
    argv = ["--data", str(corpus_dir), *TINY, "--epochs", "1", "--save", str(tmp_path / "m.pt")]
    with pytest.raises(ToolkitError, match=r"model\.rnns\.0\..*bias_hh_l0 is a slice of a larger"):
        main.main(argv)


@pytest.fixture(scope="module")
def within_an_epoch(tmp_path_factory, corpus_dir):
    """The model file of an averaging run, saved within an epoch."""
    path = tmp_path_factory.mktemp("state") / "m.pt"
    with a_session(path, corpus_dir, "LSTM", "NT-ASGD, averaging") as session:
        train(session, 1, 3)
        session.save()
    return checkpoint.load(path)


DAMAGE = {
    "another group": put("optimizer", "param_groups", to=lambda groups: groups * 2),
    "weights of another size": put("model", "decoder.bias", to=lambda t: t[:-1]),
    "weights lost": put("model", to={}),
    "a short key": put("rng", to=["MT19937", [1, 2], 0, 0, 0.0]),
    "an older file's generator": put("rng", to="[]"),
    "a short random state": put("random_states", 0, "cpu", to=lambda t: t[:9]),
    "another object's state": put("stateful", to={"schedule": {}}),
    "a field lost": lambda state: state.pop("random_states"),
    "no position": lambda state: state.pop("position"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_state_cannot_be_resumed_but_its_model_stays(
    case, within_an_epoch, corpus_dir, tmp_path
):
    path, damaged = tmp_path / "m.pt", copy.deepcopy(within_an_epoch)
    DAMAGE[case](damaged.training)
    checkpoint.save(path, damaged)
    message = r"m\.pt cannot be resumed \(.*its model can still be used"
    with (
        pytest.raises(ToolkitError, match=message),
        a_session(path, corpus_dir, "LSTM", "NT-ASGD, averaging"),
    ):
        pass
    checkpoint.rebuild(checkpoint.load(path), torch.device("cpu"))
