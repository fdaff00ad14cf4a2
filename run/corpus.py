"""Reading the corpus that a script's flags name."""

import argparse
from pathlib import Path

from data import SPLITS, Corpus, CorpusError, Dictionary
from run.progress import Bar


def read_corpus(
    args: argparse.Namespace, dictionary: Dictionary | None = None, first: bool = True
) -> Corpus:
    """The corpus of --data in a model's vocabulary `dictionary`, or in its own.

    On a terminal the `first` process shows a bar. Prints how many tokens are read as <unk>. Raises
    CorpusError, also if most tokens are.
    """
    folder = Path(args.data)
    parts = [folder / f"{name}.txt" for name in SPLITS]
    size = sum(part.stat().st_size for part in parts if part.is_file())
    with Bar(size, "reading", "B", wanted=first) as bar:
        corpus = Corpus(folder, dictionary, split=args.split, tick=bar.update)
    if corpus.unknown:
        unknown = corpus.unknown / len(corpus)
        check_known(unknown, f"the corpus {args.data}")
        print(
            f"| {corpus.unknown} of the {len(corpus)} tokens of {args.data} ({unknown:.2%}) are "
            "not in the model's vocabulary: read as <unk>"
        )
    if dictionary is None and (getattr(args, "vocab_size", None) or getattr(args, "min_count", 0)):
        fewer = corpus.with_fewer_words(args.vocab_size, args.min_count or 0)
        kept = fewer.dictionary.word2idx
        rare = sum(word not in kept for word in corpus.dictionary.idx2word)
        print(f"| vocabulary of {len(kept)} words, {rare} rarer words left out")
        return fewer
    return corpus


def check_known(unknown: float, what: str) -> None:
    """Raise CorpusError if more than half of a text's tokens, the fraction `unknown`, are <unk>."""
    if unknown > 0.5:
        raise CorpusError(
            f"{unknown:.0%} of the tokens of {what} are not in the model's vocabulary: use a text "
            "in the language and spelling of the corpus that the model was trained on"
        )
