"""Training steps from CUDA graphs: recorded once for each length, then replayed.

Everything that changes from step to step (hidden state, position in the text, rate, losses) is in
tensors at fixed addresses.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import fast.step
from fast.nt_asgd import FastNTASGD
from fast.step import FastStep
from utils import get_batch, map_state
from weight_drop import WeightDrop

# Most graphs kept at once. With a bptt of 70 an epoch has 44 different lengths, some only once.
MOST_GRAPHS = 64
# Attributes of a step that are no part of a graph's key: they count.
_COUNTS = {"row", "batches", "since", "recording", "_replayed", "_changes"}
_PLAIN = (int, float, str, type(None))
# The key is compared before every step that runs eagerly, and before one in so many others.
_COMPARE_EVERY = 50
# After so many eager steps in a row that each changed the key, a log line says so.
_CHANGES_IN_A_ROW = 20

Key = list[tuple[str, Any]]


class GraphedStep(FastStep):
    """FastStep from CUDA graphs: one per length, recorded at that length's second step.

    A length's first step runs eagerly, and so do steps cut short by the end of the text and steps
    beyond MOST_GRAPHS. Results are the same, random masks included: a replay draws new ones. What a
    graph would freeze is part of its key, which is compared at the start of each text and now and
    then; `refresh` compares it at once. Steps run eagerly while a part of the key changes at every
    step, and if a step cannot be recorded; `say` then gets a message.

    `record(work)` returns a function that replays `work`, without running it; by default it records
    a CUDA graph. `set_up` makes a FastStep one of these.
    """

    def set_up(
        self,
        say: Callable[[str], None] = print,
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        """Allocate what a graph reads and writes."""
        device = self.source.device
        self.say = say
        self._record = _CUDARecorder() if record is None else record
        self.recording = True
        self._frozen: Key = []
        self._replayed = False  # since the start of the text or the last comparison
        self._changes = 0  # found by the last comparisons in a row
        self._replays: dict[int, Callable[[], None]] = {}
        self._seen: Counter[int] = Counter()
        self._first_row = torch.zeros((), dtype=torch.int64, device=device)
        self._rows = torch.arange(self.source.size(0), device=device)
        self._hidden = map_state(torch.clone, self.hidden)
        self._norm = self.norm.clone()
        self._lr = [torch.zeros((), device=device) for _ in self.optimizer.param_groups]
        self._averaging_weight = torch.zeros((), device=device)
        # Eager steps do not use this kernel. Load it now: loading could fail during a recording.
        torch.zeros(4, device=device).lerp_(torch.ones(4, device=device), self._averaging_weight)

    def begin(self, position: Mapping[str, Any] | None = None) -> None:
        super().begin(position)
        self._keep_places()
        self._replayed = False

    def take(self, rows: int, seq_len: int) -> None:
        if not (self._replayed and rows in self._replays) or self.batches % _COMPARE_EVERY == 0:
            self._report_changes()
        with self._on_one_stream():
            if rows == seq_len and self._is_recorded(rows):
                self._replay(rows)
            else:
                super().take(rows, seq_len)
                self._keep_places()
        self._seen[rows] += rows == seq_len

    def refresh(self) -> list[str]:
        """Drop the graphs if a number that they froze has changed; the names of such numbers.

        Call it after changing a number within an epoch.
        """
        frozen, before = self.frozen(), self._frozen
        if frozen == before:
            return []
        self._replays.clear()
        self._seen.clear()
        self._frozen = frozen
        return sorted({name for name, value in frozen if (name, value) not in before})

    def frozen(self) -> Key:
        """Everything that a recorded step would freeze, with its name.

        These are the attributes of the step, the modules and the optimiser, its settings and its
        state: numbers, strings, tuples and lists of them, and which object a tensor is, since a
        step may put another in its place.
        """
        modules, optimizer = list(self.network.modules()), self.optimizer
        # A dropped weight is computed and used within one step.
        dropped = {part.module: part.weights for part in modules if isinstance(part, WeightDrop)}
        # A replay reads these settings from the device.
        on_device = {"lr", "averaged_steps"} if isinstance(optimizer, FastNTASGD) else {"lr"}
        owners = [(vars(self), _COUNTS), (vars(optimizer), ())]
        owners += [(vars(part) | part._buffers, dropped.get(part, ())) for part in modules]
        owners += [(group, on_device) for group in optimizer.param_groups]
        owners += [(optimizer.state.get(p, {}), ()) for p in self.params]
        return [
            (name, _held(value, self.source.device))
            for values, left_out in owners
            for name, value in values.items()
            if name not in left_out
        ]

    def _report_changes(self) -> None:
        """Compare the key; say if it changed since a replay, or changes at every eager step."""
        changed = self.refresh()
        self._changes = self._changes + 1 if changed else 0
        if changed and self._replayed:
            self.say(
                f"{', '.join(changed)} changed within the epoch: up to {_COMPARE_EVERY} steps had "
                "the old value; call step.refresh() after such a change"
            )
        elif self._changes == _CHANGES_IN_A_ROW:
            self.say(f"CUDA graphs are off while every step changes {', '.join(changed)}")
        self._replayed = False

    def _keep_places(self) -> None:
        """Move the state and the norm of an eager or a recorded step to their fixed addresses."""
        if self.hidden is not self._hidden:
            with torch.no_grad():
                map_state(Tensor.copy_, self._hidden, self.hidden)
            self.hidden = self._hidden
        if self.norm is not self._norm:
            self._norm.copy_(self.norm)
            self.norm = self._norm

    def _is_recorded(self, rows: int) -> bool:
        """Whether there is a graph for `rows` rows; records it at the length's second step."""
        if rows in self._replays:
            return True
        room = len(self._replays) < MOST_GRAPHS
        if not (self.recording and self._seen[rows] and room):
            return False
        try:
            with self._recordable():
                self._replays[rows] = self._record(lambda: self._work(rows))
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
            self.hidden, self.norm = self._hidden, self._norm
            # The gradients lie in memory that all graphs share.
            self.optimizer.zero_grad()
        return True

    def _work(self, rows: int) -> None:
        """What is recorded: TrainingStep.take, at the row and with the rates on the device."""
        index = self._first_row + self._rows[: rows + 1]
        data, targets = get_batch(self.source.index_select(0, index), 0, rows)
        raw_loss = self.compute(data, targets)
        self.total += raw_loss * rows
        self.interval += raw_loss
        self._keep_places()

    def _replay(self, rows: int) -> None:
        self._first_row.fill_(self.row)
        for place, group in zip(self._lr, self.optimizer.param_groups, strict=True):
            place.fill_(group["lr"] * rows / self.bptt)
        if isinstance(self.optimizer, FastNTASGD) and self.optimizer.averaging:
            self.optimizer.count()
            self._averaging_weight.fill_(1 / self.optimizer.param_groups[0]["averaged_steps"])
        self._replays[rows]()
        self._replayed = True
        self.row += rows
        self.batches += 1
        self.since += 1

    @contextlib.contextmanager
    def _recordable(self) -> Iterator[None]:
        """A context in which the optimiser can be recorded: its changing numbers are tensors."""
        groups = self.optimizer.param_groups
        own = [dict(group) for group in groups]
        for group, rate in zip(groups, self._lr, strict=True):
            group["lr"] = rate
            if "capturable" in group:  # Adam's step can be recorded only then
                group["capturable"] = True
        if isinstance(self.optimizer, FastNTASGD):
            self.optimizer.averaging_weight = self._averaging_weight
        try:
            yield
        finally:
            for group, values in zip(groups, own, strict=True):
                group.update(values)
            if isinstance(self.optimizer, FastNTASGD):
                del self.optimizer.averaging_weight

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


class _Object:
    """A tensor in a key, equal to itself alone; while it is held, no other gets its address."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self.tensor is other.tensor


def _held(value: Any, device: torch.device) -> Any:
    """What a graph on `device` holds of a value; None for an object of another kind."""
    if isinstance(value, Tensor):
        # Such as a count of steps on the CPU.
        elsewhere = value.device != device and value.numel() == 1
        return value.item() if elsewhere else _Object(value)
    if isinstance(value, tuple | list) and all(isinstance(part, _PLAIN) for part in value):
        return tuple(value)
    return value if isinstance(value, _PLAIN) else None


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
            # Before PyTorch 2.11 or so the generator stays in the state for recording.
            generator = torch.cuda.default_generators[self.stream.device.index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        self._graphs.add(graph)
        return graph.replay


def compare(like: Tensor) -> Iterator[list[Tensor]]:
    """As fast.step.compare, of GraphedStep and TrainingStep; steps are recorded and replayed."""
    messages: list[str] = []

    def set_up(step: FastStep) -> None:
        step.__class__ = GraphedStep
        step.set_up(say=messages.append)

    yield from fast.step.compare(like, set_up)
    if messages:
        raise RuntimeError(messages[0])
