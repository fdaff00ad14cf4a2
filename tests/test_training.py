"""training.py, utils.py, devices and ranks: an epoch compared with a plain loop, evaluation."""

import copy
import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ORIGINAL_CELLS, ROOT

import training
import utils
from checkpoint import CheckpointError
from loss import TrainingLoss
from model import CELLS, RNNModel
from nt_asgd import NTASGD
from run import device, log_lines, ranks
from run.ranks import Ranks
from run.session import Session
from splitcross import SplitCrossEntropyLoss
from training import TrainingStep


def make(rnn_type="LSTM", splits=(), **rates):
    torch.manual_seed(0)
    names = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")
    rates = {**dict.fromkeys(names, 0.0), **rates}
    model = RNNModel(rnn_type, 40, 6, 9, 2, **rates, tie_weights=True)
    return model, SplitCrossEntropyLoss(6, splits)


def stream(rows, bsz, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randint(40, size=(rows, bsz))).int()


def test_batchify():
    batches = utils.batchify(torch.arange(11), 3)
    assert batches.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert utils.batchify(torch.arange(3), 4).shape == (0, 4)


def test_get_batch():
    source = utils.batchify(torch.arange(20, dtype=torch.int32), 2)
    data, targets = utils.get_batch(source, 3, 4)
    assert data.tolist() == [[3, 13], [4, 14], [5, 15], [6, 16]]
    assert targets.tolist() == [4, 14, 5, 15, 6, 16, 7, 17]
    assert data.dtype == targets.dtype == torch.int64
    data, targets = utils.get_batch(source, 7, 4)
    assert data.tolist() == [[7, 17], [8, 18]]
    assert targets.tolist() == [8, 18, 9, 19]


def test_repackage_hidden():
    h = torch.ones(2, requires_grad=True) * 2
    detached = utils.repackage_hidden([(h, h), (h, h)])
    assert isinstance(detached, list)
    assert isinstance(detached[0], tuple)
    assert not any(t.requires_grad for pair in detached for t in pair)


def test_check_length():
    utils.check_length(torch.zeros(3, 2), "train.txt", "cure")
    with pytest.raises(utils.ToolkitError, match=r"train\.txt is too short for 2 columns.*cure"):
        utils.check_length(torch.zeros(2, 2), "train.txt", "cure")


def test_sequence_lengths():
    rng = np.random.RandomState(0)
    drawn = np.array([training.draw_seq_len(rng, 70) for _ in range(20000)])
    short = drawn < 52
    assert abs(short.mean() - 0.05) < 0.01
    # int() rounds down, by half a step on average.
    assert abs(drawn[~short].mean() - 69.5) < 0.2
    assert abs(drawn[~short].std() - 5) < 0.2
    assert abs(drawn[short].mean() - 34.5) < 0.5
    assert min(training.draw_seq_len(rng, 6) for _ in range(1000)) == 5
    assert max(training.draw_seq_len(rng, 70, 72) for _ in range(1000)) == 72


def test_regularisation_in_plain_numbers():
    torch.manual_seed(0)
    raw, dropped = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    ar = sum(float(v) ** 2 for v in dropped.flatten()) / 24
    tar = sum(
        (float(raw[t + 1, b, k]) - float(raw[t, b, k])) ** 2
        for t in range(3)
        for b in range(2)
        for k in range(3)
    )
    loss = TrainingLoss(*make(), alpha=2.0, beta=0.5)
    assert loss.penalty(raw, dropped).item() == pytest.approx(2 * ar + 0.5 * tar / 18, rel=1e-5)
    assert TrainingLoss(*make()).penalty(raw, dropped) == 0
    # A single step has no differences, and their mean would be NaN.
    assert TrainingLoss(*make(), beta=1.0).penalty(raw[:1], dropped[:1]) == 0


@pytest.mark.parametrize("rnn_type", ORIGINAL_CELLS)
@pytest.mark.parametrize(("splits", "clip"), [((), 0.2), ((), 0), ((10, 25), 0.2)])
def test_an_epoch_is_the_loop_written_out(rnn_type, splits, clip):
    # The split softmax's own parameters are also trained, clipped with the rest and averaged.
    model, criterion = make(rnn_type, splits)
    for p in criterion.parameters():
        torch.nn.init.normal_(p)
    twin, twin_criterion = copy.deepcopy(model), copy.deepcopy(criterion)
    source = stream(60, 3)
    lr, decay, alpha, beta = 3.0, 0.01, 2.0, 1.0

    params = [*model.parameters(), *criterion.parameters()]
    optimizer = NTASGD(params, lr, decay)
    optimizer.start_averaging()
    network = TrainingLoss(model, criterion, alpha=alpha, beta=beta)
    step = TrainingStep(network, optimizer, source, bptt=12, clip=clip)
    step.begin()
    batches = sum(1 for _ in training.train_epoch(step, np.random.RandomState(5)))

    rng = np.random.RandomState(5)
    params = [*twin.parameters(), *twin_criterion.parameters()]
    iterates = []
    total = tokens = i = 0
    hidden = twin.init_hidden(3)
    while i < 58:
        seq_len = training.draw_seq_len(rng, 12)
        n = min(seq_len, 59 - i)
        output, hidden, raw, dropped = twin(source[i : i + n], hidden, return_h=True)
        targets = source[i + 1 : i + 1 + n].flatten().long()
        weight, bias = twin.decoder.weight, twin.decoder.bias
        nll = -twin_criterion.logprob(weight, bias, output)[range(len(targets)), targets].mean()
        tar = (raw[-1][1:] - raw[-1][:-1]).pow(2).mean()
        loss = nll + alpha * dropped[-1].pow(2).mean() + beta * tar
        grads = torch.autograd.grad(loss, params)
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in grads))
        scale = min(1.0, clip / norm) if clip else 1.0
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p -= lr * seq_len / 12 * (scale * g + decay * p)
        iterates.append([p.detach().clone() for p in params])
        total += nll.item() * len(targets)
        tokens += len(targets)
        hidden = utils.repackage_hidden(hidden)
        i += n

    assert step.total.item() / step.row == pytest.approx(total / tokens, rel=1e-4)
    assert (step.row, step.batches) == (i, batches) == (i, len(iterates))
    for p, q in zip(optimizer.param_groups[0]["params"], params, strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-3)
    with optimizer.averaged():
        for p, *qs in zip(optimizer.param_groups[0]["params"], *iterates, strict=True):
            torch.testing.assert_close(p, torch.stack(qs).mean(0), atol=1e-5, rtol=1e-3)
    assert optimizer.param_groups[0]["lr"] == lr


@pytest.mark.parametrize("rnn_type", ORIGINAL_CELLS)
@pytest.mark.parametrize("splits", [(), (10, 25)])
def test_evaluation_is_the_mean_over_predicted_tokens(rnn_type, splits):
    # The original divides by one token too many, so its losses of short streams are too low.
    model, criterion = make(rnn_type, splits, dropout=0.5, dropouth=0.5, dropouti=0.5, wdrop=0.5)
    source = stream(23, 4)
    model.eval()
    with torch.no_grad():
        output, _ = model(source, model.init_hidden(4))
        logprob = criterion.logprob(model.decoder.weight, model.decoder.bias, output).view(
            23, 4, 40
        )
    losses = [-float(logprob[t, b, source[t + 1, b]]) for t in range(22) for b in range(4)]
    expected = sum(losses) / len(losses)
    for bptt in (1, 5, 7, 22, 23, 100):
        model.train()
        loss = training.evaluate(TrainingLoss(model, criterion), source, bptt)
        assert loss == pytest.approx(expected, rel=1e-5), bptt


def test_evaluation_records_no_gradient_and_training_goes_on_after_it():
    for rnn_type in ORIGINAL_CELLS:
        model, criterion = make(rnn_type, wdrop=0.5)
        optimizer = NTASGD(model.parameters(), 1.0)
        source = stream(40, 3)
        for _ in range(2):
            optimizer.zero_grad()
            assert math.isfinite(training.evaluate(TrainingLoss(model, criterion), source, 10))
            assert all(p.grad is None for p in model.parameters())
            train(model, criterion, optimizer, source)


def train(model, criterion, optimizer, source, bptt=6, clip=0.25, rng=None, **options):
    step = TrainingStep(TrainingLoss(model, criterion), optimizer, source, bptt=bptt, clip=clip)
    step.begin()
    for _ in training.train_epoch(step, rng or np.random.RandomState(0), **options):
        pass
    return step


def test_log_line_format():
    line = log_lines.batch_line(1, 200, 663, 30, 210.03, 6.7938)
    assert line == (
        "| epoch   1 |   200/  663 batches | lr 30.00000 | ms/batch 210.03 | "
        "loss  6.79 | ppl   892.30 | bpc    9.801"
    )
    assert log_lines.epoch_line(2, 155.68, 5.3442) == (
        "| end of epoch   2 | time: 155.68s | valid loss  5.34 | valid ppl   209.39 | "
        "valid bpc    7.710"
    )
    assert log_lines.end_line(5.2725) == (
        "| End of training | test loss  5.27 | test ppl   194.90 | test bpc    7.607"
    )
    line = log_lines.scored_line("pointer", "val", 4.00002)
    assert line == "| End of pointer | val loss  4.00 | val ppl    54.60"
    assert utils.perplexity(1e4) == math.inf


def test_max_batches():
    model, criterion = make()
    optimizer = NTASGD(model.parameters(), 1.0)
    assert train(model, criterion, optimizer, stream(200, 3), max_batches=3).batches == 3
    source = stream(50, 4)
    network = TrainingLoss(model, criterion)
    assert training.evaluate(network, source, 10, max_batches=2) == pytest.approx(
        training.evaluate(network, source[:21], 10)
    )


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.select_device(None).type == "cpu"
    assert device.select_device(False).type == "cpu"
    with pytest.raises(utils.ToolkitError, match="--cuda"):
        device.select_device(True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.select_device(None).type == "cuda"
    assert device.select_device(True).type == "cuda"
    assert device.select_device(False).type == "cpu"


def test_a_seed_gives_the_lengths_it_gave_in_the_original():
    # The original seeds numpy's global generator and draws from it in this order.
    state = np.random.get_state()
    try:
        np.random.seed(141)
        expected = []
        for _ in range(200):
            base = 70 if np.random.random() < 0.95 else 70 / 2.0
            expected.append(max(5, int(np.random.normal(base, 5))))
    finally:
        np.random.set_state(state)
    rng = utils.seed_everything(141)
    assert [training.draw_seq_len(rng, 70) for _ in range(200)] == expected


def test_deterministic():
    # In a separate process, because the setting cannot be undone.
    code = """if True:
        import os, torch
        from run.device import make_deterministic
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_columns_are_shared_out():
    all_ranks = [Ranks(rank, 3) for rank in range(3)]
    for columns in (3, 4, 5, 60, 61):
        spans = [r.span(columns) for r in all_ranks]
        assert spans[0][0] == 0
        assert spans[-1][1] == columns
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        sizes = [end - start for start, end in spans]
        assert max(sizes) - min(sizes) <= 1
    assert [r.span(2) for r in all_ranks] == [(0, 2)] * 3
    with pytest.raises(utils.ToolkitError, match="--batch_size 2"):
        ranks.check_columns(all_ranks[0], 2)
    source = torch.arange(10).view(2, 5)
    assert torch.equal(torch.cat([r.own(source) for r in all_ranks], dim=1), source)
    assert ranks.join(torch.device("cpu")).world == 1


class Half(Ranks):
    """One of two ranks in one process; `sessions` holds both ranks' sessions."""

    def __init__(self, rank, sessions):
        super().__init__(rank, 2)
        self.sessions = sessions

    def total(self, value):
        return sum(value if session.ranks is self else 0.0 for session in self.sessions)

    def gathered(self, value):
        steps = [session.step for session in self.sessions]
        text = [session._next_text() for session in self.sessions]
        return [{"hidden": s.hidden, "text": t} for s, t in zip(steps, text, strict=True)]


def session_of(step, ranks, position=None):
    """A session in the middle of an epoch, with no more than a position needs."""
    session = Session.__new__(Session)
    session.ranks, session.step, session.device = ranks, step, torch.device("cpu")
    session.args, session._position = SimpleNamespace(max_batches=None, epochs=1, bptt=9), position
    session._taken, session.best_loss = None, math.inf
    return session


@pytest.mark.parametrize("rnn_type", CELLS)
def test_a_position_is_saved_and_restored_by_any_number_of_ranks(rnn_type):
    model, criterion = make(rnn_type)
    source = stream(40, 5)
    alone = train(model, criterion, NTASGD(model.parameters(), 1.0), source, max_batches=2)
    position = session_of(alone, Ranks())._all_position()
    sessions = []
    for rank in (0, 1):
        ranks = Half(rank, sessions)
        half = TrainingStep(alone.network, alone.optimizer, ranks.own(source), bptt=6, clip=0)
        sessions.append(session_of(half, ranks, position))
        sessions[rank].begin_epoch(1)
        assert (half.row, half.batches, half.since) == (alone.row, 2, 2)
    assert [s.step.total.item() for s in sessions] == [alone.total.item(), 0.0]
    again = sessions[0]._all_position()
    assert again["row"] == position["row"]
    utils.map_state(
        lambda ours, theirs: torch.testing.assert_close(ours, theirs, rtol=0, atol=0),
        [again["hidden"], again["text"]],
        [position["hidden"], position["text"]],
    )
    # A text in another order is refused.
    half.source.copy_(half.source.roll(1, dims=0))
    with pytest.raises(CheckpointError, match="the text does not go on as it did"):
        session_of(half, Half(1, sessions), position).begin_epoch(1)


@pytest.fixture
def own_precision():
    """Restore the global float32 precision settings after the test."""
    old = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(old[0])
    torch.backends.cudnn.allow_tf32 = old[1]


@pytest.mark.parametrize("recorded", [{}, {"precision": None}, {"precision": "fp32"}])
def test_a_model_is_scored_in_the_precision_of_its_evaluations(recorded, own_precision):
    expected = {"fp32": ("highest", False)}.get(recorded.get("precision"), ("high", True))
    device.score_as_trained(recorded, torch.device("cuda"))
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == expected
    # The CPU has no tf32, but can score a model that was trained with tf32.
    device.score_as_trained({"precision": "tf32"}, torch.device("cpu"))
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == expected


def test_precisions_that_a_cpu_cannot(monkeypatch):
    cpu = torch.device("cpu")
    assert device.set_precision(None, cpu) == "fp32"
    with pytest.raises(
        utils.ToolkitError, match=r"tf32 is a format of GPUs: .* give --precision fp32"
    ):
        device.set_precision("tf32", cpu)
    for has, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has)
        assert device.set_precision(name, cpu) == name
    with pytest.raises(utils.ToolkitError, match=r"bf16 would be slower .* leave the flag out"):
        device.set_precision("bf16", cpu)
