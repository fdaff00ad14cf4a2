"""Score a trained model together with the continuous cache; nothing is trained."""

from collections.abc import Sequence

import torch
from torch import Tensor

import checkpoint
import options
from continuous_cache import ContinuousCache
from data import Corpus
from model import RNNModel
from splitcross import SplitCrossEntropyLoss
from utils import (
    batchify,
    check_length,
    end_line,
    get_batch,
    out_of_memory,
    repackage_hidden,
    select_device,
)


def build_parser() -> options.Parser:
    """The command line of pointer.py."""
    parser = options.Parser(options.CLASSIC["pointer"], __doc__)
    options.add_data(parser, "data/penn")
    options.add_model(parser)
    options.add_save(parser, "model file to score")
    parser.add_argument(
        "--bptt",
        type=options.positive_int,
        default=5000,
        help="tokens computed at a time; the result does not depend on it",
    )
    group = parser.add_argument_group("cache")
    group.add_argument(
        "--window",
        type=options.positive_int,
        default=3785,
        help="positions the cache looks back over",
    )
    group.add_argument(
        "--theta",
        type=options.non_negative,
        default=0.6625523432485668,
        help="sharpness of the cache's attention: 0 is uniform over the window",
    )
    group.add_argument(
        "--lambdasm",
        type=options.probability,
        default=0.12785920428335693,
        help="weight of the cache in the mixture with the vocabulary's softmax",
    )
    group.add_argument(
        "--cache-from-start",
        action="store_true",
        help="use the cache from the second token on and not only once the window is full",
    )
    options.add_device(parser)
    options.add_max_batches(parser, "chunks of --bptt tokens of each file")
    return parser


@torch.inference_mode()
def evaluate(
    model: RNNModel,
    criterion: SplitCrossEntropyLoss,
    source: Tensor,
    cache: ContinuousCache,
    *,
    lambdasm: float,
    bptt: int,
    max_batches: int | None = None,
) -> float:
    """Mean cross-entropy, nats a predicted token, of the mixture of model and `cache`.

    `source` is (rows, 1): the cache follows one stream. Where the cache speaks, the probability of
    a word is `lambdasm * p_cache + (1 - lambdasm) * p_vocabulary`.
    """
    model.eval()
    model.reset()
    hidden = model.init_hidden(1)
    total = torch.zeros((), dtype=torch.float64, device=source.device)
    rows = 0
    for chunk, i in enumerate(range(0, source.size(0) - 1, bptt)):
        if chunk == max_batches:
            break
        data, targets = get_batch(source, i, bptt)
        output, hidden, raw, _ = model(data, repackage_hidden(hidden), return_h=True)
        log_vocabulary = criterion.target_logprob(
            model.decoder.weight, model.decoder.bias, output, targets
        )
        p_cache, speaks = cache.target_prob(raw[-1].squeeze(1), targets)
        p_mixed = lambdasm * p_cache + (1 - lambdasm) * log_vocabulary.exp()
        total -= torch.where(speaks, p_mixed.log(), log_vocabulary).double().sum()
        rows += len(targets)
    model.reset()
    return total.item() / rows


@out_of_memory("--bptt")
def main(argv: Sequence[str] | None = None) -> None:
    """Score validation and test; raises ToolkitError for what the user can mend."""
    args = options.parse(build_parser, argv)
    loaded = checkpoint.load(args.save)
    options.check_architecture(args, loaded.config, args.save)
    device = select_device(args.cuda)
    corpus = Corpus(args.data, loaded.dictionary)
    model, criterion = checkpoint.rebuild(loaded, device)
    for name, part, tokens in (
        ("valid.txt", "val", corpus.valid),
        ("test.txt", "test", corpus.test),
    ):
        source = batchify(tokens, 1).to(device)
        check_length(source, name, "bring a longer text")
        loss = evaluate(
            model,
            criterion,
            source,
            ContinuousCache(args.window, args.theta, args.cache_from_start),
            lambdasm=args.lambdasm,
            bptt=args.bptt,
            max_batches=args.max_batches,
        )
        print("=" * 89)
        print(end_line("pointer", part, loss))
    print("=" * 89)


if __name__ == "__main__":
    options.run(main)
