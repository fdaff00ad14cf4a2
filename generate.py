"""Sample text from a trained model, word by word."""

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import checkpoint
from cli import flags, program
from cli.device import score_as_trained, select_device
from cli.parser import Parser, positive, positive_int
from cli.progress import Bar
from cli.resuming import check_architecture
from files.writing import unwritable, writing
from model import RNNModel
from splitcross import SplitCrossEntropyLoss
from utils import ToolkitError, seed_everything

WORDS_PER_LINE = 20


def build_parser() -> Parser:
    """The command line of generate.py."""
    parser = Parser("generate", __doc__)
    parser.flag(
        "",
        "--data",
        default="./data/penn",
        help="accepted as in the original: the vocabulary is read from the model file",
    )
    flags.add_model(parser)
    parser.flag("", "--checkpoint", default="./model.pt", help="model file to sample from")
    parser.flag("", "--outf", default="generated.txt", help="file to write, - for standard output")
    parser.flag("", "--words", type=positive_int, default=1000, help="number of words to sample")
    parser.flag(
        "",
        "--temperature",
        type=positive,
        default=1.0,
        help="above 1 for more varied words, below 1 for likelier ones",
    )
    parser.flag(
        "", "--top-k", type=positive_int, metavar="K", help="sample among the K likeliest words"
    )
    parser.flag(
        "",
        "--prompt",
        default="",
        help="words to continue, in the tokens of the corpus; without it, from a random word",
    )
    parser.flag(
        "",
        "--log-interval",
        type=positive_int,
        default=100,
        help="words between two lines of progress",
    )
    flags.add_seed(parser)
    flags.add_device(parser)
    return parser


@torch.inference_mode()
def sample(
    model: RNNModel,
    criterion: SplitCrossEntropyLoss,
    prompt: Tensor,
    temperature: float,
    top_k: int | None = None,
) -> Iterator[Tensor]:
    """Sample word ids (1,) without end, the first one after `prompt` (n,).

    The distribution is the criterion's over the full vocabulary, its logarithm divided by
    `temperature`, cut to the `top_k` likeliest words.
    """
    model.eval()
    hidden = model.init_hidden(1)
    data = prompt.unsqueeze(1)
    # In float32 a smaller number is 0, and every quotient by it infinite.
    temperature = max(temperature, 1e-30)
    while True:
        output, hidden = model(data, hidden)
        logprob = criterion.logprob(model.decoder.weight, model.decoder.bias, output[-1:])
        if top_k is None or top_k >= logprob.size(1):
            word = torch.multinomial((logprob[0] / temperature).softmax(dim=0), 1)
        else:
            candidates, words = logprob[0].topk(top_k)
            word = words[torch.multinomial((candidates / temperature).softmax(dim=0), 1)]
        yield word
        data = word.unsqueeze(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Write sampled words; raises ToolkitError for what the user can mend."""
    args = build_parser().parse_args(argv)
    loaded = checkpoint.load(args.checkpoint)
    check_architecture(args, loaded.config, args.checkpoint)
    device = select_device(args.cuda)
    score_as_trained(loaded.args, device)
    problem = None if args.outf == "-" else unwritable(args.outf)
    if problem:
        raise ToolkitError(f"cannot write {args.outf} ({problem}): pass another --outf")
    dictionary = loaded.dictionary
    unknown = [word for word in args.prompt.split() if word not in dictionary.word2idx]
    if unknown:
        raise ToolkitError(
            f"the model does not know the word {unknown[0]!r} of --prompt: write it as its corpus "
            "does (lower case, tokens apart), or <unk> where the corpus has that"
        )
    model, criterion = checkpoint.rebuild(loaded, device)
    seed_everything(args.seed)
    if args.prompt.split():
        known = [dictionary.word2idx[word] for word in args.prompt.split()]
        prompt = torch.tensor(known, device=device)
    else:
        prompt = torch.randint(len(dictionary), (1,)).to(device)

    words = sample(model, criterion, prompt, args.temperature, args.top_k)
    ids = []
    with Bar(args.words, "generating", "word") as bar:
        for number in range(1, args.words + 1):
            ids.append(next(words))
            bar.update(1)
            # Standard output holds the text and nothing else.
            if number % args.log_interval == 0 and args.outf != "-":
                bar.line(f"| Generated {number}/{args.words} words")
    # All at once: asking for each word's number would have a GPU wait for the host every time.
    pieces = []
    for number, word in enumerate(torch.cat(ids).tolist(), start=1):
        pieces.append(dictionary.idx2word[word])
        pieces.append("\n" if number % WORDS_PER_LINE == 0 else " ")
    text = "".join(pieces)
    if args.outf == "-":
        sys.stdout.write(text.rstrip() + "\n")
        return
    with writing(args.outf, "--outf") as file:
        file.write(text.encode())


if __name__ == "__main__":
    program.run(main)
