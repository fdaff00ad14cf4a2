"""CUDA sources: CuPy compiles them at first use and launches them on PyTorch's stream.

Importing this module does not import CuPy.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
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


class KernelUnavailable(RuntimeError):
    """CuPy is missing or unusable; the message says what to install."""


class Source:
    """A CUDA source file; `names` are its kernels, `what` describes them in messages.

    It is compiled once for each set of options and each device, at first use.
    """

    def __init__(self, path: Path, names: Sequence[str], what: str) -> None:
        self.path = path
        self.names = names
        self.what = what
        self.loaded: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = {}

    def code(self) -> str:
        """The source with its includes expanded, because NVRTC gets no include folder."""
        return re.sub(
            r'^#include "(.+)"$',
            lambda line: (self.path.parent / line[1]).read_text(encoding="utf-8"),
            self.path.read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )

    def kernels(self, device_index: int, options: tuple[str, ...]) -> dict[str, Any]:
        """The kernels by name, compiled and loaded; raises KernelUnavailable without CuPy."""
        if (device_index, options) not in self.loaded:
            self.loaded[device_index, options] = self._load(device_index, options)
        return self.loaded[device_index, options]

    @functools.cache  # noqa: B019, as many as there are sources
    def problem(self, device_index: int, options: tuple[str, ...]) -> str:
        """Load the kernels now, since a CUDA graph cannot record that; the fault, or ""."""
        try:
            self.kernels(device_index, options)
        except Exception as error:  # of CuPy, its compiler or its cache folder
            return str(error).strip() or type(error).__name__
        return ""

    def _load(self, device_index: int, options: tuple[str, ...]) -> dict[str, Any]:
        cupy = import_cupy()
        if isinstance(cupy, Exception):
            raise KernelUnavailable(f"{self.what} need CuPy: {requirement()}") from cupy
        module = cupy.RawModule(code=self.code(), options=options, backend="nvrtc")
        try:
            with torch.cuda.device(device_index), cupy.cuda.Device(device_index):
                return {name: module.get_function(name) for name in self.names}
        except (ImportError, OSError, RuntimeError) as error:
            # CuPy raises these without NVRTC or headers; it has another error for a bad source.
            raise KernelUnavailable(
                f"CuPy could not compile {self.what} ({error}): it needs NVRTC and CUDA's headers, "
                f"from the CUDA toolkit or, with CuPy 14, pip install '{_package()}[ctk]'"
            ) from error

    def launch(
        self,
        name: str,
        options: tuple[str, ...],
        device: torch.device,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: Sequence[int | float],
        shared: int = 0,
    ) -> None:
        """Launch on PyTorch's current stream, with `shared` bytes of shared memory (at most 48 KB).

        Arguments are 64 bits wide: addresses and integers as long long, floats as double. Raises
        ValueError if `device` is not a GPU.
        """
        if device.type != "cuda":
            raise ValueError(f"{self.what} take CUDA tensors, not tensors on {device}")
        kernel = self.kernels(device.index, options)[name]
        cupy = import_cupy()
        handle = torch.cuda.current_stream(device).cuda_stream
        with torch.cuda.device(device), cupy.cuda.Device(device.index), on_stream(handle):
            kernel(grid, block, arguments, shared_mem=shared)


def requirement() -> str:
    """The package to install where CuPy is unusable, and the reason."""
    return f"pip install {_package()}, see requirements-gpu.txt ({import_cupy()})"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a kernel's arithmetic for tensors of `dtype`: `State` in scalars.cuh."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def multiprocessors(device: torch.device) -> int:
    """The GPU's number of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def value(argument: Tensor | float | None) -> int | float:
    """A kernel's argument as a number: the address of a tensor, 0 for None."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument


class _StreamHandle:
    """PyTorch's stream in the CUDA stream protocol, which torch.cuda.Stream lacks before 2.10."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def on_stream(handle: int) -> Any:
    """A context in which CuPy launches on the CUDA stream `handle`; needs CuPy."""
    cupy = import_cupy()
    # CuPy 14 adds from_external and deprecates ExternalStream.
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_StreamHandle(handle))
    return cupy.cuda.ExternalStream(handle)


@functools.cache
def import_cupy() -> ModuleType | Exception:
    """CuPy, or the reason why it is unusable."""
    try:
        import cupy

        if not cupy.cuda.is_available():
            return RuntimeError("CuPy is installed but finds no usable GPU")
    except Exception as error:  # every fault of an installation means the same: no kernels
        return error
    return cupy


def _package() -> str:
    major = (torch.version.cuda or "13").split(".")[0]
    return f"cupy-cuda{major}x"
