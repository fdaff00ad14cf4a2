"""CUDA kernels: CuPy compiles them at first use and launches them on PyTorch's stream.

Importing this module does not import CuPy.
"""

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The element types of scalars.cuh.
SCALARS = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "Float16",
    torch.bfloat16: "BFloat16",
}


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a kernel's arithmetic for tensors of `dtype`: `State` in scalars.cuh."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def code(source: Path) -> str:
    """A CUDA source with its includes expanded, because NVRTC gets no include folder."""
    return re.sub(
        r'^#include "(.+)"$',
        lambda line: (source.parent / line[1]).read_text(encoding="utf-8"),
        source.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )


@functools.cache
def kernel(source: Path, name: str, options: tuple[str, ...], device: torch.device) -> Any:
    """A kernel of a CUDA source, compiled with `options` and loaded on a GPU at the first call.

    Raises RuntimeError where CuPy is missing or cannot compile, with the reason.
    """
    try:
        import cupy

        module = cupy.RawModule(code=code(source), options=options, backend="nvrtc")
        with torch.cuda.device(device):
            return module.get_function(name)
    except Exception as error:  # of CuPy, its compiler or its cache folder
        major = (torch.version.cuda or "13").split(".")[0]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"CuPy cannot make it ({reason}): if CuPy or NVRTC is missing, pip install "
            f"'cupy-cuda{major}x[ctk]>=14', see requirements-gpu.txt"
        ) from error


def launch(
    source: Path,
    name: str,
    options: tuple[str, ...],
    device: torch.device,
    *,
    grid: int,
    block: int,
    arguments: Sequence[Tensor | int | float | None],
    shared: int = 0,
) -> None:
    """Launch `grid` blocks of `block` threads on the current stream of `device`.

    Every argument is 64 bits wide: a tensor is passed as its address, None as the null pointer, int
    as long long, float as double. `shared` is the size of shared memory in bytes, at most 48 KB.
    """
    values = [
        argument.data_ptr() if isinstance(argument, Tensor) else 0 if argument is None else argument
        for argument in arguments
    ]
    function = kernel(source, name, options, device)
    with current_stream(device):
        function((grid,), (block,), values, shared_mem=shared)


@contextlib.contextmanager
def current_stream(device: torch.device) -> Iterator[None]:
    """A context in which CuPy launches on PyTorch's current stream of `device`."""
    import cupy

    stream = torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        if hasattr(stream, "__cuda_stream__") and hasattr(cupy.cuda.Stream, "from_external"):
            on_stream = cupy.cuda.Stream.from_external(stream)
        else:  # before PyTorch 2.10 or CuPy 14
            on_stream = cupy.cuda.ExternalStream(stream.cuda_stream)
        with on_stream:
            yield
