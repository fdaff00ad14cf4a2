"""The step of training.py with one pass over the gradients fewer: the update clips them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from fast.nt_asgd import FastNTASGD
from nt_asgd import NTASGD
from qrnn.check import numbers
from training import TrainingStep


class FastStep(TrainingStep):
    """TrainingStep in which FastNTASGD takes the gradients times the clipping factor."""

    def update(self) -> None:
        if not self.clip or not isinstance(self.optimizer, FastNTASGD):
            super().update()
            return
        grads = [p.grad for p in self.params if p.grad is not None]
        self.norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        # The factor of nn.utils.clip_grad_norm_.
        scale = (self.clip / (self.norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step(gradient_scale=scale)


class _Toy(nn.Module):
    """A network with the calls of loss.TrainingLoss."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(9, 4, like=like))

    def init_hidden(self, bsz: int) -> list[Tensor]:
        return [self.weight.new_ones(1, bsz, 4)]

    def forward(self, data: Tensor, targets: Tensor, hidden: list[Tensor]) -> tuple:
        words, next_words = embedding(data, self.weight), embedding(targets, self.weight)
        state = 0.5 * hidden[0] + words.mean(dim=0, keepdim=True)
        loss = (state * next_words.sum(dim=0)).square().mean()
        return loss, loss.detach(), [state]


def compare(like: Tensor, set_up: Callable[[FastStep], None] = lambda step: None) -> Iterator[list]:
    """Weights, averages and sums after two epochs of three steps, one averaged, of both classes.

    `set_up` may turn the FastStep into another kind of step.
    """
    text = torch.arange(60, device=like.device).view(20, 3) * 7 % 9
    for kind, update in ((FastStep, FastNTASGD), (TrainingStep, NTASGD)):
        network = _Toy(like)
        optimizer = update(network.parameters(), lr=0.5, weight_decay=0.1)
        step = kind(network, optimizer, text, bptt=4, clip=0.3)
        if kind is FastStep:
            set_up(step)
        for averaged in (False, True):
            if averaged:
                optimizer.start_averaging()
            step.begin()
            for _ in range(3):
                step.take(3, 3)
        average = optimizer.state[network.weight]["average"]
        yield [network.weight, average, *step.hidden, step.total, step.interval, step.norm]
