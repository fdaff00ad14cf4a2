"""CUDA sources without a GPU: run as C++ on the CPU, and compiled for GPUs."""

import ctypes
import functools
import math
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qrnn import cuda

SHIM = Path(__file__).with_name("shim")
NAMES = {
    "forget_mult.cu": ("qrnn_forward", "qrnn_backward"),
    "cross_entropy.cu": ("cross_entropy",),
}
ARCHITECTURES = [80, 90]  # of A100 and H100
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def compile_shim(
    source: Path, program: str, output: Path, options: tuple[str, ...], *more: str
) -> None:
    """Compile a program of tests/shim with a CUDA source, with the options that CuPy would get."""
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += [*options, f'-DSOURCE="{source}"']
    command += ["-DENTRIES=" + " ".join(f"KERNEL_ENTRY({name})" for name in NAMES[source.name])]
    if "__syncthreads" in source.read_text("utf-8"):
        command.append("-DFIBERS")
    command += [*more, "-o", str(output), str(SHIM / program)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


class Shim:
    """Kernels as C++: `kernel` replaces `cuda.kernel`. `launched` names the launched kernels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launched: list[str] = []

    @functools.cache  # noqa: B019, there is one
    def library(self, source: Path, options: tuple[str, ...]) -> ctypes.CDLL:
        path = self.folder / f"{source.stem}{''.join(options)}.so"
        compile_shim(source, "launch.cpp", path, options, "-shared", "-fPIC")
        library = ctypes.CDLL(str(path))
        library.kernel_parameters.restype = library.launch_kernel.restype = ctypes.c_char_p
        return library

    def kernel(self, source: Path, name: str, options: tuple[str, ...], device: torch.device):
        assert device.type == "cpu"
        library = self.library(source, options)
        kinds = library.kernel_parameters(name.encode()).decode()
        types = {"p": ctypes.c_longlong, "i": ctypes.c_longlong, "d": ctypes.c_double}

        def launch(grid, block, arguments, *, shared_mem):
            values = []
            for kind, argument in zip(kinds, arguments, strict=True):
                assert type(argument) is (float if kind == "d" else int), (name, kinds, arguments)
                values.append(types[kind](argument))
            addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            # The driver's default limits.
            assert grid[0] >= 1
            assert 0 <= shared_mem <= 48 << 10
            size = ctypes.c_size_t(shared_mem)
            failure = library.launch_kernel(name.encode(), *grid, *block, size, addresses)
            assert failure is None, failure
            self.launched.append(name)

        return launch


def check_bounds(source: Path, program: str, options: tuple[str, ...], folder: Path) -> None:
    """Run a program whose buffers have exactly the needed size, under sanitizers."""
    output = folder / "bounds"
    sanitizers = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    try:
        compile_shim(source, program, output, options, *sanitizers)
    except AssertionError as error:
        if "cannot find" in str(error):
            pytest.skip("this g++ has no sanitizer libraries")
        raise
    result = subprocess.run([output], capture_output=True, text=True)
    assert result.stdout.strip() == "within bounds", result.stderr


MARGIN = 72  # canary elements on each side: more than a block of threads, a multiple of a vector


class Canaries:
    """Tensors with NaN on both sides, and a check that it is unchanged."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def new_empty(self, like, *shape, dtype=None) -> torch.Tensor:
        """As Tensor.new_empty, but filled with NaN: an unwritten element shows in the result."""
        size = torch.Size(shape if isinstance(shape[0], int) else shape[0])
        dtype = dtype or like.dtype
        buffer = torch.full((size.numel() + 2 * MARGIN,), math.nan, dtype=dtype)
        self.buffers.append(buffer)
        return buffer[MARGIN:-MARGIN].view(size)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A guarded copy of an input: a read outside it spoils the result."""
        if not tensor.is_floating_point():
            return tensor.clone()
        return self.new_empty(tensor, tensor.shape).copy_(tensor)

    def check(self) -> None:
        for buffer in self.buffers:
            assert torch.cat([buffer[:MARGIN], buffer[-MARGIN:]]).isnan().all()
        self.buffers.clear()


def nvrtc_library() -> Path | None:
    """libnvrtc from the wheel nvidia-cuda-nvrtc, or None."""
    nvidia = find_spec("nvidia")
    for folder in nvidia.submodule_search_locations if nvidia else ():
        for library in sorted(Path(folder).glob("**/libnvrtc.so*")):
            return library
    return None


def check_nvrtc(source: Path, architecture: int, options: tuple[str, ...], most: int) -> None:
    """Compile a source as CuPy would, down to machine code.

    Checks that it has all kernels, with no stack, no spills and at most `most` registers a thread.
    """
    compiler = pytest.importorskip("pynvrtc.compiler")
    library = nvrtc_library()
    if library is None:
        pytest.skip("the wheel nvidia-cuda-nvrtc is not installed")
    # NVRTC 13.0 looks for this library on the loader's path, where the wheel does not put it.
    for builtins in library.parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins))
    program = compiler.Program(cuda.code(source), source.name, lib_name=str(library))
    # CuPy's own options, with CuPy 13's default standard, the oldest in use.
    own = ["--std=c++14", "-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v"]
    program.compile([*own, f"--gpu-architecture=sm_{architecture}", *options])
    pattern = re.compile(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    log = program._interface.nvrtcGetProgramLog(program._program)
    found = {name: tuple(map(int, numbers)) for name, *numbers in pattern.findall(log)}
    assert set(found) == set(NAMES[source.name])
    # CUDA 12's compiler spills 16 bytes in a QRNN kernel in bfloat16.
    if program._interface.nvrtcVersion() < (13, 0):
        return
    for name, (*memory, registers) in found.items():
        assert memory == [0, 0, 0], f"{name} uses local memory: {memory}"
        assert registers <= most, f"{name} uses {registers} registers"
