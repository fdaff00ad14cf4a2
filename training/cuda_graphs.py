"""Training steps from CUDA graphs: recorded once for each length, then replayed.

All that goes from step to step (hidden state, the place in the text, the rate, the losses) is in
tensors at fixed addresses.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nt_asgd import NTASGD
from training.parallel import ALONE, Ranks
from training.step import TrainingStep

# Graphs kept at once. Lengths around a bptt of 70 take 44 in an epoch, the rarest once.
MOST_GRAPHS = 64
# Names left out of a graph's key: settings of an optimiser that a replay reads from the device or
# does not use, and the attributes of nn.Module itself.
_NOT_FROZEN = {"lr", "params", "averaged_steps", "capturable", *vars(nn.Module())} - {"training"}
_PLAIN = (int, float, str, type(None))


class GraphedStep(TrainingStep):
    """TrainingStep from CUDA graphs: one for each length, recorded when it comes a second time.

    A length's first step, steps cut short by the end of the text, and those for which there is no
    room for a graph run eagerly. What is computed is the same, random masks included: a replay
    draws fresh ones. Every Python number that a graph would freeze is part of its key, so that a
    changed one makes a new graph. If a step cannot be recorded, `say` is told so, and all run
    eagerly.

    `record(work)` runs nothing and returns a function that replays `work`; by default a CUDA graph
    does.
    """

    def __init__(
        self,
        *args: Any,
        say: Callable[[str], None] = print,
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.say = say
        self._record = _CUDARecorder() if record is None else record
        self._frozen: Hashable = None
        self._replays: dict[int, Callable[[], None]] = {}
        self._seen: Counter[int] = Counter()
        self.recording = True
        device = self.source.device
        self._lr = [torch.zeros((), device=device) for _ in self.optimizer.param_groups]
        self._averaging_weight = torch.zeros((), device=device)
        # Eager steps do not use this kernel. Load it now: loading could fail during a recording.
        torch.zeros(4, device=device).lerp_(torch.ones(4, device=device), self._averaging_weight)

    def _compute(self, rows: int, seq_len: int) -> None:
        frozen = self.frozen()
        if frozen != self._frozen:
            self._replays.clear()
            self._seen.clear()
            self._frozen = frozen
        with self._on_one_stream():
            if rows == seq_len and self._recorded(rows):
                self._replay(rows)
            else:
                super()._compute(rows, seq_len)
        self._seen[rows] += rows == seq_len

    def frozen(self) -> Hashable:
        """Every Python number that a recorded step would hold on to.

        They are the attributes of all modules that are numbers, words, or tuples and lists of such,
        the optimiser's settings, the clipping norm, and where the text lies.
        """
        modules = [_plain(vars(module)) for module in self.network.modules()]
        groups = [_plain(group) for group in self.optimizer.param_groups]
        averaging = isinstance(self.optimizer, NTASGD) and self.optimizer.averaging
        return (self.clip, averaging, self.source.data_ptr(), tuple(modules), tuple(groups))

    def _recorded(self, rows: int) -> bool:
        """Whether there is a graph for `rows` rows; it is made if it is time for it."""
        if rows in self._replays:
            return True
        if not self.recording or not self._seen[rows] or len(self._replays) >= MOST_GRAPHS:
            return False
        try:
            with self._capturable(), self.rates(self._lr):
                self._replays[rows] = self._record(lambda: self.work(rows, self._averaging_weight))
        except RuntimeError as error:
            self.recording = False
            self._replays.clear()
            # Ending the recording fails too; the first error is the one that explains it.
            first: BaseException = error
            while first.__context__ is not None:
                first = first.__context__
            reason = str(first).strip().split("\n")[0]
            self.say(f"CUDA graphs are off, this step cannot be recorded: {reason}")
            return False
        finally:
            # The gradients lie in memory that all graphs share.
            self.optimizer.zero_grad(set_to_none=True)
        return True

    def _replay(self, rows: int) -> None:
        self._first_row.fill_(self.row)
        for place, group in zip(self._lr, self.optimizer.param_groups, strict=True):
            place.fill_(group["lr"] * rows / self.bptt)
        if isinstance(self.optimizer, NTASGD) and self.optimizer.averaging:
            self._averaging_weight.fill_(1 / self.optimizer.param_groups[0]["averaged_steps"])
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
        """Run eager steps on the recording stream too: autograd remembers the stream of a node."""
        stream = getattr(self._record, "stream", None)
        if stream is None:
            yield
            return
        outside = torch.cuda.current_stream(self.source.device)
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            yield
        outside.wait_stream(stream)


def _plain(values: dict[str, Any]) -> tuple[Any, ...]:
    """Those of `values` that are numbers, words, or tuples and lists of such."""
    kept = []
    for name, value in values.items():
        if name in _NOT_FROZEN:
            continue
        if isinstance(value, _PLAIN):
            kept.append((name, value))
        elif isinstance(value, tuple | list) and all(isinstance(part, _PLAIN) for part in value):
            kept.append((name, tuple(value)))
    return tuple(kept)


def _stop_allocating(device: int, pool: tuple[int, int]) -> None:
    """Have the allocator serve `device` from the common memory again, and not from `pool`."""
    before_2_8 = "_cuda_endAllocateCurrentStreamToPool"
    end = getattr(torch._C, "_cuda_endAllocateToPool", None) or getattr(torch._C, before_2_8)
    end(device, pool)


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
            device = self.stream.device.index
            # Before PyTorch 2.11 or so the generator stays in the state for recording.
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())
            # Before PyTorch 2.12 the allocator keeps serving this stream from the graphs' pool, and
            # later recordings and empty_cache() can fail. From 2.12 on this call raises instead.
            with contextlib.suppress(RuntimeError):
                _stop_allocating(device, self.pool)
            raise
        self._graphs.add(graph)
        return graph.replay


def make_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: Tensor,
    *,
    graphs: bool,
    say: Callable[[str], None] = print,
    **options: Any,
) -> TrainingStep:
    """A TrainingStep with these `options`, on a GPU a GraphedStep unless `graphs` is False.

    Where CUDA graphs are asked for and cannot be, `say` is told why.
    """
    if not graphs or source.device.type != "cuda":
        return TrainingStep(network, optimizer, source, **options)
    reason = _no_graphs(network, options.get("ranks", ALONE))
    if reason:
        say(f"CUDA graphs are off: {reason}")
        return TrainingStep(network, optimizer, source, **options)
    return GraphedStep(network, optimizer, source, say=say, **options)


def _no_graphs(network: nn.Module, ranks: Ranks) -> str:
    """Why steps of `network` cannot be recorded as CUDA graphs; empty if they can."""
    if ranks.world > 1:
        return "several processes share the batch"
    if network.criterion.nsplits > 1:
        return "the split softmax works on as many rows as a batch has rare words"
    return ""
