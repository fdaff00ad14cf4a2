"""nt_asgd.py and its faster form: update and average in plain numbers, and the trigger."""

import pytest
import torch

from fast.nt_asgd import FastNTASGD
from nt_asgd import NTASGD, NonMonotonicTrigger


@pytest.fixture(params=[NTASGD, FastNTASGD], ids=["plain", "fast"])
def kind(request):
    return request.param


def test_update_and_average_in_plain_numbers(kind):
    lr, decay = 0.5, 0.1
    p = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    optimizer = kind([p], lr, decay)
    raw = p.detach().clone()
    iterates = []
    for step in range(7):
        if step == 3:
            optimizer.start_averaging()
        p.grad = p.detach() * (step + 1)
        optimizer.step()
        raw = raw - lr * (raw * (step + 1) + decay * raw)
        torch.testing.assert_close(p.detach(), raw)
        assert optimizer.averaging == (step >= 3)
        if step >= 3:
            iterates.append(raw)
        # Before the switch there is no average, and the raw weights stay.
        expected = torch.stack(iterates or [raw]).mean(dim=0)
        with optimizer.averaged():
            torch.testing.assert_close(p.detach(), expected)
        torch.testing.assert_close(p.detach(), raw)


def test_weights_come_back_when_the_evaluation_fails(kind):
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = kind([p], 1.0)
    optimizer.start_averaging()
    for g in (1.0, 2.0):
        p.grad = torch.full((2,), g)
        optimizer.step()

    def fail():
        with optimizer.averaged():
            assert torch.equal(p.detach(), torch.tensor([-2.0, -2.0]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(p.detach(), torch.tensor([-3.0, -3.0]))


def test_a_parameter_without_gradient_stays_and_is_averaged(kind):
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = kind([p, q], 1.0, 0.5)
    optimizer.start_averaging()
    p.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(q.detach(), torch.ones(2))
    with optimizer.averaged():
        assert torch.equal(q.detach(), torch.ones(2))


@pytest.mark.parametrize(
    ("nonmono", "losses", "fires"),
    [
        # Needs more than `nonmono` earlier losses.
        (5, [5, 4, 3, 2, 1, 9], [0, 0, 0, 0, 0, 0]),
        (5, [1, 9, 9, 9, 9, 9], [0, 0, 0, 0, 0, 0]),
        (5, [1, 9, 9, 9, 9, 9, 9], [0, 0, 0, 0, 0, 0, 1]),
        # Greater than the minimum of all but the last `nonmono`, not of all.
        (2, [5, 4, 3, 3.5], [0, 0, 0, 0]),
        (2, [5, 4, 3, 6], [0, 0, 0, 1]),
        (2, [5, 3, 4, 4, 3.5], [0, 0, 0, 0, 1]),
        # Equal does not fire.
        (1, [3, 3, 3], [0, 0, 0]),
        (0, [3, 2, 2.5], [0, 0, 1]),
    ],
)
def test_trigger(nonmono, losses, fires):
    trigger = NonMonotonicTrigger(nonmono)
    assert [trigger.update(loss) for loss in losses] == [bool(f) for f in fires]
    assert trigger.losses == losses
