"""Tests of CUDA sources without a GPU: run as C++ on the CPU, and compiled for GPUs."""

import ctypes
import math
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qrnn import cuda

SHIM = Path(__file__).with_name("shim")
ARCHITECTURES = [80, 90]  # of A100 and H100
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def compile_shim(
    source: cuda.Source, program: str, output: Path, options: tuple[str, ...], *more: str
) -> None:
    """Compile a program of tests/shim with a CUDA source, with the options that CuPy would get."""
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += [*options, f'-DSOURCE="{source.path}"']
    command += ["-DENTRIES=" + " ".join(f"KERNEL_ENTRY({name})" for name in source.names)]
    command += [*more, "-o", str(output)]
    result = subprocess.run([*command, str(SHIM / program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


class ShimLauncher:
    """Replaces a source's `launch`, on CPU tensors; `options` lists every set of options it gets.

    `launched` lists the names of the launched kernels. With `fibers`, threads may synchronise.
    """

    def __init__(
        self,
        source: cuda.Source,
        folder: Path,
        options: Iterable[tuple[str, ...]],
        fibers: bool = False,
    ) -> None:
        paths = {each: folder / f"{number}.so" for number, each in enumerate(options)}

        def build(each: tuple[str, ...]) -> None:
            more = ["-shared", "-fPIC", *["-DFIBERS"] * fibers]
            compile_shim(source, "launch.cpp", paths[each], each, *more)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(build, paths))
        self.libraries = {each: ctypes.CDLL(str(path)) for each, path in paths.items()}
        for library in self.libraries.values():
            library.kernel_parameters.restype = library.launch_kernel.restype = ctypes.c_char_p
            for name in source.names:
                kinds = library.kernel_parameters(name.encode()).decode()
                assert not set(kinds) - set("pid"), f"a parameter of {name} is not 64 bits wide"
        self.launched: list[str] = []

    def __call__(self, name, options, device, grid, block, arguments, shared=0) -> None:
        assert device.type == "cpu"
        assert len(grid) == len(block) == 1
        assert grid[0] >= 1, "an empty grid is an error of the driver's"
        library = self.libraries[options]
        kinds = library.kernel_parameters(name.encode()).decode()
        expected = [float if kind == "d" else int for kind in kinds]
        assert [type(argument) for argument in arguments] == expected, (name, kinds, arguments)
        values = [
            (ctypes.c_double if kind == "d" else ctypes.c_longlong)(argument)
            for kind, argument in zip(kinds, arguments, strict=True)
        ]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        # The driver's default limit per block.
        assert 0 <= shared <= 48 << 10
        size = ctypes.c_size_t(shared)
        failure = library.launch_kernel(name.encode(), grid[0], block[0], size, addresses)
        assert failure is None, failure
        self.launched.append(name)


def check_bounds(
    source: cuda.Source, program: str, options: tuple[str, ...], folder: Path, *more: str
) -> None:
    """Run a program whose buffers have exactly the needed size, under sanitizers."""
    output = folder / "bounds"
    sanitizers = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    try:
        compile_shim(source, program, output, options, *sanitizers, *more)
    except AssertionError as error:
        if "cannot find" in str(error):
            pytest.skip("this g++ has no sanitizer libraries")
        raise
    result = subprocess.run([output], capture_output=True, text=True)
    assert result.stdout.strip() == "within bounds", result.stderr


MARGIN = 72  # canary elements on each side: more than a block of threads, a multiple of a vector


class Canaries:
    """Tensors with a number (NaN by default) on both sides, and a check that it is unchanged."""

    def __init__(self, number: float = torch.nan) -> None:
        self.number = number
        self.buffers: list[torch.Tensor] = []

    def empty(self, shape, like, dtype=None, shift=0) -> torch.Tensor:
        """A tensor filled with the number, so that an unwritten element shows in the result.

        It begins `shift` elements after a multiple of 16 bytes.
        """
        size, dtype = torch.Size(shape).numel(), dtype or like.dtype
        length = size + 2 * MARGIN + shift
        buffer = torch.full((length,), self.number, dtype=dtype, device=like.device)[shift:]
        self.buffers.append(buffer)
        return buffer[MARGIN : MARGIN + size].view(shape)

    def copy(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """A guarded copy of an input: a read outside it spoils the result."""
        if tensor is None:
            return None
        return self.empty(tensor.shape, tensor).copy_(tensor).requires_grad_(tensor.requires_grad)

    def check(self) -> None:
        for buffer in self.buffers:
            edges = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
            assert (edges.isnan() if math.isnan(self.number) else edges == self.number).all()
        self.buffers.clear()


def nvrtc_library() -> Path | None:
    """libnvrtc from the wheel nvidia-cuda-nvrtc, or None."""
    nvidia = find_spec("nvidia")
    for folder in nvidia.submodule_search_locations if nvidia else ():
        for library in sorted(Path(folder).glob("**/libnvrtc.so*")):
            return library
    return None


def check_nvrtc(source: cuda.Source, architecture: int, options: tuple[str, ...], most: int) -> str:
    """Compile a source as CuPy would, down to machine code; returns the PTX.

    Checks that it has all kernels, with no stack, no spills and at most `most` registers a thread.
    """
    compiler = pytest.importorskip("pynvrtc.compiler")
    library = nvrtc_library()
    if library is None:
        pytest.skip("the wheel nvidia-cuda-nvrtc is not installed")
    program = compiler.Program(source.code(), source.path.name, lib_name=str(library))
    # CuPy's own options, with CuPy 13's default standard, the oldest in use.
    own = ["--std=c++14", "-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v"]
    ptx = program.compile([*own, f"--gpu-architecture=sm_{architecture}", *options])
    pattern = re.compile(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    log = program._interface.nvrtcGetProgramLog(program._program)
    found = {name: tuple(map(int, numbers)) for name, *numbers in pattern.findall(log)}
    assert set(found) == set(source.names)
    # CUDA 12's compiler spills 16 bytes in a QRNN kernel in bfloat16.
    if program._interface.nvrtcVersion() < (13, 0):
        return ptx
    for name, (*memory, registers) in found.items():
        assert memory == [0, 0, 0], f"{name} uses local memory: {memory}"
        assert registers <= most, f"{name} uses {registers} registers"
    return ptx
