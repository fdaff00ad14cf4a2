"""Sample text from a trained model, word by word."""

import run.interpreter  # noqa: F401

import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import checkpoint
from cli import flags
from cli.parser import Parser, Recorded
from cli.types import positive_int, share_of_one
from data import EOS, Dictionary
from files.writing import check_writable, writing
from loss import TrainingLoss
from model import Hidden
from run import program
from run.network import network_of
from run.progress import Bar
from scoring.spelling import Spelling
from utils import ToolkitError, seed_everything

WORDS_PER_LINE = 20


def build_parser() -> Parser:
    """The command line of generate.py."""
    parser = Parser("generate", __doc__)
    parser.flag(
        "",
        "--data",
        "./data/penn",
        "no effect, kept from the original: the vocabulary is read from the model file",
    )
    flags.add_model(parser)
    add = parser.group("")
    add("--checkpoint", "./model.pt", "model file to sample from")
    add(
        "--prompt",
        "",
        "words to continue, written as in the corpus, from the start of a line; by default a "
        "random word is continued, with --lines the start of a line",
        either="prompts",
    )
    add(
        "--next",
        needs="--prompt",
        type=positive_int,
        metavar="K",
        help="print the K likeliest words after --prompt",
    )
    add = parser.group("", beside=["--next"])
    add(
        "--outf",
        "generated.txt",
        "file to write, - for standard output",
        beside=["--next", "--interactive"],
    )
    add("--words", 1000, "number of words to sample, at most", type=positive_int)
    add("--lines", either="texts", type=positive_int, help="lines to sample, each up to its <eos>")
    add("--temperature", 1.0, "above 1 more varied, 0 likeliest")
    add("--top-k", type=positive_int, metavar="K", help="sample among the K likeliest words")
    add("--top-p", type=share_of_one, metavar="P", help="sample among the likeliest that reach P")
    add("--no-unk", False, "never sample the unknown word")
    add("--samples", 1, "texts to sample at once", either="texts", type=positive_int)
    add("--interactive", False, "continue each line of input", either="prompts")
    add("--log-interval", 100, "words between progress lines", type=positive_int)
    flags.add_tokens_are(parser, needs="--lines")
    flags.add_seed(parser, beside=["--next"])
    flags.add_device(parser)
    return parser


@torch.inference_mode()
def next_words(network: TrainingLoss, data: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
    """`log p` (batch, ntoken) of every word after `data` (n, batch), and the new state."""
    output, hidden = network.model(data, hidden)
    decoder = network.model.decoder
    last = output[-data.size(1) :]
    return network.criterion.logprob(decoder.weight, decoder.bias, last), hidden


def choose(
    logprob: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Draw a word (batch, 1) from each row of `logprob` (batch, ntoken), divided by `temperature`.

    The candidates are the `top_k` likeliest words, and of these the fewest whose probabilities,
    added up from the likeliest, reach `top_p`.
    """
    # A smaller temperature is 0 in float32, and a quotient by 0 is infinite.
    scaled, words = logprob / max(temperature, 1e-30), None
    if top_k is not None and top_k < scaled.size(1):
        scaled, words = scaled.topk(top_k)
    elif top_p is not None:
        scaled, words = scaled.sort(descending=True)
    if top_p is not None:
        probs = scaled.softmax(dim=1)
        # A word is a candidate if the likelier words have not reached `top_p` yet.
        scaled = scaled.masked_fill(probs.cumsum(dim=1) - probs >= top_p, -torch.inf)
    chosen = torch.multinomial(scaled.softmax(dim=1), 1)
    return chosen if words is None else words.gather(1, chosen)


@torch.inference_mode()
def sample(
    network: TrainingLoss,
    prompt: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    banned: int | None = None,
) -> Iterator[Tensor]:
    """Yield sampled word ids (batch,) without end, from `prompt` (n, batch) on; see `choose`.

    The distribution is the criterion's over the full vocabulary, without the word `banned`.
    """
    network.eval()
    hidden, data = network.init_hidden(prompt.size(1)), prompt
    while True:
        logprob, hidden = next_words(network, data, hidden)
        if banned is not None:
            logprob[:, banned] = -torch.inf
        word = choose(logprob, temperature, top_k, top_p)
        yield word.squeeze(1)
        data = word.t()


def prompt_ids(words: Sequence[str], dictionary: Dictionary) -> list[int]:
    """The ids of <eos>, which begins a line, and of the words of --prompt; unknown ones are <unk>.

    Unknown words are printed to standard error; if the vocabulary has no <unk>, they raise
    ToolkitError.
    """
    known, unk = dictionary.word2idx, dictionary.unk
    unknown = list(dict.fromkeys(word for word in words if word not in known))
    if unknown and unk not in known:
        raise ToolkitError(
            f"the model does not know the word {unknown[0]!r} of --prompt: write words as in its "
            "corpus (lower case, tokens separated by spaces)"
        )
    if unknown:
        sys.stderr.write(f"not in the vocabulary, read as {unk}: {' '.join(unknown)}\n")
    first = [known[EOS]] if EOS in known else []
    if not first and not words:
        raise ToolkitError(f"the model knows no {EOS} to begin with: give words with --prompt")
    return [*first, *(known.get(word, known.get(unk)) for word in words)]


def as_text(words: Sequence[str]) -> str:
    """The words in lines of 20."""
    lines = [words[n : n + WORDS_PER_LINE] for n in range(0, len(words), WORDS_PER_LINE)]
    return "".join(" ".join(line) + "\n" for line in lines)


def compose(network: TrainingLoss, dictionary: Dictionary, prompt: str, args: Any) -> str:
    """The texts that continue `prompt`, which is a part of them, as `args` say."""
    words, count = prompt.split(), args.lines or args.samples
    if words or args.lines:
        start = torch.tensor(prompt_ids(words, dictionary)).unsqueeze(1).repeat(1, count)
    else:
        start = torch.randint(len(dictionary), (1, count))
    chosen = sample(
        network,
        start.to(network.device),
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        banned=dictionary.word2idx[dictionary.unk] if args.no_unk else None,
    )
    ids, running = [], torch.ones(count, dtype=torch.bool, device=network.device)
    with Bar(args.words, "generating", "word") as bar:
        for number in range(1, args.words + 1):
            ids.append(next(chosen))
            bar.update(1)
            # Standard output gets only the text.
            if number % args.log_interval == 0 and args.outf != "-" and not args.interactive:
                bar.line(f"| Generated {number}/{args.words} words")
            if args.lines:
                running &= ids[-1] != dictionary.word2idx.get(EOS, -1)
                if not running.any():
                    break
    # The ids are copied to the host once: a copy for every word would stall a GPU each time.
    texts = [[dictionary.idx2word[i] for i in text] for text in torch.stack(ids, dim=1).tolist()]
    if not args.lines:
        return "\n".join(as_text([*words, *text]) for text in texts)
    spelling = Spelling.of(dictionary, args.tokens_are)
    lines = ([*words, *itertools.takewhile(lambda word: word != EOS, text)] for text in texts)
    return "".join(f"{spelling.line(line)}\n" for line in lines)


def converse(network: TrainingLoss, dictionary: Dictionary, args: Any) -> None:
    """Print the continuation of each line of standard input."""
    for line in sys.stdin.buffer if sys.stdin else ():
        try:
            sys.stdout.write(compose(network, dictionary, line.decode(errors="replace"), args))
        except ToolkitError as error:
            sys.stderr.write(f"{error}\n")


@program.out_of_memory("--samples")
def main(argv: Sequence[str] | None = None) -> None:
    """Write sampled words; raises ToolkitError for problems the user can fix."""
    parser = build_parser()
    given = parser.given(argv)
    path = given.get("checkpoint", parser.flags["checkpoint"].default)
    loaded = checkpoint.load(path)
    args = parser.settle(given, Recorded(path, "start", loaded.config, loaded.args))
    if not (args.outf == "-" or args.next or args.interactive):
        check_writable(args.outf, "--outf", path)
    dictionary = loaded.dictionary
    if args.no_unk and dictionary.unk not in dictionary.word2idx:
        raise ToolkitError(
            f"the model has no {dictionary.unk} for --no-unk to leave out: leave the flag out, or "
            "name the corpus's own with main.py --unk"
        )
    # Words of the command line are UTF-8 in any locale.
    prompt = os.fsencode(args.prompt).decode(errors="replace")
    network = network_of(loaded, args)
    seed_everything(args.seed)
    if args.next:
        ids = torch.tensor(prompt_ids(prompt.split(), dictionary), device=network.device)
        logprob, _ = next_words(network, ids.unsqueeze(1), network.init_hidden(1))
        best = logprob[0].topk(min(args.next, len(dictionary)))
        for nats, word in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            print(f"{math.exp(nats):.6f} {dictionary.idx2word[word]}")
    elif args.interactive:
        converse(network, dictionary, args)
    elif args.outf == "-":
        sys.stdout.write(compose(network, dictionary, prompt, args))
    else:
        text = compose(network, dictionary, prompt, args)
        with writing(args.outf, "--outf") as file:
            file.write(text.encode())
        sys.stderr.write(f"written to {args.outf}\n")


if __name__ == "__main__":
    program.run(main)
