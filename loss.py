"""The loss that training minimises: cross-entropy, and penalties on the last layer's activations.

"Regularizing and Optimizing LSTM Language Models", arXiv 1708.02182, section 4.6.
"""

import argparse

import torch
from torch import Tensor, nn

from model import Hidden, RNNModel
from utils import map_state


class TrainingLoss(nn.Module):
    """The network: model, criterion and penalties as one module.

    `alpha` and `beta` are the weights of activation regularisation (AR) and temporal activation
    regularisation (TAR); 0 turns either off. With `bf16` the matrix products of training are in
    bfloat16; weights, their gradients and the loss stay float32.
    """

    def __init__(
        self,
        model: RNNModel,
        criterion: nn.Module,
        *,
        alpha: float = 0.0,
        beta: float = 0.0,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.alpha = alpha
        self.beta = beta
        self.bf16 = bf16

    def train(self, mode: bool = True) -> "TrainingLoss":
        """As usual, but a frozen part of this module, such as a teacher, keeps its own mode.

        That is a part beside the model and the criterion that has weights, none of them trained.
        """
        self.training = mode
        for name, part in self.named_children():
            if name in ("model", "criterion") or not is_frozen(part):
                part.train(mode)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.decoder.weight.device

    def init_hidden(self, bsz: int) -> Hidden:
        """The state at the start of a text of `bsz` columns."""
        return self.model.init_hidden(bsz)

    def forward(
        self, data: Tensor, targets: Tensor, hidden: Hidden
    ) -> tuple[Tensor, Tensor, Hidden]:
        """The loss to minimise, its raw cross-entropy (both nats a token), the new hidden state.

        `data` is (seq_len, batch), `targets` (seq_len * batch,). In evaluation there are no
        penalties, and the two losses are equal.
        """
        model, low = self.model, self.bf16 and self.training
        # Cast weights are not cached: the cache would outlive a recorded step.
        with torch.autocast(data.device.type, torch.bfloat16, low, cache_enabled=False):
            output, hidden, raw, dropped = model(data, hidden, return_h=True)
            raw_loss = self.criterion(model.decoder.weight, model.decoder.bias, output, targets)
            loss = raw_loss
            if self.training:
                loss = raw_loss + self.penalty(raw[-1], dropped[-1])
        if low:
            hidden = map_state(_as_float32, hidden)
        return loss, raw_loss.detach(), hidden

    def penalty(self, raw: Tensor, dropped: Tensor) -> Tensor | float:
        """AR and TAR of the last layer's raw and dropped outputs, both (seq_len, batch, size).

        `alpha` times the mean square of the dropped output, plus `beta` times the mean square of
        the differences between successive steps of the raw output.
        """
        penalty: Tensor | float = 0.0
        if self.alpha:
            penalty = penalty + self.alpha * dropped.float().pow(2).mean()
        if self.beta and raw.size(0) > 1:
            raw = raw.float()
            penalty = penalty + self.beta * (raw[1:] - raw[:-1]).pow(2).mean()
        return penalty


def make_loss(args: argparse.Namespace, model: RNNModel, criterion: nn.Module) -> TrainingLoss:
    """The network that main.py and finetune.py train with the flags `args`."""
    return TrainingLoss(
        model,
        criterion,
        alpha=args.alpha,
        beta=args.beta,
        bf16=args.precision == "bf16",
    )


def is_frozen(part: nn.Module) -> bool:
    """Whether a module has weights, none of which is trained."""
    weights = list(part.parameters())
    return bool(weights) and not any(p.requires_grad for p in weights)


def _as_float32(part: Tensor) -> Tensor:
    return part.float() if part.dtype == torch.bfloat16 else part
