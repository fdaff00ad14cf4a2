"""Write a model as TorchScript, or as ONNX, which run without this code.

    python tools/export.py model.pt model.ts

What is written takes word ids (length, batch) and the tensors of the hidden state, zeros at the
start of a text. It returns log p (length, batch, words), in nats, of every word after each of the
ids, and the tensors of the new state, for any length and batch. The words by id, one a line, are
written to model.ts.vocab.
"""

import io
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run.interpreter  # noqa: F401

import torch
from torch import Tensor, nn

import checkpoint
import fast
from cli.parser import Parser
from files.writing import check_writable, writing
from loss import TrainingLoss
from qrnn import definition
from run import program
from utils import ToolkitError, map_state

# A trace has as many steps of a loop as its example had; a script keeps the loop.
definition.forget_mult = torch.jit.script_if_tracing(definition.forget_mult)


def build_parser() -> Parser:
    """The command line of export.py."""
    parser = Parser("", __doc__)
    parser.flag("", "model", help="model file")
    parser.flag("", "out", help="file to write")
    parser.flag("", "--onnx", False, "write ONNX; needs the package onnx")
    return parser


class Exported(nn.Module):
    """The network with its decoder and a flat state, as the module's docstring describes it."""

    def __init__(self, network: TrainingLoss) -> None:
        super().__init__()
        self.network = network
        self.requires_grad_(False).eval()

    def forward(self, words: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """From `words` (length, batch) and a state to log p (length, batch, ntoken) and a state."""
        model, parts = self.network.model, iter(state)
        hidden = map_state(lambda _: next(parts), model.init_hidden(1))
        output, hidden = model(words, hidden)
        logprob = self.network.criterion.logprob(model.decoder.weight, model.decoder.bias, output)
        return logprob.view(words.size(0), words.size(1), -1), *flat(hidden)


def flat(hidden: Any) -> list[Tensor]:
    """The tensors of a hidden state."""
    parts: list[Tensor] = []
    map_state(parts.append, hidden)
    return parts


def check(exported: Exported, traced: Callable[..., tuple[Tensor, ...]], ntoken: int) -> None:
    """Raise ValueError if the trace differs from the network at another length and batch."""
    words = torch.arange(21).view(7, 3) % ntoken
    own = flat(exported.network.init_hidden(3))
    other = [torch.zeros_like(part) for part in own]
    for part in words.split(5):
        expected, *own = exported(part, *own)
        found, *other = traced(part, *other)
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
            raise ValueError("another length or batch gives another log p")


def to_onnx(traced: torch.jit.ScriptModule, inputs: tuple[Tensor, ...]) -> bytes:
    """A trace as the content of an ONNX file."""
    state = [f"state_{number}" for number in range(1, len(inputs))]
    names, results = ["words", *state], ["logprob", *(f"new_{name}" for name in state)]
    axes = {name: {1: "batch"} for name in names + results}
    axes["words"][0] = axes["logprob"][0] = "length"
    # The files of the newer exporter are for one length or batch (PyTorch 2.13).
    options = {"input_names": names, "output_names": results, "dynamic_axes": axes, "dynamo": False}
    buffer = io.BytesIO()
    torch.onnx.export(traced, inputs, buffer, **options)
    return buffer.getvalue()


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Export; raises ToolkitError for problems the user can fix."""
    args = build_parser().parse_args(argv)
    if args.onnx and find_spec("onnx") is None:
        raise ToolkitError("--onnx needs the package onnx: pip install onnx")
    vocabulary = f"{args.out}.vocab"
    for path in (args.out, vocabulary):
        check_writable(path, "file to write", args.model)
    network, dictionary = checkpoint.open_model(args.model)
    fast.choose(network, plain=True)
    exported, state = Exported(network), flat(network.init_hidden(2))
    inputs = (torch.zeros(3, 2, dtype=torch.long), *state)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(exported, inputs, check_trace=False)
            check(exported, traced, len(dictionary))
            content = to_onnx(traced, inputs) if args.onnx else traced.save_to_buffer()
    except Exception as error:
        # PyTorch raises many kinds of error for what it cannot trace.
        raise ToolkitError(
            f"{args.model} cannot be exported ({checkpoint.in_short(error)}): a cell of your own "
            "must start from zeros and have no Python loop over time"
        ) from error
    with writing(args.out, "file to write") as file, writing(vocabulary, "file to write") as words:
        file.write(content)
        words.write("".join(f"{word}\n" for word in dictionary.idx2word).encode())
    shapes = ", ".join(str(tuple(part.shape)) for part in state)
    print(f"Wrote {args.out} and {vocabulary}; the state, of a batch of 2, has {shapes}")


if __name__ == "__main__":
    program.run(main)
