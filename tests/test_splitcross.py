"""splitcross.py and its faster form against Python floats, with one to four buckets."""

import pytest
import references
import torch

import fast.splitcross
from fast.splitcross import FastSplitCrossEntropyLoss
from splitcross import SplitCrossEntropyLoss, default_splits

NTOKEN, SIZE = 23, 6
SPLITS = [[], [5], [5, 12], [5, 12, 20]]


@pytest.fixture(params=[SplitCrossEntropyLoss, FastSplitCrossEntropyLoss], ids=["plain", "fast"])
def kind(request):
    return request.param


def criterion_and_data(kind, splits, n=64):
    torch.manual_seed(len(splits))
    criterion = kind(SIZE, splits, verbose=True).double()
    for p in criterion.parameters():
        torch.nn.init.normal_(p)
    weight = torch.randn(NTOKEN, SIZE, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(NTOKEN, dtype=torch.float64, requires_grad=True)
    hiddens = torch.randn(n, SIZE, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(NTOKEN, (n,))
    return criterion, weight, bias, hiddens, targets


def probabilities(criterion, weight, bias, hiddens):
    with torch.no_grad():
        if criterion.nsplits == 1:
            return (hiddens @ weight.t() + bias).softmax(dim=1)
        splits = criterion.splits[1:]
        tails, tail_bias = criterion.tail_vectors, criterion.tail_bias
        rows = [
            references.split_softmax(weight, bias, tails, tail_bias, splits, h) for h in hiddens
        ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("splits", SPLITS)
def test_against_the_definition(kind, splits):
    criterion, weight, bias, hiddens, targets = criterion_and_data(kind, splits)
    expected = probabilities(criterion, weight, bias, hiddens)
    torch.testing.assert_close(criterion.logprob(weight, bias, hiddens).exp(), expected)
    # The original counts the words of the second and later tails as the first's.
    losses = -expected[range(64), targets].log()
    torch.testing.assert_close(criterion(weight, bias, hiddens, targets), losses.mean())
    torch.testing.assert_close(criterion.target_logprob(weight, bias, hiddens, targets), -losses)


@pytest.mark.parametrize("splits", SPLITS)
def test_gradients(kind, splits):
    criterion, weight, bias, hiddens, targets = criterion_and_data(kind, splits, n=8)
    inputs = (weight, bias, hiddens, *criterion.parameters())

    def loss(weight, bias, hiddens, *_):
        return criterion(weight, bias, hiddens, targets)

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("target", [2, 7, 15, 21])
def test_a_batch_of_one_bucket_only(kind, target):
    criterion, weight, bias, hiddens, _ = criterion_and_data(kind, [5, 12, 20], n=1)
    loss = criterion(weight, bias, hiddens, torch.tensor([target]))
    expected = probabilities(criterion, weight, bias, hiddens)[0, target]
    torch.testing.assert_close(loss.exp(), 1 / expected)


def test_target_logprob_in_blocks(monkeypatch):
    kind = FastSplitCrossEntropyLoss
    criterion, weight, bias, hiddens, targets = criterion_and_data(kind, [5, 12])
    whole = criterion.target_logprob(weight, bias, hiddens, targets)
    monkeypatch.setattr(fast.splitcross, "MAX_LOGITS", 7 * NTOKEN)
    with torch.no_grad():
        torch.testing.assert_close(criterion.target_logprob(weight, bias, hiddens, targets), whole)


def test_parameters_are_the_tombstones():
    assert list(SplitCrossEntropyLoss(SIZE, []).state_dict()) == []
    state = SplitCrossEntropyLoss(SIZE, [5, 12]).state_dict()
    assert {name: tuple(p.shape) for name, p in state.items()} == {
        "tail_vectors": (2, SIZE),
        "tail_bias": (2,),
    }
    assert all((p == 0).all() for p in state.values())


@pytest.mark.parametrize("splits", [[5, 5], [5, 3], [0], [-1]])
def test_bad_splits(splits):
    with pytest.raises(ValueError, match="increasing"):
        SplitCrossEntropyLoss(SIZE, splits)


def test_a_split_beyond_the_vocabulary_is_an_error_and_default_splits_make_none(kind):
    criterion, weight, bias, hiddens, targets = criterion_and_data(kind, [5, NTOKEN])
    with pytest.raises(ValueError, match="no word"):
        criterion(weight, bias, hiddens, targets)
    assert default_splits(75_000) == []
    assert default_splits(75_001) == [2800, 20_000]
    assert default_splits(267_735) == [2800, 20_000, 76_000]
    assert default_splits(500_001) == [4200, 35_000, 180_000]
