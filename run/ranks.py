"""Several processes that train one model, each on its share of a batch's columns.

torchrun starts the processes and tells each its rank. PyTorch's DistributedDataParallel averages
the gradients. This module adds the split of the columns, sums of losses, agreement on when to save
and stop, and a clear error when another process dies.
"""

import contextlib
import datetime
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import ToolkitError


class Ranks:
    """This process among `world` processes; `rank` 0 writes and logs.

    With a world of one every method does nothing, or returns its argument.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and logs."""
        return self.rank == 0

    def span(self, columns: int) -> tuple[int, int]:
        """This rank's columns, as (first, end); the numbers of columns differ by one at most.

        If there are fewer columns than ranks, every rank has all columns.
        """
        if columns < self.world:
            return 0, columns
        return columns * self.rank // self.world, columns * (self.rank + 1) // self.world

    def own(self, source: Tensor) -> Tensor:
        """This rank's columns of `source` (rows, columns)."""
        start, end = self.span(source.size(1))
        return source.narrow(1, start, end - start).contiguous()

    def data_parallel(self, network: nn.Module, fraction: float) -> nn.Module:
        """`network`, its gradients summed over the ranks during every backward pass.

        `fraction` is this rank's part of the batch; its losses are weighted by it.
        """
        if self.world == 1:
            return network
        return _DataParallel(_Part(network, fraction, self.world), gradient_as_bucket_view=True)

    def total(self, value: float) -> float:
        """The sum of every rank's `value`, the same number on each."""
        return sum(self.gathered(value))

    def mean(self, value: float, weight: int) -> float:
        """The mean of every rank's `value`, weighted by `weight`, the same number on each."""
        if self.world == 1:
            return value  # not rounded
        return self.total(value * weight) / self.total(weight)

    def largest(self, value: int) -> int:
        """The largest of every rank's `value`."""
        if self.world == 1:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def decided(self, choice: bool) -> bool:
        """The first rank's choice, on every rank: clocks differ, but all must do the same."""
        return bool(self.largest(int(choice and self.first)))

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's `value` in order."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Within this context only the first rank prints, and a dead rank raises ToolkitError."""
        if self.world == 1:
            yield
            return
        with contextlib.ExitStack() as stack:
            if not self.first:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            try:
                yield
            except RuntimeError as error:
                # Gloo raises plain RuntimeErrors, NCCL a subclass.
                if not isinstance(error, dist.DistError) and not re.search(
                    "gloo|NCCL|[Cc]onnection", str(error)
                ):
                    raise
                raise ToolkitError(
                    f"rank {self.rank} lost touch with another rank, which has died or was "
                    "stopped: continue from the last saved state with --resume"
                ) from error
            # No rank exits while another still expects its messages.
            dist.barrier()


class _Part(nn.Module):
    """A loss.TrainingLoss whose losses are its `fraction` of the batch's.

    DistributedDataParallel averages gradients over `world` ranks, which undoes the factor `world`.
    """

    def __init__(self, network: nn.Module, fraction: float, world: int) -> None:
        super().__init__()
        self.network = network
        self.fraction = fraction
        self.world = world

    def forward(self, *args: Any) -> tuple[Tensor, Tensor, Any]:
        loss, raw_loss, hidden = self.network(*args)
        return loss * (self.fraction * self.world), raw_loss * self.fraction, hidden


class _DataParallel(DistributedDataParallel):
    def init_hidden(self, bsz: int) -> Any:
        return self.module.network.init_hidden(bsz)


# The processes wait this long for each other at the start of a run.
_MINUTES = 5


def join(device: torch.device) -> Ranks:
    """Connect to the other processes that torchrun started, if any, each with its own GPU.

    Raises ToolkitError if this machine has fewer GPUs than processes, or if the others do not
    connect.
    """
    number = os.environ.get
    if number("WORLD_SIZE", "1") == "1":
        return Ranks()
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        local = int(number("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ToolkitError(
                f"there are more processes than the {torch.cuda.device_count()} GPUs of this "
                "machine: lower --nproc-per-node"
            )
        torch.cuda.set_device(local)
    this = f"rank {number('RANK')} of {number('WORLD_SIZE')}"
    where = f"{number('MASTER_ADDR')}:{number('MASTER_PORT')}"
    # torchrun's agents have already connected.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        print(f"{this.capitalize()} waits at {where} for the others, {_MINUTES} minutes at most")
    try:
        timeout = datetime.timedelta(minutes=_MINUTES)
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    except (RuntimeError, ValueError) as error:
        raise ToolkitError(
            f"{this} does not meet the others at {where} ({str(error).splitlines()[0]}): start "
            "every rank with torchrun, or with the same free MASTER_PORT"
        ) from error
    return Ranks(rank, world)


def check_columns(ranks: Ranks, batch_size: int) -> None:
    """Raise ToolkitError if the batch has fewer columns than there are ranks."""
    if batch_size < ranks.world:
        raise ToolkitError(
            f"--batch_size {batch_size} is less than the {ranks.world} processes that share its "
            "columns: raise it or lower --nproc-per-node"
        )
