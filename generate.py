"""Sample text from a trained model, word by word."""

import math
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import checkpoint
from cli import flags
from cli.parser import Parser, Recorded
from cli.types import positive, positive_int, share_of_one
from data import EOS, UNK, Dictionary
from files.writing import check_writable, writing
from loss import TrainingLoss
from model import Hidden
from run import program
from run.network import network_of
from run.progress import Bar
from utils import ToolkitError, seed_everything

WORDS_PER_LINE = 20


def build_parser() -> Parser:
    """The command line of generate.py."""
    parser = Parser("generate", __doc__)
    parser.flag(
        "",
        "--data",
        default="./data/penn",
        help="no effect, kept from the original: the vocabulary is read from the model file",
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
        "--top-p",
        type=share_of_one,
        metavar="P",
        help="sample among the likeliest words, as few as reach a total probability of P",
    )
    parser.flag("", "--no-unk", action="store_true", help="never sample <unk>")
    parser.flag("", "--samples", type=positive_int, default=1, help="texts to sample, as one batch")
    parser.flag(
        "",
        "--prompt",
        default="",
        help="words to continue, written as in the corpus, from the start of a line; by default a "
        "random word is continued",
    )
    parser.flag(
        "",
        "--next",
        type=positive_int,
        metavar="K",
        help="print the K likeliest words after --prompt with their probabilities; sample nothing",
    )
    parser.flag(
        "",
        "--log-interval",
        type=positive_int,
        default=100,
        help="words between progress lines",
    )
    flags.add_seed(parser)
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
    known = dictionary.word2idx
    unknown = list(dict.fromkeys(word for word in words if word not in known))
    if unknown and UNK not in known:
        raise ToolkitError(
            f"the model does not know the word {unknown[0]!r} of --prompt: write words as in its "
            "corpus (lower case, tokens separated by spaces)"
        )
    if unknown:
        sys.stderr.write(f"not in the vocabulary, read as {UNK}: {' '.join(unknown)}\n")
    return [*([known[EOS]] if EOS in known else []), *(known.get(w, known.get(UNK)) for w in words)]


def as_text(ids: Sequence[int], words: Sequence[str]) -> str:
    """The words of `ids` in lines of 20."""
    lines = [ids[n : n + WORDS_PER_LINE] for n in range(0, len(ids), WORDS_PER_LINE)]
    return "".join(" ".join(words[i] for i in line) + "\n" for line in lines)


@program.out_of_memory("--samples")
def main(argv: Sequence[str] | None = None) -> None:
    """Write sampled words; raises ToolkitError for problems the user can fix."""
    parser = build_parser()
    given = parser.given(argv)
    if given.get("next") and not given.get("prompt", "").split():
        parser.error("--next predicts the word after --prompt: give a --prompt")
    path = given.get("checkpoint", parser.flags["checkpoint"].default)
    loaded = checkpoint.load(path)
    args = parser.settle(given, Recorded(path, "start", loaded.config, loaded.args))
    if args.outf != "-" and not args.next:
        check_writable(args.outf, "--outf", path)
    dictionary = loaded.dictionary
    if args.prompt.split():
        known = torch.tensor(prompt_ids(args.prompt.split(), dictionary))
        prompt = known.unsqueeze(1).repeat(1, args.samples)
    network = network_of(loaded, args)
    if args.next:
        prompt = prompt[:, :1].to(network.device)
        logprob, _ = next_words(network, prompt, network.init_hidden(1))
        best = logprob[0].topk(min(args.next, len(dictionary)))
        for nats, word in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            print(f"{math.exp(nats):.6f} {dictionary.idx2word[word]}")
        return
    seed_everything(args.seed)
    if not args.prompt.split():
        prompt = torch.randint(len(dictionary), (1, args.samples))
    banned = dictionary.word2idx.get(UNK) if args.no_unk else None
    words = sample(
        network,
        prompt.to(network.device),
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        banned=banned,
    )
    ids = []
    with Bar(args.words, "generating", "word") as bar:
        for number in range(1, args.words + 1):
            ids.append(next(words))
            bar.update(1)
            # Standard output gets only the text.
            if number % args.log_interval == 0 and args.outf != "-":
                bar.line(f"| Generated {number}/{args.words} words")
    # The ids are copied to the host once: a copy for every word would stall a GPU each time.
    texts = torch.stack(ids, dim=1).tolist()
    text = "\n".join(as_text(one, dictionary.idx2word) for one in texts)
    if args.outf == "-":
        sys.stdout.write(text)
        return
    with writing(args.outf, "--outf") as file:
        file.write(text.encode())


if __name__ == "__main__":
    program.run(main)
