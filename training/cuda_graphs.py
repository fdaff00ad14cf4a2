"""Training steps from CUDA graphs: recorded once for each length, then replayed.

Everything that changes from step to step (hidden state, position in the text, rate, losses) is in
tensors at fixed addresses.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nt_asgd import NTASGD
from training.parallel import ALONE, Ranks
from training.step import TrainingStep

# Most graphs kept at once. With a bptt of 70 an epoch has 44 different lengths, some only once.
MOST_GRAPHS = 64
# Names left out of a graph's key: the attributes of nn.Module itself, and the settings of an
# optimiser that a replay reads from the device.
_OF_MODULE = vars(nn.Module()).keys() - {"training"}
_ON_DEVICE = {"lr", "params", "averaged_steps"}
_PLAIN = (int, float, str, type(None))
# After so many steps in a row that each changed the key, a log line says so.
_KEYS_IN_A_ROW = 20

Key = list[tuple[str, Any]]


class GraphedStep(TrainingStep):
    """TrainingStep from CUDA graphs: one per length, recorded at that length's second step.

    A length's first step runs eagerly, and so do steps cut short by the end of the text and steps
    beyond MOST_GRAPHS. Results are the same, random masks included: a replay draws new ones. Every
    Python number that a graph would freeze is part of its key, so a changed number makes a new
    graph. Steps run eagerly while such a number changes at every step, and if a step cannot be
    recorded; `say` then gets a message.

    `record(work)` returns a function that replays `work`, without running it; by default it records
    a CUDA graph.
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
        self._frozen: Key = []
        self._new_keys = 0
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
        if frozen == self._frozen:
            self._new_keys = 0
        else:
            self._replays.clear()
            self._seen.clear()
            self._new_keys += 1
            if self._new_keys == _KEYS_IN_A_ROW:
                changed = sorted({pair[0] for pair in frozen if pair not in self._frozen})
                self.say(f"CUDA graphs are off while every step changes {', '.join(changed)}")
            self._frozen = frozen
        with self._on_one_stream():
            if rows == seq_len and self._recorded(rows):
                self._replay(rows)
            else:
                super()._compute(rows, seq_len)
        self._seen[rows] += rows == seq_len

    def frozen(self) -> Key:
        """Every Python number that a recorded step would freeze, with its name.

        These are the plain attributes (numbers, strings, and tuples or lists of them) of the
        modules and of the optimiser, its settings, the numbers in its state, the clipping norm, and
        the text's address.
        """
        optimizer = self.optimizer
        key = [("clip", self.clip), ("text", self.source.data_ptr())]
        key.append(("averaging", isinstance(optimizer, NTASGD) and optimizer.averaging))
        for module in self.network.modules():
            key += _plain(vars(module), _OF_MODULE)
        for group in optimizer.param_groups:
            key += _plain(group, _ON_DEVICE)
        key += _plain(vars(optimizer))
        for p in self.params:
            state = optimizer.state.get(p, {})
            key += _plain(state)
            for name, value in state.items():
                if isinstance(value, Tensor) and value.device != p.device:
                    key.append((name, value.tolist()))  # such as a count of steps on the CPU
        return key

    def _recorded(self, rows: int) -> bool:
        """Whether there is a graph for `rows` rows; records it at the length's second step."""
        if rows in self._replays:
            return True
        if not self.recording or not self._seen[rows] or len(self._replays) >= MOST_GRAPHS:
            return False
        try:
            with self._capturable(), self.rates(self._lr):
                self._replays[rows] = self._record(lambda: self.work(rows, self._averaging_weight))
        except Exception as error:  # a fault of the step itself shows again in the eager step
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
            self.optimizer.count()
            self._averaging_weight.fill_(1 / self.optimizer.param_groups[0]["averaged_steps"])
        self._replays[rows]()

    @contextlib.contextmanager
    def _capturable(self) -> Iterator[None]:
        """A context in which Adam can be recorded."""
        groups = [group for group in self.optimizer.param_groups if "capturable" in group]
        own = [group["capturable"] for group in groups]
        for group in groups:
            group["capturable"] = True
        try:
            yield
        finally:
            for group, value in zip(groups, own, strict=True):
                group["capturable"] = value

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


def _plain(values: Mapping[str, Any], but: Collection[str] = ()) -> Key:
    """The numbers, strings, and tuples or lists of them among `values`, without the names `but`."""
    kept: Key = []
    for name, value in values.items():
        if name in but:
            continue
        if isinstance(value, _PLAIN):
            kept.append((name, value))
        elif isinstance(value, tuple | list) and all(isinstance(part, _PLAIN) for part in value):
            kept.append((name, tuple(value)))
    return kept


def _stop_allocating(device: int, pool: tuple[int, int]) -> None:
    """Make the allocator serve `device` from the common memory again, instead of `pool`."""
    before_2_8 = "_cuda_endAllocateCurrentStreamToPool"
    end = getattr(torch._C, "_cuda_endAllocateToPool", None) or getattr(torch._C, before_2_8)
    end(device, pool)


class _CUDARecorder:
    """Records work as CUDA graphs in one memory pool, on a stream of its own.

    The graphs can share memory and still run in any order: values that outlive a graph are outside
    the pool.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        if not self._graphs:
            # A pool without graphs must not be reused while a tensor lies in it.
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                work()
        except Exception:
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

    If CUDA graphs are requested but impossible, `say` gets the reason.
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
