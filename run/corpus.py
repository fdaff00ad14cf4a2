"""Reading the corpus that a script's flags name."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from data import EOS, SPLITS, UNK, Corpus, CorpusError, Dictionary
from files.reading import opened
from run.progress import Bar


def read_corpus(
    args: argparse.Namespace,
    dictionary: Dictionary | None = None,
    first: bool = True,
    train: bool = True,
) -> Corpus:
    """The corpus of --data in a model's vocabulary `dictionary`, or in one of its own.

    On a terminal the `first` process shows a bar. Without `train` a missing train.txt is an empty
    text. Prints how many tokens are read as unknown, and what is unusual. Raises CorpusError, also
    if too many tokens are unknown.
    """
    folder = Path(args.data)
    parts = [folder / f"{name}.txt" for name in SPLITS]
    size = sum(part.stat().st_size for part in parts if part.is_file())
    with Bar(size, "reading", "B", wanted=first) as bar:
        corpus = Corpus(folder, dictionary, split=args.split, tick=bar.update, train=train)
    unk = args.unk if dictionary is None else None
    for line in unusual(corpus, folder, unk):
        print(f"| {line}")
    if dictionary is not None:
        if corpus.unknown:
            unknown = corpus.unknown / len(corpus)
            check_known(unknown, dictionary, f"the corpus {args.data}")
            print(
                f"| {corpus.unknown} of the {len(corpus)} tokens of {args.data} ({unknown:.2%}) "
                f"are not in the model's vocabulary: read as {dictionary.unk}"
            )
        return corpus
    corpus.dictionary.unk = unk
    if args.vocab_size or args.min_count:
        fewer = corpus.with_fewer_words(args.vocab_size, args.min_count or 0)
        kept = fewer.dictionary.word2idx
        rare = sum(word not in kept for word in corpus.dictionary.idx2word)
        print(f"| vocabulary of {len(kept)} words, {rare} rarer words left out")
        return fewer
    if unk != UNK and unk not in corpus.dictionary.word2idx:
        raise CorpusError(
            f"the corpus {args.data} has no word {unk} for --unk to name: give its own symbol, or "
            "make one of its rare words with --min-count"
        )
    return corpus


def unusual(corpus: Corpus, folder: Path, unk: str | None) -> Iterator[str]:
    """A line for each oddity of a corpus; `unk` is None for the vocabulary of a model."""
    name = "train.txt" if len(corpus.part("train", 0, 1)) else "valid.txt"
    with opened(folder / name) as file:
        lines = [line for line in file.read(1 << 16).splitlines() if line.strip()]
    if sum(line.rstrip().endswith(EOS.encode()) for line in lines) > len(lines) / 2:
        yield f"the lines of {folder} end in {EOS} already and get another: take them out"
    if unk is None:
        return
    words = corpus.dictionary.idx2word
    if any("\ufeff" in word for word in words):
        yield "U+FEFF, a byte order mark, is within the text, as a part of words: take it out"
    for word in words:
        if word.lower() == UNK and word != unk:
            yield f"{word} is a word like any other here: --unk '{word}' makes it the unknown one"
    # A word that is in valid.txt and test.txt as often as in all three is not in train.txt.
    valid, counter = corpus.valid, corpus.dictionary.counter
    held_out = torch.bincount(torch.cat([valid, corpus.test]), minlength=len(words)).tolist()
    only_there = torch.tensor([held_out[i] == counter[i] for i in range(len(words))])
    valid = valid[valid != corpus.dictionary.word2idx[EOS]]
    unseen = only_there[valid].float().mean()
    if unseen > 0.5:
        yield (
            f"{unseen:.0%} of the words of valid.txt occur nowhere in train.txt: put white space "
            "between the words or characters of a language written without"
        )


def check_known(unknown: float, dictionary: Dictionary, what: str) -> None:
    """Raise CorpusError if too many of a text's tokens, the fraction `unknown`, are <unk>.

    The text must have half as many known words as the text of the vocabulary, much of which may be
    <unk> too: a run on a small vocabulary could otherwise not be resumed.
    """
    own = dictionary.counter[dictionary.word2idx.get(dictionary.unk, -1)]
    if 1 - unknown < (1 - own / max(1, dictionary.total)) / 2:
        raise CorpusError(
            f"{unknown:.0%} of the tokens of {what} are not in the model's vocabulary: use a text "
            "in the language and spelling of the corpus that the model was trained on"
        )
