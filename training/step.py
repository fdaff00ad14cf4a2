"""One step of training: forward, loss, backward, clipping and update, eagerly or from CUDA graphs.

Everything that goes from step to step (hidden state, a QRNN's last inputs, the place in the text,
the rate, the losses) stays in tensors at fixed addresses, so that a step can be recorded once as a
CUDA graph and replayed. The loss is that of "Regularizing and Optimizing LSTM Language Models",
arXiv 1708.02182.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from model import Hidden, RNNModel
from nt_asgd import NTASGD
from training.parallel import ALONE, Ranks
from utils import get_batch, repackage_hidden

# Graphs kept at once. Lengths around a bptt of 70 take 44 in an epoch, the rarest once.
MOST_GRAPHS = 64


def regularisation(raw: Tensor, dropped: Tensor, alpha: float, beta: float) -> Tensor | float:
    """Activation and temporal activation regularisation, arXiv 1708.02182, section 4.6.

    `alpha` times the mean square of the dropped output plus `beta` times the mean square of the
    differences between successive steps of the raw output, both (seq_len, batch, size).
    """
    penalty: Tensor | float = 0.0
    if alpha:
        penalty = penalty + alpha * dropped.float().pow(2).mean()
    if beta and raw.size(0) > 1:
        raw = raw.float()
        penalty = penalty + beta * (raw[1:] - raw[:-1]).pow(2).mean()
    return penalty


class TrainingLoss(nn.Module):
    """Model, criterion and activation penalties as one module, whose gradients can be shared.

    Every trained parameter is used within its forward, as DistributedDataParallel needs it. With
    `bf16` the matrix products are in bfloat16; weights, their gradients and the loss stay float32.
    """

    def __init__(self, model: RNNModel, criterion: nn.Module, bf16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.bf16 = bf16

    def forward(
        self, data: Tensor, targets: Tensor, hidden: Hidden, alpha: float, beta: float
    ) -> tuple[Tensor, Tensor, Hidden]:
        """The loss to minimise, its raw cross-entropy (both nats a token), the new hidden state.

        `data` is (seq_len, batch), `targets` (seq_len * batch,).
        """
        model = self.model
        # Without the cache of cast weights: it would outlive a recorded step.
        with torch.autocast(data.device.type, torch.bfloat16, self.bf16, cache_enabled=False):
            output, hidden, raw, dropped = model(data, hidden, return_h=True)
            raw_loss = self.criterion(model.decoder.weight, model.decoder.bias, output, targets)
            loss = raw_loss + regularisation(raw[-1], dropped[-1], alpha, beta)
        return loss, raw_loss.detach(), hidden


class TrainingStep:
    """Steps of `optimizer` over `source` (rows, batch), the corpus in columns.

    The rate is scaled by `seq_len / bptt` for each step. The gradient over all of the optimiser's
    parameters is clipped to the norm `clip`, unless that is 0. Among several `ranks`, `source` is
    this rank's columns, `share` their part of the batch, and `network` what averages gradients;
    otherwise `network` is the TrainingLoss itself.

    `hidden`, `kept` (what each QRNN layer keeps of its inputs), `total`, `interval` (sums of the
    raw cross-entropy in nats: each row's mean, each step's mean; this rank's share) and `norm` (of
    the last gradient) are updated in place.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        source: Tensor,
        *,
        bptt: int,
        clip: float,
        alpha: float = 0.0,
        beta: float = 0.0,
        ranks: Ranks = ALONE,
        share: float = 1.0,
    ) -> None:
        self.network = network
        loss = network if isinstance(network, TrainingLoss) else network.module
        self.model: RNNModel = loss.model
        self.optimizer = optimizer
        self.source = source
        self.bptt = bptt
        self.clip = clip
        self.alpha = alpha
        self.beta = beta
        self.ranks = ranks
        self.share = share
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.hidden = self.model.init_hidden(source.size(1))
        self.kept: list[Tensor | None] = []
        if self.model.rnn_type == "QRNN":
            like = self.model.encoder.weight
            for layer in self.model.rnns:
                size = (layer.window - 1, source.size(1), layer.input_size)
                self.kept.append(like.new_zeros(size) if layer.window > 1 else None)
        device = source.device
        self.row = torch.zeros((), dtype=torch.int64, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.interval = torch.zeros((), dtype=torch.float64, device=device)
        self.norm = torch.full((), torch.nan, device=device)
        # The index of a row within a step.
        self._rows = torch.arange(source.size(0), device=device)

    def begin(self, hidden: Hidden | None, kept: list[Tensor | None]) -> None:
        """Start from `hidden` and the QRNN's last inputs `kept`; zeros where they are missing."""
        self.model.train()
        self.network.train()
        _copy(self.hidden, hidden)
        _copy(self.kept, kept if any(part is not None for part in kept) else None)
        self._hand_out_kept()

    def _hand_out_kept(self) -> None:
        """Let every QRNN layer find its last inputs where they are kept from step to step."""
        for layer, inputs in zip(self.model.rnns, self.kept, strict=False):
            layer.prevX = inputs

    def run(self, row: int, rows: int, seq_len: int) -> None:
        """Train on `rows` rows from `row` on; `seq_len` is the length that scales the rate."""
        scale = seq_len / self.bptt
        if isinstance(self.optimizer, NTASGD):
            self.optimizer.count()
        self.row.fill_(row)
        with self._rates([group["lr"] * scale for group in self.optimizer.param_groups]):
            self.work(rows, None)

    @contextlib.contextmanager
    def _rates(self, rates: list[float | Tensor]) -> Iterator[None]:
        """Within this context the optimiser's rates are those of one step."""
        groups = self.optimizer.param_groups
        own = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, rate in zip(groups, own, strict=True):
                group["lr"] = rate

    def work(self, rows: int, average_share: Tensor | None) -> None:
        """The step itself, from `self.row` on and at the rates that the optimiser's groups hold.

        Given `average_share`, which stands for one over the number of averaged steps, as the rates
        then are tensors too, it waits for no number from the device.
        """
        index = self.row + self._rows[: rows + 1]
        data, targets = get_batch(self.source.index_select(0, index), 0, rows)
        self.optimizer.zero_grad(set_to_none=True)
        hidden = repackage_hidden(self.hidden)
        loss, raw_loss, hidden = self.network(data, targets, hidden, self.alpha, self.beta)
        # The ranks' gradients are averaged, so a share of 1 / world needs no weight.
        world = self.ranks.world
        (loss * (self.share * world) if world > 1 else loss).backward()
        self._update(average_share)
        raw_loss = raw_loss.double() * self.share
        self.interval += raw_loss
        self.total += raw_loss * rows
        _copy(self.hidden, hidden)
        for layer, inputs in zip(self.model.rnns, self.kept, strict=False):
            if inputs is not None:
                inputs.copy_(layer.prevX)
        self._hand_out_kept()

    def _update(self, average_share: Tensor | None) -> None:
        grads = [p.grad for p in self.params if p.grad is not None]
        scale: Tensor | float = 1.0
        if self.clip:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            self.norm.copy_(norm)
            scale = (self.clip / (norm + 1e-6)).clamp(max=1.0)
        if isinstance(self.optimizer, NTASGD):
            # The gradients themselves are left as they are: that would be one more pass.
            self.optimizer.update(scale, average_share)
        else:
            if self.clip:
                torch._foreach_mul_(grads, scale)
            self.optimizer.step()


def _copy(places: Any, values: Any) -> None:
    """Copy `values` into `places`, both lists or tuples of tensors; None stands for zeros."""
    if isinstance(places, Tensor):
        if values is None:
            places.zero_()
        else:
            places.copy_(values.detach())
    elif places is not None:
        values = [None] * len(places) if values is None else values
        for place, value in zip(places, values, strict=True):
            _copy(place, value)


class GraphedStep(TrainingStep):
    """TrainingStep from CUDA graphs: one for each length, recorded when it comes a second time.

    A length's first step, steps cut short by the end of the text, and those for which there is no
    room for a graph run eagerly. What is computed is the same, random masks included: a replay
    draws fresh ones. If a step cannot be recorded, `log` is told so, and all run eagerly.

    `record(work)` runs nothing and returns what replays `work`; by default a CUDA graph does.
    """

    def __init__(
        self,
        *args: Any,
        log: Callable[[str], None] = print,
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.log = log
        self._record = _CUDARecorder() if record is None else record
        self._replays: dict[int, Callable[[], None]] = {}
        self._seen: Counter[int] = Counter()
        self._averaging = False
        self.recording = True
        device = self.source.device
        self._lr = [torch.zeros((), device=device) for _ in self.optimizer.param_groups]
        self._average_share = torch.zeros((), device=device)
        # A kernel that eager steps do without: loading it could fail while a step is recorded.
        torch.zeros(4, device=device).lerp_(torch.ones(4, device=device), self._average_share)

    def run(self, row: int, rows: int, seq_len: int) -> None:
        """As TrainingStep.run, from a graph where there is one."""
        averaging = isinstance(self.optimizer, NTASGD) and self.optimizer.averaging
        if averaging != self._averaging:
            # Another update: what was recorded is of no use any more.
            self._replays.clear()
            self._seen.clear()
            self._averaging = averaging
        with self._on_one_stream():
            if rows == seq_len and self._recorded(rows):
                self._replay(row, rows)
            else:
                super().run(row, rows, seq_len)
        self._seen[rows] += rows == seq_len

    def _recorded(self, rows: int) -> bool:
        """Whether there is a graph for `rows` rows; it is made if it is time for it."""
        if rows in self._replays:
            return True
        if not self.recording or not self._seen[rows] or len(self._replays) >= MOST_GRAPHS:
            return False
        try:
            with self._capturable(), self._rates(self._lr):
                self._replays[rows] = self._record(lambda: self.work(rows, self._average_share))
        except RuntimeError as error:
            self.recording = False
            self._replays.clear()
            # Nothing has happened, but a layer may hold a result that was never computed.
            self._hand_out_kept()
            # Ending the recording fails as well, and says less than what made it fail.
            first: BaseException = error
            while first.__context__ is not None:
                first = first.__context__
            reason = str(first).strip().split("\n")[0]
            self.log(f"CUDA graphs are off, this step cannot be recorded: {reason}")
            return False
        finally:
            # They lie in memory that belongs to all graphs in turn.
            self.optimizer.zero_grad(set_to_none=True)
        return True

    def _replay(self, row: int, rows: int) -> None:
        self.row.fill_(row)
        for place, group in zip(self._lr, self.optimizer.param_groups, strict=True):
            place.fill_(group["lr"] * rows / self.bptt)
        if isinstance(self.optimizer, NTASGD):
            self.optimizer.count()
            if self._averaging:
                self._average_share.fill_(1 / self.optimizer.param_groups[0]["averaged_steps"])
        self._replays[rows]()

    @contextlib.contextmanager
    def _capturable(self) -> Iterator[None]:
        """Within this context Adam, too, can be recorded."""
        groups = [group for group in self.optimizer.param_groups if "capturable" in group]
        for group in groups:
            group["capturable"] = True
        try:
            yield
        finally:
            for group in groups:
                group["capturable"] = False

    @contextlib.contextmanager
    def _on_one_stream(self) -> Iterator[None]:
        """Eager steps on the stream that records: parts of autograd remember where they ran."""
        stream = getattr(self._record, "stream", None)
        if stream is None:
            yield
            return
        outside = torch.cuda.current_stream(self.source.device)
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            yield
        outside.wait_stream(stream)


class _CUDARecorder:
    """Records work as CUDA graphs in one memory pool, on a stream of its own.

    The graphs may share their memory although they run in any order: all that lives on from one to
    the next is outside it.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        if not self._graphs:
            # A pool that has lost its graphs may not be used again while a tensor lies in it.
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                work()
        except RuntimeError:
            # Before PyTorch 2.11 or so the generator still takes itself for one that is recorded.
            generator = torch.cuda.default_generators[self.stream.device.index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        self._graphs.add(graph)
        return graph.replay


def make_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: Tensor,
    *,
    graphs: bool,
    log: Callable[[str], None] = print,
    **options: Any,
) -> TrainingStep:
    """A TrainingStep with these `options`, on a GPU a GraphedStep unless `graphs` is False.

    Where CUDA graphs are asked for and cannot be, `log` is told why.
    """
    if not graphs or source.device.type != "cuda":
        return TrainingStep(network, optimizer, source, **options)
    reason = _no_graphs(network, options.get("ranks", ALONE))
    if reason:
        log(f"CUDA graphs are off: {reason}")
        return TrainingStep(network, optimizer, source, **options)
    return GraphedStep(network, optimizer, source, log=log, **options)


def _no_graphs(network: nn.Module, ranks: Ranks) -> str:
    """Why steps of `network` cannot be recorded as CUDA graphs; empty if they can."""
    if ranks.world > 1:
        return "several processes share the batch"
    if network.criterion.nsplits > 1:
        return "the split softmax works on as many rows as a batch has rare words"
    return ""
