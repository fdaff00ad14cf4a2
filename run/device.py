"""A script's device, the precision of its matrix products, and its memory."""

import ctypes
import os
from collections.abc import Mapping
from typing import Any

import torch

from utils import ToolkitError

# One thread takes the first exponentials of a process here: taken by two threads at once they are
# rounded otherwise in about one process in 60, and so are all later ones (results/determinism.md).
torch.zeros(1).exp_()

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def select_device(cuda: bool | None) -> torch.device:
    """The device to run on: CUDA if available, unless `cuda` is False.

    Raises ToolkitError if `cuda` is True and CUDA is not available.
    """
    if cuda is False:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if cuda:
        raise ToolkitError(
            "--cuda was given but PyTorch finds no CUDA device: leave it out to run on the CPU"
        )
    return torch.device("cpu")


def set_precision(precision: str | None, device: torch.device) -> str:
    """Set the precision of float32 matrix products, and return the precision in use.

    `precision` is fp32, tf32, bf16 or None: tf32 on CUDA, fp32 elsewhere. With bf16 on CUDA,
    products outside autocast are in tf32. Raises ToolkitError for one that `device` lacks.
    """
    cuda = device.type == "cuda"
    if precision is None:
        precision = "tf32" if cuda else "fp32"
    if precision == "tf32" and not cuda:
        raise ToolkitError(
            "--precision tf32 is a format of GPUs: on the CPU, give --precision fp32 or bf16"
        )
    if precision == "bf16" and not has_bf16(device):
        raise ToolkitError(
            "--precision bf16 would be slower than float32 on this CPU, and an LSTM cannot run: a "
            "GPU or a CPU with AVX-512 has bfloat16; leave the flag out"
        )
    if cuda:
        # PyTorch's own default is tf32 for cuDNN's recurrent layers only.
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return precision


def has_bf16(device: torch.device) -> bool:
    """Whether PyTorch has fast matrix products in bfloat16 on `device`, and an LSTM."""
    if device.type == "cuda" or not torch.backends.mkldnn.is_available():
        return True
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def score_as_trained(recorded: Mapping[str, Any], device: torch.device) -> None:
    """Set the precision of float32 matrix products to that of evaluation during training.

    `recorded` are the flags in the model file. On the CPU it is always float32.
    """
    if device.type == "cuda":
        set_precision(recorded.get("precision"), device)


def make_deterministic() -> None:
    """Make CUDA in this process give the same bits for the same work, at some cost in speed.

    Call it before CUDA is first used: cuBLAS reads its setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling memory that is written next anyway would cost time only.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def keep_memory() -> None:
    """Make glibc keep freed memory for the next allocation instead of returning it to the system.

    Every step allocates the same large tensors; by default each gets fresh pages from the system,
    and their first use costs more than many of the operations on them. Without glibc, nothing
    happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # glibc's maximum
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
